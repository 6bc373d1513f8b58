"""The attention of any PyTorch Vision Transformer, with a measured proof, and interventions on it.

Hands out capture, intervene, Geometry and the search for the ViT inside a module. May use files and support.

    callers.py         which modules compute an attention call, from the call stack
    calls.py           an attention call: its weights, its values and how to compute it again
    capture.py         capture and intervene
    classifiers.py     whether a model classifies, seen from what runs
    edits.py           ready-made edits: switch off, average, make uniform or one-hot, shuffle, as on another image
    einsum.py          the axes of an einsum
    function_call.py   a call of a PyTorch function, with its arguments
    geometry.py        the positions of tokens on the image, and what models declare of their patches
    gradients.py       forward passes without gradients, and with them for models that ask for them
    hand_written.py    attention written out as softmax(query @ key) @ value
    inputs.py          the number type of the images that a model takes
    kept_state.py      put back what objects keep when code of theirs has run
    kernels.py         attention that cannot be seen, by its kernel
    layer_geometry.py  the geometry of one layer: measured, or given and compared with that
    layers.py          what capture hands out
    model_search.py    find the Vision Transformer inside a module
    outputs.py         class scores and probabilities, whatever form an output has
    own_keys.py        which key each query is made of the same token as
    placement.py       from receptive fields to a grid of patches, or why there is none
    places.py          the places of all keys of a model, measured once
    policies.py        what becomes of a recorded layer: handed out, with gradients, edited, switched off
    probe.py           a model's call repeated with other pictures
    projections.py     the linear map that is applied to the heads' outputs
    proof.py           how far weights times values may be from the model's own output
    receptive_fields.py  which pixels each key answers to
    recording.py       the function mode that sees, proves and records attention calls
    streams.py         which calls are parts of one layer, and which stand side by side
    torch_internals.py the private parts of PyTorch, with a check of each
    undisturbed.py     run a model and leave it as it was
"""
