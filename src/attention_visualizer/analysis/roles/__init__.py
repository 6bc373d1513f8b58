"""What each head does, measured, and which heads are alike.

Hands out the chapter.

    causal.py   whether predictions depend on what a role says
    chapter.py  text and tables
    figure.py   a row for each head, and how alike heads are
    measure.py  measures of each head, beside those of random weights
"""
