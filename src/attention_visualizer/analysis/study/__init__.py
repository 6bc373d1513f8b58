"""What is analysed, prepared once and shared by all chapters.

Hands out Study and the objects in it.

    analysed_weights.py  which weights, and their test images
    budget.py            how much may be spent on a chapter
    compared_runs.py     the runs that `runs=` names, checked
    controls.py          models that learnt nothing, or nothing about the classes, to compare with
    heads.py             which heads a model has
    output.py            where figures go, and their watermark
    samples.py           which single images the figures show
    shuffled_labels.py   control models that learn shuffled labels by heart
    study.py             Study: all of it together
    survey.py            one pass over all images: statistics and maps
    target.py            the model, the images and how attention is read
"""
