"""Attention over training.

Hands out the chapter.

    chapter.py  figures, tables and text
"""
