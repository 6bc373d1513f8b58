"""Entropy, maximum and mean attention by layer, head and class.

Hands out the chapter.

    chapter.py  figures, tables and text
"""
