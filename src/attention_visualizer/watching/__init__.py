"""Attention while a model trains, in anybody's Lightning Trainer.

Hands out AttentionLogger. May use report and below, but none of our own data, models and checkpoints.

    attention_logger.py     AttentionLogger: when attention is captured and where it is written
    event_checksums.py      faster checksums for TensorBoard's event files
    lightning_internals.py  the private parts of Lightning and TensorBoard that are used, each once
    log_guard.py            LogGuard: a logger that cannot write costs a warning, not the training
    loggers.py              what each of Lightning's loggers gets
    probes.py               the images that are observed again and again
    validation.py           attention statistics from the user's own validation pass
"""
