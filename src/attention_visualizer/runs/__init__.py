"""Run folders and what is kept in them: manifest, checkpoints, history.

Hands out RunFolder, the reading and choosing of checkpoints, and AttentionHistory. May use measures and below.

    checkpoint.py         read checkpoints, checked before use, and write them whole
    checkpoint_choice.py  which checkpoint `best`, `last`, a run or a sweep means
    config_fields.py      which fields of a configuration may change, matter, or were added later
    export.py             write weights as safetensors
    folders.py            run folders: their names, manifest, locks
    history.py            attention over training, in one .npz
"""
