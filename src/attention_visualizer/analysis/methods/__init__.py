"""Several explanation methods on each sample.

Hands out the chapter.

    chapter.py  figures, tables and text
"""
