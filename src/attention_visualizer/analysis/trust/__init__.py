"""Is the map an explanation?

Hands out the chapter.

    chapter.py   texts and tables
    controls.py  maps of random weights, and whether the model has learnt
    figure.py    the figure
    measure.py   all of it on one model
    rankings.py  maps, baselines and the rankings that ask the model itself, and the curves along them
    verdict.py   what a ranking gains, what trust needs, and each method's verdict
"""
