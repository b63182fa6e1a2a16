"""The pictures of the robustness measurements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import PercentFormatter

from digits.certainty import certainty
from training.figures import BLUE, GREY, ORANGE, STYLE, new_figure, save_figure
from training.plots import frame_images, show_images
from training.robustness.corruptions import CORRUPTIONS, STRENGTHS, corrupt_at_will
from training.robustness.measure import Robustness

_COLUMNS = 3


@mpl.rc_context(STYLE)
def draw_corruption_curves(path: Path, rows: Sequence[dict[str, Any]], count: int) -> None:
    """Accuracy over strength, a small picture for each corruption: the candidate and its twin, with 95 % intervals."""
    figure = new_figure(7.4, 9.6)
    axes = figure.subplots(-(-len(CORRUPTIONS) // _COLUMNS), _COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axis, kind in zip(axes.flat, CORRUPTIONS, strict=True):
        of_kind = [row for row in rows if row["corruption"] == kind]
        for suffix, colour, name in (("_twin", ORANGE, "twin without augmentation"), ("", BLUE, "candidate")):
            accuracy = [row[f"accuracy{suffix}"] for row in of_kind]
            low, high = ([row[f"accuracy{suffix}_{end}"] for row in of_kind] for end in ("low", "high"))
            axis.plot(STRENGTHS, accuracy, color=colour, marker="o", ms=3, lw=1.4, label=name)
            axis.fill_between(STRENGTHS, low, high, color=colour, alpha=0.2, lw=0)
        axis.set_title(_words(kind), size=10)
        axis.set_xticks(STRENGTHS)
        axis.set_ylim(0, 1.03)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.suptitle(f"Accuracy over strength of damage (n = {count:,} test images for each point)", size=11)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


@mpl.rc_context(STYLE)
def draw_corruption_samples(path: Path, images: np.ndarray) -> None:
    """What each corruption looks like: a row each, one image (another in each row) as it is and at five strengths."""
    figure = new_figure(6.4, 0.78 * len(CORRUPTIONS) + 0.5)
    axis = figure.subplots()
    columns = ("as it is", *STRENGTHS)
    shown = []
    for place, kind in enumerate(CORRUPTIONS):
        known = images[: place % len(images) + 1]
        shown += [one[-1] for one in (known, *map(corrupt_at_will(known, kind, seed=1), STRENGTHS))]
    corners = show_images(axis, np.stack(shown), len(columns), gap_px=(3, 9))
    axis.set_xlim(left=-36)  # room for the names
    frame_images(axis, corners, ["#e4e4e4"], [0.8])
    for kind, (x, y) in zip(CORRUPTIONS, corners[:: len(columns)], strict=True):
        axis.text(x - 4, y + images.shape[1] / 2, _words(kind), ha="right", va="center")
    for title, (x, y) in zip(columns, corners, strict=False):
        axis.text(x + images.shape[2] / 2, y - 3, str(title), ha="center", va="bottom", size=10)
    save_figure(figure, path)


@mpl.rc_context(STYLE)
def draw_nondigits(path: Path, robustness: Robustness, names: Sequence[str]) -> None:
    """Non-digits by kind, and what was made of each: the class and its confidence, or a dash where it abstained."""
    shown, abstain_below = robustness.shown, robustness.abstain_below
    per_row = 8
    figure = new_figure(7.4, 2.3 * len(shown) + 0.6)
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, (kind, (images, probabilities)) in zip(parts, shown.items(), strict=True):
        part.suptitle(kind, size=10, x=0.01, ha="left")
        axis = part.subplots()
        corners = show_images(axis, images, per_row, gap_px=(6, 5))
        passed = certainty(probabilities) >= abstain_below
        frame_images(axis, corners, np.where(passed, ORANGE, "#e4e4e4").tolist(), np.where(passed, 1.6, 0.8).tolist())
        for (x, y), answer, counts in zip(corners, probabilities, passed, strict=True):
            text = f"{names[answer.argmax()] if counts else '–'}  {answer.max():.0%}"
            colour = ORANGE if counts else GREY
            axis.text(x + images.shape[2] / 2, y - 1, text, ha="center", va="bottom", size=8, color=colour)
    title = f"No digits, what was read and how likely: orange where it counts (certainty {abstain_below:.3f} or more)"
    figure.suptitle(title, size=11)
    save_figure(figure, path)


def _words(kind: str) -> str:
    return kind.replace("_", " ")
