"""Several training runs compared: what survives another seed, or what goes with a setting.

Hands out the chapter.

    chapter.py           seeds or settings?
    seeds.py             the chapter on runs that differ in the seed only
    seeds_measure.py     heads and their partners, and what each seed shows
    settings.py          the chapter on runs that differ in their settings
    settings_measure.py  each setting and its difference from the first
    survey.py            the compared runs, each surveyed with the same images
"""
