"""Mean maps of each class, and where the maps of two classes differ.

Hands out the chapter.

    chapter.py  text and tables
    figure.py   a row for each class, a row for each pair of classes
    measure.py  mean maps and their differences
"""
