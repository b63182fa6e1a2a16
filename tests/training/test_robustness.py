"""Damaged, moved and drawn images are what they are said to be, and the figures about them are right."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from training.robustness.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from training.robustness.measure import evenly_spaced, measure_robustness
from training.robustness.nondigits import LETTERS, draw_nondigits
from training.robustness.variants import DIRECTIONS, shift, thicken, thin
from training.workspace import Split

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def images(real: dict[str, Split]) -> np.ndarray:
    return real["test"].images[:200]


def centre_of_ink(images: np.ndarray) -> np.ndarray:
    """(N, 2): rows down, columns to the right."""
    ink = images.astype(float)
    rows, columns = np.mgrid[0:28, 0:28]
    mass = ink.sum(axis=(1, 2))
    return np.stack([(ink * axis).sum(axis=(1, 2)) / mass for axis in (rows, columns)], axis=1)


def test_there_are_fifteen_corruptions_at_five_strengths() -> None:
    assert set(CORRUPTIONS) == {
        "noise", "blur", "shear", "rotation", "scale", "translation", "brightness", "stripe", "fog", "dotted_line",
        "zigzag", "spatter", "edges", "shot", "impulse",
    }  # fmt: skip
    assert STRENGTHS == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_repeats_with_its_seed_and_grows_with_its_strength(kind: str, images: np.ndarray) -> None:
    """Bytes in and out, the input untouched; with each strength the images differ more from the originals."""
    before = images.copy()
    damaged = [corrupt(images, kind, strength, seed=3) for strength in STRENGTHS]
    assert np.array_equal(images, before)
    assert all(one.dtype == np.uint8 and one.shape == images.shape for one in damaged)
    assert np.array_equal(damaged[2], corrupt(images, kind, 3, seed=3))
    differences = [np.abs(one.astype(float) - images).mean() for one in damaged]
    assert differences[0] > 0.3
    assert all(np.diff(differences) > 0)


@pytest.mark.parametrize("kind", ["noise", "shot", "impulse", "rotation", "translation", "zigzag", "fog"])
def test_what_is_drawn_by_chance_differs_between_seeds_and_images(kind: str, images: np.ndarray) -> None:
    assert not np.array_equal(corrupt(images, kind, 3, seed=3), corrupt(images, kind, 3, seed=4))
    twice = corrupt(np.stack([images[0]] * 8), kind, 3, seed=3)
    assert len(np.unique(twice.reshape(8, -1), axis=0)) > 1


def test_a_rotation_turns_by_its_angle_and_a_translation_moves_by_its_distance() -> None:
    """A bar from the middle to the right: its end is where 30 degrees put it, up or down; a dot is 3 pixels away."""
    bar = np.zeros((40, 28, 28), np.uint8)
    bar[:, 13:15, 14:24] = 255
    down, right = (centre_of_ink(corrupt(bar, "rotation", 3, seed=1)) - 13.5).T
    assert np.degrees(np.arctan2(np.abs(down), right)) == pytest.approx(30, abs=1.5)
    assert {-1.0, 1.0} == set(np.sign(down))
    moved = centre_of_ink(corrupt(bar, "translation", 2, seed=1)) - centre_of_ink(bar)
    assert np.hypot(*moved.T) == pytest.approx(3, abs=0.05)


def test_edges_are_an_outline_with_paper_inside() -> None:
    square = np.zeros((1, 28, 28), np.uint8)
    square[0, 7:21, 7:21] = 255
    (outline,) = corrupt(square, "edges", 5, seed=1)
    assert set(np.unique(outline)) == {0, 255}
    assert not outline[10:18, 10:18].any()
    assert all(part.any() for part in (outline[14, :11], outline[14, 17:], outline[:11, 14], outline[17:, 14]))


def test_a_shift_moves_every_pixel_and_brings_in_paper(images: np.ndarray) -> None:
    assert len(set(DIRECTIONS)) == 8
    for down, right in DIRECTIONS:
        moved = shift(images, 2 * down, 2 * right)
        edge = [moved[:, 0 if down > 0 else 27, :]] * abs(down) + [moved[:, :, 0 if right > 0 else 27]] * abs(right)
        assert not any(line.any() for line in edge)
        rows, columns = slice(2 + 2 * down, 26 + 2 * down), slice(2 + 2 * right, 26 + 2 * right)
        assert np.array_equal(moved[:, rows, columns], images[:, 2:26, 2:26])


def test_thin_strokes_have_less_ink_and_thick_ones_more(images: np.ndarray) -> None:
    assert (thin(images) <= images).all()
    assert (thicken(images) >= images).all()
    ink = images.sum(dtype=float)
    assert 0.3 < thin(images).sum() / ink < 0.8
    assert 1.3 < thicken(images).sum() / ink < 2.5


def test_non_digits_are_in_the_place_and_of_the_size_of_digits() -> None:
    """Letters fill 20 pixels around the centre of mass, as the data set's digits do; no two are the same."""
    drawn = draw_nondigits(64, seed=2)
    assert [len(images) for images in drawn.values()] == [64, 64, 64, 64]
    letters = drawn["letters"]
    assert centre_of_ink(letters) == pytest.approx(14.0, abs=0.25)
    rows, columns = (letters.max(axis=axis) > 0 for axis in (2, 1))
    assert np.maximum(rows.sum(axis=1), columns.sum(axis=1)) == pytest.approx(20, abs=2)
    assert len(np.unique(letters.reshape(64, -1), axis=0)) == 64
    blank = drawn["blank"].reshape(64, -1)
    assert (blank == blank[:, :1]).all()
    assert blank[[0, -1], 0].tolist() == [0, 255]
    assert not set(LETTERS) & set("BDGIJLOQSUYZbgiloqsyz")


