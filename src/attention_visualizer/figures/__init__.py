"""Figures: arrays in, pictures and matplotlib axes out.

Hands out the renderer of maps, charts, and the figures made with them; no files. May use measures and below.

    attention_figures.py  the figures of attention maps
    charts.py             charts of numbers by layer, head and time
    panels.py             the renderer: where a map gets its colours
    run_charts.py         charts that compare runs
"""
