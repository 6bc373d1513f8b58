"""What the prediction needs of attention: weights replaced in all layers at once, heads and layers ablated.

Hands out the chapter.

    chapter.py  texts and numbers
    figure.py   the figures
    measure.py  which interventions there are, and what changes with each
    outcomes.py predictions with and without an intervention: errors, accuracy, score
    reuse.py    what runs before an edited layer, run once for all
    tables.py   the tables
    trials.py   passes over images with edited attention
"""
