"""The commands, from typed options to one-line errors.

Hands out what train.py, analyze.py and the installed command `attention-visualizer` call. May use all other rooms.

    analyze.py             `python analyze.py`: from the command line to checked options
    analyze_checkpoint.py  from checked options to a report
    analyze_options.py     the fields of conf/analyze.yaml, their types, which go together
    command_line.py        how both run: a user's mistake ends in one line
    completion.py          completion in the shell
    help_text.py           `--help`, and what a misspelt field was meant to be
    main.py                `attention-visualizer`: the commands by name
    quick_imports.py       imports without garbage collection; Ctrl-C meanwhile
    train.py               `python train.py`: a run, or the jobs of a sweep
"""
