"""Common claims about a digit model's attention, one verdict each.

Hands out the chapter.

    chapter.py   table, figure and text
    declared.py  the claims, declared before any model was looked at
    measure.py   the quantities that claims are judged by
    verdicts.py  from quantities to verdicts
"""
