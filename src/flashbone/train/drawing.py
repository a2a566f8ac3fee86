"""Matplotlib figures in one look, drawn without a display, and saved as PNGs that appear whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashbone.files.outputs import whole_or_absent

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


def blank(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure of this size in inches, and its panels as an array of shape (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.ravel():
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save(figure: Figure, target: Path) -> Path:
    """Write the figure as a PNG; returns its path."""
    with whole_or_absent(target, is_file=True, replace=True) as partial:
        figure.savefig(partial, format="png")
    return target
