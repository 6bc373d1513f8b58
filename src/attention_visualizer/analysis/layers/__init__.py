"""From shallow to deep on each sample.

Hands out the chapter.

    chapter.py  figures, tables and text
    film.py     one image through the layers
"""
