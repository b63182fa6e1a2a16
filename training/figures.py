"""What all pictures of the stages share. Drawn without a display, with matplotlib's object interface."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.workspace import whole_file

BLUE, ORANGE, GREY = "#1f5fa8", "#d1650f", "#8a8a8a"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}
"""For ``matplotlib.rc_context``, around every function that draws."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the same picture is the same bytes."""
    with whole_file(path) as part:
        # No version of matplotlib inside.
        figure.savefig(part, dpi=110, metadata={"Software": None})
