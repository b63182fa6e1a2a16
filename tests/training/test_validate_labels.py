"""Each label is judged by the other images, and only by them."""

import numpy as np
import pytest

from training.validation import labels as labels_module
from training.validation.labels import DOUBTFUL, FEWEST_IMAGES, read_labels
from training.workspace import Split


@pytest.fixture(scope="module")
def some(real: dict[str, Split]) -> dict[str, Split]:
    return {name: Split(split.images[:2000], split.labels[:2000]) for name, split in real.items()}


def test_an_image_is_read_without_its_own_label(some: dict[str, Split]) -> None:
    """A label that is changed does not change how its own image is read, and is found."""
    clean = read_labels(some["train"], some["test"], 10)["train"]
    rows = np.flatnonzero((clean.likely == some["train"].labels) & (clean.doubt < -0.7))[:20]
    labels = some["train"].labels.copy()
    labels[rows[0]] = (labels[rows[0]] + 3) % 10
    again = read_labels(Split(some["train"].images, labels), some["test"], 10)["train"]
    assert again.likely[rows[0]] == some["train"].labels[rows[0]]
    assert again.doubt[rows[0]] > DOUBTFUL
    assert (again.doubt[rows[1:]] < 0).all()


def test_test_labels_have_no_part_in_the_reading(some: dict[str, Split]) -> None:
    """The test split stays sealed: nothing is fitted to it."""
    wrong = Split(some["test"].images, (some["test"].labels + 1) % 10)
    before, after = read_labels(some["train"], some["test"], 10), read_labels(some["train"], wrong, 10)
    for name in ("train", "test"):
        assert (before[name].likely == after[name].likely).all()
    assert (before["train"].doubt == after["train"].doubt).all()


@pytest.mark.parametrize("most", [400, 500, 700])
def test_any_number_of_fitted_images_fills_all_folds(
    some: dict[str, Split], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Every fifth image of many: spaced as the folds are, and still each fold has its share."""
    monkeypatch.setattr(labels_module, "FITTED_IMAGES", most)
    readings = read_labels(some["train"], some["test"], 10)
    for name in ("train", "test"):
        assert (readings[name].likely == some[name].labels).mean() > 0.7


def test_labels_that_are_no_digit_are_left_out(some: dict[str, Split]) -> None:
    labels = some["train"].labels.copy()
    labels[::3] = 77
    reading = read_labels(Split(some["train"].images, labels), some["test"], 10)["train"]
    assert (reading.doubt[::3] == 0).all()
    assert (reading.likely == some["train"].labels).mean() > 0.8


def test_of_too_few_images_nothing_is_said(some: dict[str, Split]) -> None:
    few = Split(some["train"].images[: FEWEST_IMAGES - 1], some["train"].labels[: FEWEST_IMAGES - 1])
    readings = read_labels(few, some["test"], 10)
    assert (readings["test"].likely == -1).all()
    assert (readings["train"].doubt == 0).all()
