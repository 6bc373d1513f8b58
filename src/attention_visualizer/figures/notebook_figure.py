"""A matplotlib figure that a notebook shows: without pyplot, which holds on to each figure, IPython knows none."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """Shown once as the last value of a cell; where pyplot is active, its own way of showing takes the place."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
