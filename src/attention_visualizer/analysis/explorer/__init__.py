"""The explorer: one page to look at attention by hand, of the samples and of training.

Hands out the chapter.

    chapter.py  what the page holds, and what the report says of it
    live.py     the page of one image in a notebook, made anew when something is asked for
"""
