"""Each kind of damage, done to real MNIST, leads to what docs/data-quality.md says.

To 12,000 and 4,000 of its images drawn at random; with ``--slow``, to all.
"""

import csv
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.training.conftest import ROOT, make_workspace, write_raw
from training.data import BadRawData
from training.params import Params, load_params
from training.validate import DataNotValid, validate
from training.validation.expectations import Results, run_suites
from training.validation.frames import Frames, build_frames
from training.validation.quarantine import list_offences
from training.workspace import Split

Both = tuple[Split, Split]


def some_rows(split: Split, share: float) -> np.ndarray:
    return np.random.default_rng(1).choice(len(split.labels), int(len(split.labels) * share), replace=False)


def flip(split: Split, share: float) -> Split:
    rows, labels = some_rows(split, share), split.labels.copy()
    labels[rows] = (labels[rows] + np.random.default_rng(2).integers(1, 10, len(rows))) % 10
    return Split(split.images, labels)


def change(split: Split, share: float, how: Callable[[np.ndarray], np.ndarray]) -> Split:
    rows, images = some_rows(split, share), split.images.copy()
    images[rows] = how(images[rows])
    return Split(images, split.labels)


def invert(images: np.ndarray) -> np.ndarray:
    return 255 - images


def transpose(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 1)


def mirror(images: np.ndarray) -> np.ndarray:
    return images[:, :, ::-1]


def through_nan(images: np.ndarray) -> np.ndarray:
    """What careless code makes of an image divided by its own zeros."""
    with np.errstate(invalid="ignore"):
        return (images.astype(np.float32) * np.nan).astype(np.uint8)


def put(into: Split, at: slice, rows_of: Split, rows: slice) -> Split:
    images, labels = into.images.copy(), into.labels.copy()
    images[at], labels[at] = rows_of.images[rows], rows_of.labels[rows]
    return Split(images, labels)


POISONS: dict[str, Callable[[Split, Split], Both]] = {
    "nothing": lambda train, test: (train, test),
    "1 % of training labels flipped": lambda train, test: (flip(train, 0.01), test),
    "10 % of training labels flipped": lambda train, test: (flip(train, 0.10), test),
    "1 % of test labels flipped": lambda train, test: (train, flip(test, 0.01)),
    "labels one place further than their images": lambda train, test: (
        Split(train.images, np.roll(train.labels, 1)),
        Split(test.images, np.roll(test.labels, 1)),
    ),
    "training and test files swapped": lambda train, test: (test, train),
    "all images inverted": lambda train, test: (change(train, 1, invert), change(test, 1, invert)),
    "1 % of training images inverted": lambda train, test: (change(train, 0.01, invert), test),
    "all images transposed": lambda train, test: (change(train, 1, transpose), change(test, 1, transpose)),
    "test images transposed": lambda train, test: (train, change(test, 1, transpose)),
    "1 % of training images transposed": lambda train, test: (change(train, 0.01, transpose), test),
    "test images mirrored": lambda train, test: (train, change(test, 1, mirror)),
    "NaN in the pixels, turned into bytes": lambda train, test: (change(train, 0.001, through_nan), test),
    "100 test rows copied into train": lambda train, test: (put(train, slice(100), test, slice(100)), test),
    "100 training rows repeated": lambda train, test: (put(train, slice(100), train, slice(100, 200)), test),
    "a training row and a test row exchanged, 1,000 times": lambda train, test: (
        put(train, slice(1000), test, slice(1000)),
        put(test, slice(1000), train, slice(1000)),
    ),
}


def documented() -> dict[str, tuple[str, set[tuple[str, str]]]]:
    """Damage -> outcome, and the suite and column that see it; ``rows`` stands for expectations about the row count."""
    section = (ROOT / "docs" / "data-quality.md").read_text().split("## What each kind of damage leads to")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| ")][2:]
    table = {}
    for line in lines:
        damage, outcome, seen = (cell.strip() for cell in line.strip("|").split("|"))
        table[damage] = (outcome, set(re.findall(r"(\w+) `(\w+)`", seen)))
    return table


