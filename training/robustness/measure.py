"""Ask the candidate, and its twin, about damaged and moved digits and about images that are none."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from digits.certainty import certainty
from training.intervals import mean_interval, wilson_interval
from training.robustness.corruptions import CORRUPTIONS, STRENGTHS, corrupt_at_will
from training.robustness.nondigits import draw_nondigits
from training.robustness.variants import DIRECTIONS, shift, thicken, thin
from training.workspace import Split

Answer = Callable[[np.ndarray], np.ndarray]
"""Images uint8 (N, 28, 28) -> probabilities float (N, classes)."""

_SEED = 1
"""The same damage for every candidate, so that their figures can be compared."""


@dataclass(frozen=True)
class Robustness:
    """What came out. Each table is a list of rows, as its CSV file."""

    figures: dict[str, Any]
    """For metrics.json."""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of figures, and of ``corruption_gain``, candidate less twin on the same images."""
    corruptions: list[dict[str, Any]]
    variants: list[dict[str, Any]]
    nondigits: list[dict[str, Any]]
    abstain_below: float
    shown: dict[str, tuple[np.ndarray, np.ndarray]]
    """A few non-digits of each kind, uint8 (16, 28, 28), and the answers, float (16, classes)."""


def evenly_spaced(split: Split, count: int) -> Split:
    """``count`` images spread over the whole split, all if it has no more: files are often easier at one end."""
    places = np.arange(min(count, len(split.labels))) * len(split.labels) // min(count, len(split.labels))
    return Split(split.images[places], split.labels[places])


def measure_robustness(
    answer: Answer, answer_twin: Answer, split: Split, abstain_below: float, nondigit_images: int, console: Console
) -> Robustness:
    """Measure on these images.

    Args:
        answer: the candidate.
        answer_twin: its twin.
        split: the images to damage and move, and their classes.
        abstain_below: the certainty below which the candidate's answers do not count.
        nondigit_images: of each kind, at least.
        console: for the progress bar.
    """
    count = len(split.labels)
    damaged = [(kind, strength) for kind in CORRUPTIONS for strength in STRENGTHS]
    right = np.zeros((2, len(damaged), count), bool)  # of candidate and twin
    for place, (kind, strength) in enumerate(track(damaged, "corruptions", console=console, transient=True)):
        if strength == STRENGTHS[0]:
            damage = corrupt_at_will(split.images, kind, _SEED)
        images = damage(strength)
        right[:, place] = [ask(images).argmax(axis=1) == split.labels for ask in (answer, answer_twin)]
    corruptions = [
        {"corruption": kind, "strength": strength, **_shares(*right[:, place])}
        for place, (kind, strength) in enumerate(damaged)
    ]
    variants, by_image = _measure_variants(answer, answer_twin, split)
    nondigits, shown = _measure_nondigits(answer, abstain_below, nondigit_images)
    abstained, asked = (sum(row[name] for row in nondigits) for name in ("abstained", "images"))

    right_share = right.mean(axis=1)  # (2, N)
    figures = {
        "robustness_images": count,
        "corruption_accuracy": float(right[0].mean()),
        "corruption_accuracy_twin": float(right[1].mean()),
        **{f"{name}_accuracy": float(values.mean()) for name, values in by_image.items()},
        "nondigit_abstention": abstained / asked,
    }
    intervals = {
        "corruption_accuracy": mean_interval(right_share[0]),
        "corruption_accuracy_twin": mean_interval(right_share[1]),
        "corruption_gain": mean_interval(right_share[0] - right_share[1], least=-1.0),
        **{f"{name}_accuracy": mean_interval(values) for name, values in by_image.items()},
        "nondigit_abstention": wilson_interval(abstained, asked),
    }
    return Robustness(figures, intervals, corruptions, variants, nondigits, abstain_below, shown)


def _variants(images: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """Group, name and images of each variant."""
    for distance_px in (1, 2):
        for down, right in DIRECTIONS:
            words = [("up", "", "down")[down + 1], ("left", "", "right")[right + 1]]
            name = f"{distance_px} px {' and '.join(word for word in words if word)}"
            yield f"shift{distance_px}", name, shift(images, distance_px * down, distance_px * right)
    yield "thin", "thin strokes", thin(images)
    yield "thick", "thick strokes", thicken(images)


def _measure_variants(
    answer: Answer, answer_twin: Answer, split: Split
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The rows, and for each group the share of an image's variants that is read right, float (N,)."""
    unmoved = answer(split.images).argmax(axis=1)
    rows: list[dict[str, Any]] = []
    right: dict[str, list[np.ndarray]] = {}
    for group, name, images in _variants(split.images):
        read, read_twin = (ask(images).argmax(axis=1) for ask in (answer, answer_twin))
        right.setdefault(group, []).append(read == split.labels)
        shares = _shares(read == split.labels, read_twin == split.labels)
        rows.append({"group": group, "variant": name, **shares, "same_answer": float((read == unmoved).mean())})
    return rows, {group: np.mean(columns, axis=0) for group, columns in right.items()}


def _measure_nondigits(
    answer: Answer, abstain_below: float, count: int
) -> tuple[list[dict[str, Any]], dict[str, tuple[np.ndarray, np.ndarray]]]:
    rows, shown = [], {}
    for kind, images in draw_nondigits(count, _SEED).items():
        probabilities = answer(images)
        abstained = int((certainty(probabilities) < abstain_below).sum())
        low, high = wilson_interval(abstained, len(images))
        rows.append(
            {
                "kind": kind,
                "images": len(images),
                "abstained": abstained,
                "share": abstained / len(images),
                "share_low": low,
                "share_high": high,
                "median_confidence": float(np.median(probabilities.max(axis=1))),
            }
        )
        # Letters come in turn: the first are one of each.
        places = np.arange(16) if kind == "letters" else np.linspace(0, len(images) - 1, 16).astype(int)
        shown[kind] = images[places], probabilities[places]
    return rows, shown


def _shares(right: np.ndarray, right_twin: np.ndarray) -> dict[str, float]:
    row: dict[str, float] = {}
    for suffix, answers in (("", right), ("_twin", right_twin)):
        low, high = wilson_interval(int(answers.sum()), len(answers))
        row |= {
            f"accuracy{suffix}": float(answers.mean()),
            f"accuracy{suffix}_low": low,
            f"accuracy{suffix}_high": high,
        }
    return row
