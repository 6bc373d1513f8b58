"""Ground floor: what every room may use and what knows none of them.

Hands out UserError, safe text, and small helpers for processes and cores. May use no other room.

    allocator.py          keep freed memory in the process, for faster training steps
    double_precision.py   sums in float64, on the CPU where a device has none
    errors.py             UserError: a mistake that the user can correct; the text of any error in one line
    extras.py             what to install where an optional package is missing
    field_types.py        check values against type hints and bounds, with one message for both commands
    invocation.py         how this program is typed: `python train.py` or `attention-visualizer train`
    machine.py            memory, installed versions and git commit of this machine
    parallel.py           independent passes of a model, one on each core
    text.py               make untrusted text safe for terminals, CSV and reports
    training_progress.py  how many batches training has done
"""
