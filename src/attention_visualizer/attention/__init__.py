"""The attention of any PyTorch Vision Transformer, with a measured proof, and interventions on it.

Hands out capture, intervene, Geometry and the search for the ViT inside a module. May use files and support.

    callers.py         which modules compute an attention call, from the call stack
    calls.py           an attention call: its weights, its values and how to compute it again
    capture.py         capture and intervene
    edits.py           ready-made edits: switch off, average, make uniform, shuffle
    einsum.py          the axes of an einsum
    function_call.py   a call of a PyTorch function, with its arguments
    geometry.py        where tokens lie on the image, as models declare it
    hand_written.py    attention written out as softmax(query @ key) @ value
    layer_geometry.py  where the tokens of one layer lie, or why that is not known
    layers.py          what capture hands out
    model_search.py    find the Vision Transformer inside a module
    outputs.py         what a model predicts, whatever form its output has
    policies.py        what becomes of a recorded layer: handed out, with gradients, edited
    recording.py       the function mode that sees, proves and records attention calls
    torch_internals.py the private parts of PyTorch, with a check of each
"""
