"""Runs that differ in their settings: what goes with a setting.

Hands out the chapter.

    chapter.py  table and text
    figure.py   each quantity by setting, and its differences from the first
    measure.py  each setting, and its differences from the first
"""
