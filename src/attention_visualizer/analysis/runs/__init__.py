"""Several training runs compared: what survives another seed, or what goes with a setting.

Hands out the chapter.

    chapter.py        seeds or settings?
    run_table.py      the compared runs as a table and as JSON
    seeds/            runs that differ in the seed only
    settings/         runs that differ in their settings
    surveyed_runs.py  the compared runs, each surveyed with the same images
"""
