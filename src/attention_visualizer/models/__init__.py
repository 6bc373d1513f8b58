"""Models: our own in one file, others by name.

Hands out VisionTransformer, models of timm, and untrained control models. May use attention and below.

    timm_models.py         models of timm by name, with weights from a file or published ones
    untrained.py           control models: the same architecture with random weights
    vision_transformer.py  VisionTransformer
    vit_config.py          the fields of a VisionTransformer: types, defaults, bounds, number of parameters
"""
