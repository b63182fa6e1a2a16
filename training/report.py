"""One page that shows how good the candidate is: self-contained, so that it can be mailed or kept beside the model."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from training.looks import Look
from training.robustness.measure import Robustness
from training.robustness.nondigits import LETTERS
from training.workspace import Split, whole_file

MOST_MISTAKES = 400
"""A candidate that misreads thousands is judged by its figures; the page stays small enough to open."""

_PICTURES = (
    ("confusion.png", "Which class is taken for which: true classes in rows, answers in columns"),
    ("reliability.png", "How often answers are right, over how sure they are"),
    ("selective.png", "What remains wrong when the least sure answers are not used"),
)


@dataclass(frozen=True)
class Findings:
    """All that the evaluation found."""

    metrics: dict[str, Any]
    """As in metrics.json."""
    classes: list[dict[str, Any]]
    """A row a class, as in classes.csv."""
    macro: dict[str, tuple[float, float]]
    """Intervals of the macro figures."""
    names: tuple[str, ...]
    """What the classes are called."""
    test: Split
    probabilities: np.ndarray
    """The answers, float (N, classes)."""
    robustness: Robustness
    look: Look
    seeds: dict[int, float]
    """Accuracy of each seed of this recipe that was measured on this test split so far."""
    calibrated_ece: tuple[float, float]
    """Mean and 95 % quantile of the calibration error if all confidences were true."""
    training: dict[str, Any]
    """As in training.json."""
    twin_training: dict[str, Any]
    """As in twin.json."""


def write_report(out: Path, findings: Findings) -> None:
    """Write ``report.html`` into the evaluate stage's folder ``out``, where the pictures are already."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        metrics=findings.metrics,
        classes=findings.classes,
        macro=findings.macro,
        pictures=[(_data_uri((out / name).read_bytes()), text) for name, text in _PICTURES],
        mistakes=_mistakes(findings.test, findings.probabilities, findings.names),
        intervals=findings.robustness.intervals,
        corruptions=_by_corruption(findings.robustness.corruptions),
        variants=_by_group(findings.robustness.variants),
        nondigits=findings.robustness.nondigits,
        letters=" ".join(LETTERS),
        robustness_pictures={
            name: _data_uri((out / f"{name}.png").read_bytes())
            for name in ("corruptions", "corruption_samples", "nondigits")
        },
        look=findings.look,
        seeds=findings.seeds,
        spread=float(np.std(list(findings.seeds.values()), ddof=1)) if len(findings.seeds) > 1 else None,
        calibrated_ece=findings.calibrated_ece,
        training=findings.training,
        twin=findings.twin_training,
    )
    with whole_file(out / "report.html") as part:
        part.write_text(page, encoding="utf-8")


def _by_corruption(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each corruption, by strength."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["corruption"].replace("_", " "), []).append(row)
    return kinds


def _by_group(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the variants of a group, and the accuracy of the worst of them."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return {
        group: {
            "variants": len(members),
            "least": min(row["accuracy"] for row in members),
            **{name: float(np.mean([row[name] for row in members])) for name in ("same_answer", "accuracy_twin")},
        }
        for group, members in groups.items()
    }


def _mistakes(test: Split, probabilities: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The misread images, the surest first: picture, truth, and the classes thought of, each with its probability."""
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != test.labels)
    wrong = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:MOST_MISTAKES]
    return [
        {
            "index": int(index),
            "picture": _data_uri(_png(255 - test.images[index])),
            "truth": names[test.labels[index]],
            "thoughts": [
                (names[label], float(probabilities[index, label])) for label in np.argsort(-probabilities[index])[:3]
            ],
        }
        for index in wrong
    ]


def _png(image_u8: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_u8).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
