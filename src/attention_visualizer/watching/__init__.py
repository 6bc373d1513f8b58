"""Attention while a model trains, in anybody's Lightning Trainer.

Hands out AttentionLogger. May use report and below, but none of our own data, models and checkpoints.

    attention_logger.py     AttentionLogger: when attention is captured and where it is written
    attempts.py             what fails while watching: one warning, and never the training
    event_checksums.py      faster checksums for TensorBoard's event files
    history_file.py         the file of one training's history, which no other training takes
    lightning_package.py    Lightning, as `lightning` or as `pytorch_lightning`
    lightning_internals.py  the private parts of Lightning and TensorBoard that are used, each once
    log_guard.py            LogGuard: a logger that cannot write costs a warning, not the training
    loggers.py              what each of Lightning's loggers gets
    padding.py              which images of a batch another process counts
    probes.py               the images that are observed again and again
    tags.py                 what is logged is called and described, and where to look
    unnoticed.py            run somebody's module without a trace
    validation.py           attention statistics from the user's own validation pass
"""
