"""Figures: arrays in, PanelFigures and matplotlib axes out.

Hands out the renderer of maps, charts, and the figures made with them; no files. May use measures and below.

    attention_figures.py  the figures of attention maps
    charts.py             charts of numbers by layer, head and time
    color_scales.py       from values to colours: where a map gets its colours
    film.py               frames of films, and charts that mark a moment
    fonts.py              fonts that have a text's characters
    notebook_figure.py    a matplotlib figure that a notebook shows
    panels.py             the renderer of maps: placed images and texts, maps over images
    run_charts.py         charts that compare runs
    tile_grid.py          panels in rows and columns, with titles and colour bars
"""
