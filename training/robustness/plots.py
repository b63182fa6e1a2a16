"""The pictures of the robustness measurements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import PercentFormatter

from training.figures import BLUE, GREY, ORANGE, STYLE, new_figure, save_figure
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
    axes = figure.subplots(len(CORRUPTIONS), 1 + len(STRENGTHS), squeeze=False)
    for place, kind in enumerate(CORRUPTIONS):
        known = images[: place % len(images) + 1]
        damage = corrupt_at_will(known, kind, seed=1)
        for axis, (*_, image) in zip(axes[place], (known, *map(damage, STRENGTHS)), strict=True):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set(visible=True, color="#e4e4e4")
        axes[place, 0].set_ylabel(_words(kind), rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], ("as it is", *STRENGTHS), strict=True):
        axis.set_title(str(title), size=10)
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
        axes = part.subplots(-(-len(images) // per_row), per_row)
        for axis, image, answer in zip(axes.flat, images, probabilities, strict=True):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            passed = answer.max() >= abstain_below
            for spine in axis.spines.values():
                spine.set(visible=True, color=ORANGE if passed else "#e4e4e4", lw=1.6 if passed else 0.8)
            text = f"{names[answer.argmax()]}  {answer.max():.0%}" if passed else f"–  {answer.max():.0%}"
            axis.set_title(text, size=8, color=ORANGE if passed else GREY, pad=2)
    figure.suptitle(f"No digits: orange where the answer counts (confidence {abstain_below:.3f} or more)", size=11)
    save_figure(figure, path)


def _words(kind: str) -> str:
    return kind.replace("_", " ")
