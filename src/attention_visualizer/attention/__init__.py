"""The attention of any PyTorch Vision Transformer, with a measured proof, and interventions on it.

Hands out capture, intervene, Geometry and the search for the ViT inside a module. May use files and support.

    callers.py       which modules compute an attention call, from the call stack
    calls.py         the ways in which PyTorch computes attention
    capture.py       capture and intervene
    edits.py         ready-made edits: switch off, average, make uniform, shuffle
    geometry.py      where tokens lie on the image
    hand_written.py  attention written out as softmax(query @ key) @ value
    model_search.py  find the Vision Transformer inside a module
    outputs.py       what a model predicts, whatever form its output has
"""
