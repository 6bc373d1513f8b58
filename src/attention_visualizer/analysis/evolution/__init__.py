"""Attention over training.

Hands out the chapter.

    chapter.py  figures and text
    figure.py   curves and the strip
    film.py     the film
"""
