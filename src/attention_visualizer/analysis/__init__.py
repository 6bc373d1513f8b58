"""The offline analysis: one folder a chapter, over one study.

Hands out the chapters and the function that writes them all. May use training and below.

    chapters.py     the list of chapters, and writing them
    header.py       the report's header: what was analysed, and warnings
    needs.py        what a chapter needs: labels, ink, a classifier, a history, several runs
    preparation.py  from options to a Study
    writing.py      the whole analysis: chapters, then the report
    study/          what is analysed, prepared once
    patterns/       attention by layer on each sample
    heads/          every head of every layer on each sample
    layers/         from shallow to deep: map, rollout, change
    methods/        several explanation methods side by side
    statistics/     entropy, maximum and mean by layer, head and class
    atlas/          mean maps of each class, and where two classes differ
    roles/          what each head does
    importance/     what the prediction needs: heads and layers ablated
    trust/          is the map an explanation? deletion and insertion
    claims/         common claims about attention, one verdict each
    evolution/      attention over training
    explorer/       one page to look at attention by hand
    runs/           several runs compared: seeds, or settings
"""
