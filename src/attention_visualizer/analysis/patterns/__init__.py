"""Attention by layer on each sample.

Hands out the chapter.

    chapter.py  figures, tables and text
"""
