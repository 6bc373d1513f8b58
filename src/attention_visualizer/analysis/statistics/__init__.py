"""Entropy, maximum and mean attention by layer, head and class.

Hands out the chapter.

    chapter.py  text and tables
    figure.py   by layer, by layer and head, by class and outcome
    measure.py  what is derived from the survey
"""
