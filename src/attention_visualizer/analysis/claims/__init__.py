"""Common claims about a digit model's attention, one verdict each.

Hands out the chapter.

    chapter.py   tables and text
    content.py   what is in the patches of images: ink, edges, points of strokes
    declared.py  the claims, declared before any model was surveyed
    evidence.py  the quantities of one model that claims are judged by
    figure.py    each claim's weakest requirement against what it must reach
    measure.py   the model's and the controls' evidence, judged
    verdicts.py  from quantities to verdicts
"""
