"""What each head does.

Hands out the chapter.

    chapter.py  figures, tables and text
    measure.py  the numbers behind them
"""
