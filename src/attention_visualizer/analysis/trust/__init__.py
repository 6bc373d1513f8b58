"""Is the map an explanation?

Hands out the chapter.

    chapter.py  texts and tables
    figure.py   the figure
    measure.py  perturbations, random weights and the rankings' curves
    verdict.py  what trust needs, and each method's verdict
"""
