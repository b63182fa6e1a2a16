"""One page that shows how good the candidate is: self-contained, so that it can be mailed or kept beside the model."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from training.workspace import Split, whole_file

MOST_MISTAKES = 400
"""A candidate that misreads thousands is judged by its figures; the page stays small enough to open."""

_PICTURES = (
    ("confusion.png", "Which class is taken for which: true classes in rows, answers in columns"),
    ("reliability.png", "How often answers are right, over how sure they are"),
    ("selective.png", "What remains wrong when the least sure answers are not used"),
)


def write_report(
    out: Path,
    metrics: dict[str, Any],
    classes: list[dict[str, Any]],
    names: tuple[str, ...],
    test: Split,
    probabilities: np.ndarray,
) -> None:
    """Write ``report.html`` into the evaluate stage's folder, from its figures and pictures.

    Args:
        out: the folder; the pictures are there already.
        metrics: as in metrics.json.
        classes: a row a class, as in classes.csv.
        names: what the C classes are called.
        test: the images (N, 28, 28) and their classes.
        probabilities: the answers, float (N, C).
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        metrics=metrics,
        classes=classes,
        pictures=[(_data_uri((out / name).read_bytes()), text) for name, text in _PICTURES],
        mistakes=_mistakes(test, probabilities, names),
    )
    with whole_file(out / "report.html") as part:
        part.write_text(page, encoding="utf-8")


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
