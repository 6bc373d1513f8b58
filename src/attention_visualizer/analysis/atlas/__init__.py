"""Mean maps of each class, and where the maps of two classes differ.

Hands out the chapter.

    chapter.py  figures, tables and text
    measure.py  the numbers behind them
"""
