"""What is analysed, prepared once and shared by all chapters.

Hands out Study and Survey.

    compared_runs.py  the runs that `runs=` names, checked
    preparation.py    from options to a Study
    study.py          Study
    survey.py         one pass over all images: statistics and maps
"""
