"""The pictures of the data and of the evaluation."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from training.figures import BLUE, GREY, ORANGE, STYLE, new_figure, save_figure

MOST_ROWS = 40
"""Classes drawn among the samples, and numbered in the confusion matrix, at most: more could not be read."""


def show_images(axis: Any, images: np.ndarray, columns: int, gap_px: tuple[int, int]) -> np.ndarray:
    """Show images in rows, ink black on white, as one picture: with an axes for each it takes six times as long.

    The axes' unit is then an image's pixel. Texts and frames are put where the answer says.

    Args:
        axis: an empty axes; its frame and ticks go.
        images: uint8 (N, height, width), ink 255 on paper 0.
        columns: images in a row.
        gap_px: above each row, and to the left of each column but the first.

    Returns:
        x and y of each image's upper left corner, int (N, 2); y grows downwards.
    """
    count, height, width = images.shape
    above, between = gap_px
    places = np.arange(count)
    corners = np.stack([places % columns * (width + between), places // columns * (height + above)], axis=1)
    rows = -(-count // columns)
    sheet = np.zeros((rows * (height + above) - above, columns * (width + between) - between), np.uint8)
    for (x, y), image in zip(corners, images, strict=True):
        sheet[y : y + height, x : x + width] = image
    bottom, right = sheet.shape
    axis.imshow(sheet, cmap="gray_r", vmin=0, vmax=255, extent=(0, right, bottom, 0))
    axis.set(xlim=(-0.5, right + 0.5), ylim=(bottom + 0.5, -above - 0.5))  # half a pixel for frames
    axis.set_axis_off()
    return corners


def frame_images(axis: Any, corners: np.ndarray, colours: Sequence[str], widths: Sequence[float]) -> None:
    """A frame around each image of 28 x 28 pixels at those corners, as ``show_images`` gives them."""
    squares = [Rectangle((x, y), IMAGE_WIDTH, IMAGE_HEIGHT) for x, y in corners]
    axis.add_collection(PatchCollection(squares, facecolors="none", edgecolors=colours, linewidths=widths))


@mpl.rc_context(STYLE)
def draw_samples(
    path: Path, images: np.ndarray, labels: np.ndarray, names: Sequence[str], per_class: int, title: str
) -> None:
    """A row of images for each class (of the first 40), ink black on white as people know it."""
    shown = names[:MOST_ROWS]
    margin = 0.1 * max(0, max(map(len, shown)) - 1)  # inches that names take which are longer than a digit
    figure = new_figure(0.55 * per_class + 0.9 + margin, 0.58 * len(shown) + 0.7)
    axis = figure.subplots()
    sheet = np.zeros((len(shown), per_class, *images.shape[1:]), np.uint8)  # blank where a class has fewer
    for label, row in enumerate(sheet):
        members = np.flatnonzero(labels == label)[:per_class]
        row[: len(members)] = images[members]
    corners = show_images(axis, sheet.reshape(-1, *images.shape[1:]), per_class, gap_px=(3, 3))
    axis.set_xlim(left=-17 - 56 * margin)  # room for the names
    for name, (x, y) in zip(shown, corners[::per_class], strict=True):
        axis.text(x - 8, y + images.shape[1] / 2, name, ha="right", va="center", size=13)
    if len(names) > len(shown):
        title += f"; {len(shown)} of {len(names)} classes"
    figure.suptitle(title)
    save_figure(figure, path)


@mpl.rc_context(STYLE)
def draw_confusion(path: Path, confusion: np.ndarray, names: Sequence[str], title: str) -> None:
    """The confusion matrix (C, C), rows true, columns predicted. Colour is for the mistakes alone.

    Of more than 40 classes neither names nor counts are written: confusion.csv has them.
    """
    written = len(names) <= MOST_ROWS
    longest = max(map(len, names)) if written else 1
    side = 0.5 * (min(len(names), MOST_ROWS) - 10) if len(names) > 10 else 0.0
    figure = new_figure(7.2 + side + 0.07 * (longest - 1), 6.6 + side + 0.07 * (longest - 1))
    axis = figure.subplots()
    mistakes = confusion.astype(float)
    np.fill_diagonal(mistakes, 0.0)
    axis.imshow(mistakes, cmap="Oranges", vmin=0, vmax=max(1.0, mistakes.max()))
    for true in range(len(names) if written else 0):
        for predicted in range(len(names)):
            count = confusion[true, predicted]
            if true == predicted:
                axis.add_patch(_square(predicted, true))
            if count:
                strong = true != predicted and count > 0.6 * mistakes.max()
                axis.text(
                    predicted, true, f"{count}", ha="center", va="center", color="white" if strong else "black", size=9
                )
    axis.set(xlabel="predicted", ylabel="true")
    figure.suptitle(title, size=11)
    if written:
        axis.set_xticks(range(len(names)), names, rotation=90 if longest > 2 else 0)
        axis.set_yticks(range(len(names)), names)
    axis.grid(visible=False)
    save_figure(figure, path)


@mpl.rc_context(STYLE)
def draw_mistakes(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    limit: int,
    title: str,
) -> None:
    """The misread images, the surest mistakes first: true class, what was read, and how sure."""
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:limit]
    texts = []
    for index in wrong:
        read = predicted[index]
        true, taken_for = (textwrap.shorten(names[k], 12, placeholder="…") for k in (labels[index], read))
        between = "\n" if len(true) + len(taken_for) > 8 else " "
        texts.append(f"{true} read as{between}{taken_for}\n{probabilities[index, read]:.0%}  #{index}")
    columns, beside = 10, 4
    above = 2 + 4 * max((text.count("\n") + 1 for text in texts), default=0)
    inches = 1.05 / (images.shape[2] + beside)  # of a pixel
    rows = max(1, -(-len(wrong) // columns))
    figure = new_figure(columns * 1.05, rows * (images.shape[1] + above) * inches + 0.5)
    axis = figure.subplots()
    axis.set_axis_off()
    if not len(wrong):
        axis.text(0, 0.5, "no mistakes", transform=axis.transAxes)
    corners = show_images(axis, images[wrong], columns, (above, beside)) if len(wrong) else ()
    for (x, y), text in zip(corners, texts, strict=True):
        axis.text(x + images.shape[2] / 2, y - 1, text, ha="center", va="bottom", size=7.5)
    figure.suptitle(title)
    save_figure(figure, path)


@mpl.rc_context(STYLE)
def draw_reliability(path: Path, bins: Sequence[dict[str, float]], ece: float, count: int) -> None:
    """How often the answer was right for how sure the model said it was, above how many answers fell in each bin."""
    figure = new_figure(6.2, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    middles = [(b["low"] + b["high"]) / 2 for b in bins]
    widths = [b["high"] - b["low"] for b in bins]
    filled = [b for b in bins if b["count"]]
    upper.plot([0, 1], [0, 1], color=GREY, ls="--", label="as sure as right")
    upper.errorbar(
        [b["confidence"] for b in filled],
        [b["accuracy"] for b in filled],
        yerr=[
            [b["accuracy"] - b["accuracy_low"] for b in filled],
            [b["accuracy_high"] - b["accuracy"] for b in filled],
        ],
        color=BLUE, fmt="o-", ms=5, lw=1.2, elinewidth=1, capsize=3, label="answers, with 95 % interval",
    )  # fmt: skip
    upper.set(
        ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02), title=f"Reliability: ECE {ece:.4f} (n = {count:,})"
    )
    upper.legend(frameon=False, loc="upper left")
    lower.bar(middles, [b["count"] for b in bins], width=widths, color=BLUE, edgecolor="white")
    lower.set_yscale("symlog", linthresh=1)
    lower.set_ylim(bottom=0)
    lower.set(xlabel="confidence of the answer", ylabel="answers (log)")
    save_figure(figure, path)


@mpl.rc_context(STYLE)
def draw_selective(path: Path, coverage: np.ndarray, accuracy: np.ndarray, chosen: float) -> None:
    """Errors among the surest answers, over the share that is answered; ``chosen`` is where the threshold puts it."""
    figure = new_figure(6.2, 4.2)
    axis = figure.subplots()
    # The first few answers say little: their line would jump.
    shown = coverage >= min(0.5, chosen)
    axis.plot(100 * coverage[shown], 100 * (1 - accuracy[shown]), color=BLUE, lw=1.4)
    axis.axvline(100 * chosen, color=ORANGE, ls="--", lw=1.2, label=f"answered at the threshold: {chosen:.2%}")
    axis.set(
        xlabel="answered, the surest first (%)",
        ylabel="wrong among the answered (%)",
        title="Fewer answers, fewer errors",
    )
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="upper left")
    save_figure(figure, path)


def _square(column: int, row: int) -> Any:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#eef3f9", edgecolor="none")