@pytest.fixture(scope="module")
def mnist(real: dict[str, Split], pytestconfig: pytest.Config) -> tuple[dict[str, Split], Params]:
    clean = (
        real
        if pytestconfig.getoption("--slow")
        else {"train": draw(real["train"], 12_000), "test": draw(real["test"], 4_000)}
    )
    counts = {f"{name}_images": len(split.labels) for name, split in clean.items()}
    params = load_params(ROOT / "params.yaml")
    return clean, params.model_copy(update={"validate_": params.validate_.model_copy(update={"sha256": {}, **counts})})


def draw(split: Split, count: int) -> Split:
    rows = np.sort(np.random.default_rng(0).choice(len(split.labels), count, replace=False))
    return Split(split.images[rows], split.labels[rows])


def look_at(mnist: tuple[dict[str, Split], Params], poison: str) -> tuple[dict[str, Split], Frames, Results]:
    clean, params = mnist
    train, test = POISONS[poison](clean["train"], clean["test"])
    splits = {"train": train, "test": test}
    frames = build_frames(splits, Path(), params)
    return splits, frames, run_suites(frames, params)


def test_every_damage_that_is_documented_is_tried() -> None:
    assert list(documented()) == list(POISONS)


@pytest.mark.parametrize("poison", POISONS)
def test_damage_leads_to_what_is_documented(mnist: tuple[dict[str, Split], Params], poison: str) -> None:
    outcome, seen_by = documented()[poison]
    _, _, results = look_at(mnist, poison)
    failed = {(f.about, f.column or "rows") for f in results.failed}
    assert results.verdict == outcome
    assert seen_by <= failed
    if outcome == "stopped":
        stopping = {(f.about, f.column or "rows") for f in results.failed if f.severity == "stop"}
        assert seen_by & stopping


def test_flipped_labels_are_listed_with_what_they_look_like(mnist: tuple[dict[str, Split], Params]) -> None:
    """Most of the flipped rows are in the quarantine, most rows there are flipped, and the right digit is named."""
    clean, _ = mnist
    splits, frames, results = look_at(mnist, "1 % of training labels flipped")
    listed = list_offences(frames, results.offences)
    train = listed[listed["split"] == "train"]
    flipped = np.flatnonzero(splits["train"].labels != clean["train"].labels)
    found = train[train["row"].isin(flipped)]
    assert len(found) / len(flipped) > 0.75
    assert len(found) / len(train) > 0.65
    named_right = [
        f"looks like {clean['train'].labels[row]}" in why for row, why in zip(found.row, found.reasons, strict=True)
    ]
    assert np.mean(named_right) > 0.95


def test_a_file_of_floats_that_may_hold_nan_is_refused(tmp_path: Path, real: dict[str, Split], quiet: Console) -> None:
    workspace, params = make_workspace(tmp_path, real)
    pixels = np.full((1500, 28, 28), np.nan, ">f4")
    header = struct.pack(">4I", 0x0D03, *pixels.shape)
    (workspace.raw_dir / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    with pytest.raises(BadRawData, match="0x00000d03"):
        validate(workspace, params, quiet)


def test_all_rows_that_offend_are_listed_and_some_drawn(tmp_path: Path, real: dict[str, Split], quiet: Console) -> None:
    """Inverted images: each is in the quarantine, and the contact sheet stays a page."""
    workspace, params = make_workspace(tmp_path, real)
    train = change(Split(real["train"].images[:1500], real["train"].labels[:1500]), 0.5, invert)
    write_raw(workspace.raw_dir, train, Split(real["test"].images[:300], real["test"].labels[:300]))
    with pytest.raises(DataNotValid, match="expectations about the raw data failed"):
        validate(workspace, params, quiet)
    with (tmp_path / "artifacts/validate/quarantine.csv").open(newline="") as file:
        rows = {int(q["row"]) for q in csv.DictReader(file) if q["split"] == "train" and "border_ink" in q["reasons"]}
    assert rows == set(some_rows(train, 0.5).tolist())
    with Image.open(tmp_path / "artifacts/validate/contact_sheet.png") as sheet:
        assert sheet.width < 2000
        assert sheet.height < 2500
