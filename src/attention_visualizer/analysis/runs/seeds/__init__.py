"""Runs that differ in the seed only: which heads recur, and what else survives another seed.

Hands out the chapter.

    chapter.py  tables and text
    figure.py   divergences of partners, layers by run, agreement
    measure.py  heads and their partners, and what holds in each seed
"""
