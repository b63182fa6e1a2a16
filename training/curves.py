"""The learning curves. Apart from the other pictures, so that a change in those does not train anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from training.figures import BLUE, ORANGE, STYLE, new_figure, save_figure


@mpl.rc_context(STYLE)
def draw_curves(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Loss and accuracy by epoch, of the training (deformed) and validation images."""
    epochs = [row["epoch"] for row in history]
    figure = new_figure(10, 4)
    loss, accuracy = figure.subplots(1, 2)
    for axis, name, title in ((loss, "loss", "Mean negative log-likelihood"), (accuracy, "accuracy", "Accuracy")):
        marker = "o" if len(epochs) < 30 else None
        axis.plot(
            epochs, [r[name] for r in history], color=ORANGE, marker=marker, ms=3, label="training, deformed images"
        )
        axis.plot(
            epochs, [r[f"validation_{name}"] for r in history], color=BLUE, marker=marker, ms=3, label="validation"
        )
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False)
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    accuracy.set_ylim(bottom=max(0.0, min(r["validation_accuracy"] for r in history) - 0.03), top=1.0)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    last = history[-1]["validation_accuracy"]
    figure.suptitle(f"{len(epochs)} epochs: validation accuracy {last:.2%}")
    save_figure(figure, path)
