"""The tables that the suites run on: a row an image for each split, and small ones of files, classes and drift."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from training.data import SPLITS
from training.params import FeatureBounds, FeatureName, Params
from training.validation.drift import compare
from training.validation.features import measure
from training.validation.labels import DOUBTFUL, Reading, read_labels
from training.workspace import Split

Frames = dict[str, pd.DataFrame]
AS_KNOWN = "as known"
"""The content of a file that has the SHA-256 it should have, or for which none is named."""


def build_frames(
    splits: Mapping[str, Split],
    raw_dir: Path,
    params: Params,
    advance: Callable[[int], None] = lambda _count: None,
) -> Frames:
    """The frames ``files``, ``train``, ``test``, ``classes`` and ``drift``.

    A split's rows hold, beside what ``features.measure`` gives: ``label``; ``same_as`` and ``same_as_train``, the first
    row with the very same pixels before it and in the training split (-1: none), and ``repeats`` and ``leaks``, 1 where
    there is one; ``odd``, 1 where a feature is outside its bounds for one image; ``likely``, the class that the other
    images speak for, and ``looks_like``, its name; ``contradicted`` and ``doubtful``, 1 where that is not the label,
    and clearly not.

    ``advance`` is told of images done, ``work(splits)`` in all.
    """
    classes, checks = params.data.classes, params.validate_
    readings = read_labels(splits["train"], splits["test"], len(classes), advance)
    frames: Frames = {"files": _files(splits, raw_dir, params)}
    for name in SPLITS:
        frame = measure(splits[name].images, advance)
        frame.insert(0, "label", splits[name].labels)
        frames[name] = frame.assign(
            odd=_outside(frame, checks.features), **_read_columns(readings[name], splits[name].labels, classes)
        )
    _find_repeats(frames)
    frames["classes"] = _classes(splits, classes)
    frames["drift"] = compare(frames["train"], frames["test"], classes)
    return frames


def work(splits: Mapping[str, Split]) -> int:
    """How much ``build_frames`` tells ``advance`` of in all: each image is read once and measured once."""
    return 2 * sum(len(split.labels) for split in splits.values())


def _read_columns(reading: Reading, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {
        "likely": reading.likely,
        "looks_like": np.array([*classes, ""], object)[reading.likely],  # the last where nothing can be said: -1
        "contradicted": ((reading.likely >= 0) & (reading.likely != labels)).astype(np.int64),
        "doubtful": (reading.doubt > DOUBTFUL).astype(np.int64),
    }


def _outside(frame: pd.DataFrame, bounds: Mapping[FeatureName, FeatureBounds]) -> np.ndarray:
    outside = np.zeros(len(frame), bool)
    for feature, bound in bounds.items():
        if bound.image is not None:
            outside |= ~frame[feature].between(*bound.image).to_numpy()
    return outside.astype(np.int64)


def _find_repeats(frames: Frames) -> None:
    known, first_rows = np.unique(frames["train"]["content"], return_index=True)
    for name in SPLITS:
        content = frames[name].pop("content").to_numpy()
        rows = np.arange(len(content))
        _, first, inverse = np.unique(content, return_index=True, return_inverse=True)
        earlier = first[inverse]
        frames[name]["same_as"] = np.where(earlier < rows, earlier, -1)
        in_train = np.full(len(content), -1)
        if name != "train" and len(known):
            place = np.minimum(np.searchsorted(known, content), len(known) - 1)
            in_train = np.where(known[place] == content, first_rows[place], -1)
        frames[name]["same_as_train"] = in_train
        frames[name]["repeats"] = (frames[name]["same_as"] >= 0).astype(np.int64)
        frames[name]["leaks"] = (in_train >= 0).astype(np.int64)


def _classes(splits: Mapping[str, Split], classes: tuple[str, ...]) -> pd.DataFrame:
    rows = []
    for name in SPLITS:
        labels = splits[name].labels
        for label, class_name in enumerate(classes):
            count = int((labels == label).sum())
            rows.append(
                {
                    "name": f"{name} class {class_name}",
                    "split": name,
                    "label": label,
                    "images": count,
                    "share": count / max(1, len(labels)),
                }
            )
    return pd.DataFrame(rows)


def _files(splits: Mapping[str, Split], raw_dir: Path, params: Params) -> pd.DataFrame:
    """A row for each IDX file, or for each split's folder and each picture whose SHA-256 is named."""
    sha256 = params.validate_.sha256
    if params.data.format == "folder":
        arrays: dict[str, np.ndarray | None] = {name: splits[name].images for name in SPLITS}
        arrays |= dict.fromkeys(sha256)
    else:
        arrays = {
            f"{prefix}-{kind}-ubyte": array
            for name, prefix in (("train", "train"), ("test", "t10k"))
            for kind, array in (("images-idx3", splits[name].images), ("labels-idx1", splits[name].labels))
        }
    rows = []
    for name, array in arrays.items():
        height, width = array.shape[1:] if array is not None and array.ndim == 3 else (None, None)
        content = _compare_sha256(raw_dir / name, sha256.get(name))
        rows.append({"name": name, "content": content, "height": height, "width": width})
    return pd.DataFrame(rows)


def _compare_sha256(path: Path, known: str | None) -> str:
    if known is None:
        return AS_KNOWN
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return AS_KNOWN if found == known else f"SHA-256 {found[:12]}… instead of {known[:12]}…"