def test_a_sample_is_spread_over_the_whole_split() -> None:
    split = Split(np.arange(10).repeat(784).reshape(10, 28, 28), np.arange(10))
    assert evenly_spaced(split, 4).labels.tolist() == [0, 2, 5, 7]
    assert evenly_spaced(split, 99).labels.tolist() == list(range(10))


def always(digit: int, confidence: float) -> Callable[[np.ndarray], np.ndarray]:
    row = np.full(10, (1 - confidence) / 9)
    row[digit] = confidence
    return lambda images: np.tile(row, (len(images), 1))


def test_figures_of_networks_that_always_say_the_same(images: np.ndarray) -> None:
    """Three of four images are ones: the candidate says 1, its twin 2, both whatever they see, 60 % sure."""
    split = Split(images[:20], np.tile([1, 1, 1, 2], 5))
    found = measure_robustness(always(1, 0.6), always(2, 0.6), split, 0.9, 16, QUIET)
    assert found.figures == {
        "robustness_images": 20,
        "corruption_accuracy": 0.75,
        "corruption_accuracy_twin": 0.25,
        "shift1_accuracy": 0.75,
        "shift2_accuracy": 0.75,
        "thin_accuracy": 0.75,
        "thick_accuracy": 0.75,
        "nondigit_abstention": 1.0,
    }
    low, high = found.intervals["corruption_gain"]
    # The difference is +1 or -1: its mean is 0.5, its deviation over 20 images 0.889, 1.96 of that over the root of 20.
    assert (low, high) == pytest.approx((0.5 - 0.389, 0.5 + 0.389), abs=1e-3)
    assert len(found.corruptions) == 75
    assert [row["variant"] for row in found.variants[:2]] == ["1 px up and left", "1 px up"]
    assert len(found.variants) == 18
    assert all(row["same_answer"] == 1.0 for row in found.variants)
    sure = measure_robustness(always(1, 0.8), always(2, 0.8), split, 0.9, 16, QUIET)
    assert sure.figures["nondigit_abstention"] == 0.0
