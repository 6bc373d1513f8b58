"""Training runs: configuration, the classifier, saving, stopping, resuming, sweeps.

Hands out what commands need to train; it knows Hydra. May use watching and below.

    classifier.py      the LightningModule: loss, optimiser, learning rate schedule, metrics
    configuration.py   the schema of conf/ and its checks
    muon.py            Muon and AdamW as one optimiser
    overrides.py       `field=value` as it is typed on the command line
    resuming.py        which run goes on, and which fields may change on resuming
    run.py             one run: fit, manifest, test, what is printed at the end
    saving.py          when checkpoints are written
    split_batches.py   both halves of a batch at once, on the CPU's cores
    stopping.py        Ctrl-C and SIGTERM
    sweeps.py          the jobs of a sweep, going on with one, the table at its end
    training_state.py  check what training goes on from
"""
