"""Is the map an explanation?

Hands out the chapter.

    chapter.py  figures, tables and text
    measure.py  the numbers behind them
"""
