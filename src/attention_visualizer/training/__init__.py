"""Training runs: configuration, the classifier, saving, stopping, resuming, sweeps.

Hands out what commands need to train; it knows Hydra. May use watching and below.

    checkpoint_io.py   how Lightning writes checkpoints, whole, and reads them
    classifier.py      the LightningModule: loss, optimiser, learning rate schedule, metrics
    components.py      data, model and classifier, built from a config
    configuration.py   checks of a config; filling it in; config.yaml
    muon.py            Muon and AdamW as one optimiser
    overrides.py       `field=value` as it is typed on the command line
    progress.py        what is said while a run trains: a bar, a line an epoch, train.log
    resuming.py        with which settings a run goes on, and which runs are of the same settings
    run.py             one run: fit, manifest, test, what is printed at the end
    saving.py          when checkpoints are written
    schemas.py         the schema of conf/, from the constructors' signatures
    slurm.py           jobs that the scheduler SLURM puts back into its queue
    split_batches.py   both halves of a batch at once, on the CPU's cores
    start.py           where a run starts: in a new folder, or going on in that of an unfinished one
    stopping.py        Ctrl-C, SIGTERM and other signals
    sweeps.py          the jobs of a sweep, going on with one, the table at its end
    tensorboard.py     TensorBoard for one run: descriptions, hyperparameters
    trainer.py         Lightning's Trainer with the loggers and callbacks of a config
    training_state.py  check what training goes on from
"""
