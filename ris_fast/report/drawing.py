"""The one door to matplotlib: figures are files, drawn by Agg, whatever the environment says of windows and notebooks.

Nothing heavy is imported before a figure is made.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any


def import_matplotlib() -> Any:
    """matplotlib, also where MPLBACKEND names a backend that this environment lacks: Jupyter's, without its package.

    Importing matplotlib with such a name raises. A name that it knows is set as it would have set it, so that a
    notebook's own figures stay what they are.
    """
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches on an Agg canvas: no window, no global figure, no state left behind."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
