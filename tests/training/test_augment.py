"""Deformed digits stay digits, and the same seed draws the same ones."""

from typing import Any

import numpy as np

from training.params import AugmentParams
from training.workspace import Split

OFF = dict.fromkeys(AugmentParams.model_fields, 0.0) | {"elastic_sigma_px": 5.0}


def augment(images: np.ndarray, seed: int = 1, **strengths: float) -> np.ndarray:
    import tensorflow as tf

    from training.augment import build_augment

    drawn: Any = build_augment(AugmentParams(**{**OFF, **strengths}))(tf.constant(images), tf.constant([seed, 2]))
    return drawn.numpy()


def test_no_strength_changes_nothing(real: dict[str, Split]) -> None:
    images = real["train"].images[:50]
    assert np.array_equal(augment(images), images.astype(np.float32))
    assert np.abs(augment(images, elastic_px=1e-9) - images).max() < 0.01


def test_images_keep_their_range_and_about_their_ink(real: dict[str, Split]) -> None:
    images = real["train"].images[:2000]
    drawn = augment(images, rotation_rad=0.2, scale=0.12, shear=0.12, shift_px=1.5, elastic_px=0.7)
    assert drawn.dtype == np.float32
    assert drawn.shape == images.shape
    assert drawn.min() >= 0.0
    assert drawn.max() <= 255.001
    assert abs(drawn.mean() / images.mean() - 1) < 0.05
    assert np.abs(drawn - images).mean() > 5  # and yet they are others


def test_the_same_seed_draws_the_same_images(real: dict[str, Split]) -> None:
    images = real["train"].images[:20]
    first, again, other = (augment(images, seed, rotation_rad=0.3, elastic_px=1.0) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_part_of_a_batch_is_drawn_as_in_the_whole(real: dict[str, Split]) -> None:
    """So that several workers learn from the very images that one would."""
    import tensorflow as tf

    from training.augment import build_augment

    images, seed = real["train"].images[:30], tf.constant([1, 2])
    strengths = {"rotation_rad": 0.3, "shift_px": 1.0, "elastic_px": 1.0, "pen": 0.5}
    deform = build_augment(AugmentParams(**{**OFF, **strengths}))
    whole = deform(tf.constant(images), seed).numpy()
    part = deform(tf.constant(images[10:20]), seed, 10, 30).numpy()
    assert np.abs(part - whole[10:20]).max() < 1e-3


def test_a_shift_moves_the_digit_by_at_most_that_much(real: dict[str, Split]) -> None:
    """The centre of ink moves by up to 2 pixels along each axis, and not by more."""
    images = real["train"].images[:500]
    rows, columns = np.mgrid[0:28, 0:28]

    def centres(pictures: np.ndarray) -> np.ndarray:
        ink = pictures.astype(float)
        weights = ink.sum(axis=(1, 2))
        return np.stack([(ink * axis).sum(axis=(1, 2)) / weights for axis in (rows, columns)], axis=1)

    moved = np.abs(centres(augment(images, shift_px=2.0)) - centres(images))
    assert 1.5 < moved.max() < 2.05


def test_the_elastic_field_is_as_strong_as_asked() -> None:
    """A picture whose value is its row: bilinear reading shows the displacement itself."""
    ramp = np.broadcast_to(np.arange(28, dtype=np.uint8)[:, None] * 9, (400, 28, 28))
    moved = (augment(ramp, elastic_px=0.7) - ramp)[:, 6:22, 6:22] / 9
    assert abs(moved.std() - 0.7) < 0.1
    assert abs(moved.mean()) < 0.1


def test_a_pen_draws_strokes_thicker_or_thinner_and_no_two_alike(real: dict[str, Split]) -> None:
    """A pixel lies between the lightest and the darkest of it and its neighbours; some gain ink, some lose it."""
    from scipy import ndimage

    images = real["train"].images[:200]
    drawn = augment(images, pen=0.6)
    cross = ndimage.generate_binary_structure(2, 1)[None]
    assert (drawn <= ndimage.grey_dilation(images, footprint=cross, mode="constant") + 1e-3).all()
    assert (drawn >= ndimage.grey_erosion(images, footprint=cross, mode="constant") - 1e-3).all()
    ink = drawn.mean(axis=(1, 2)) / images.mean(axis=(1, 2))
    assert 1.2 < ink.max() < 2.0
    assert 0.4 < ink.min() < 0.8
    assert abs(np.mean(ink > 1) - 0.5) < 0.15
    assert len(np.unique(ink.round(3))) > 100


def beside(images: np.ndarray, others: np.ndarray, share: float, seed: int = 1, **part: int) -> np.ndarray:
    import tensorflow as tf

    from training.augment import add_neighbours

    added: Any = add_neighbours(
        tf.constant(images, tf.float32), tf.constant(others), share, tf.constant([seed, 2]), **part
    )
    return added.numpy()


def test_a_neighbour_comes_in_from_any_side_and_not_too_far(real: dict[str, Split]) -> None:
    """Each image is itself with a neighbour over it that stands 16 to 20 pixels away, or alone; its middle stays."""
    images, others = real["train"].images[:200], real["train"].images[200:400]
    added = beside(images, others, 0.5)
    sides: set[tuple[int, int]] = set()
    alone = 0
    for image, other, seen in zip(images, others, added, strict=True):
        found = {(0, 0)} if np.array_equal(seen, image) else set()
        for away in range(16, 21):
            for side in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                moved = np.zeros((84, 84), np.uint8)
                top, left = 28 + away * side[0], 28 + away * side[1]
                moved[top : top + 28, left : left + 28] = other
                if np.array_equal(seen, np.maximum(image, moved[28:56, 28:56])):
                    found.add(side)
        assert found
        alone += (0, 0) in found
        sides |= found
    assert len(sides) == 5
    assert 60 < alone < 160  # half of them, and those whose neighbour has no ink at that edge
    assert np.array_equal(added[:, 12:16, 12:16], images[:, 12:16, 12:16])


def test_the_share_of_images_with_a_neighbour_is_as_asked() -> None:
    paper, ink = np.zeros((2000, 28, 28), np.uint8), np.full((2000, 28, 28), 255, np.uint8)
    for share in (0.0, 0.16, 1.0):
        with_ink = beside(paper, ink, share).any(axis=(1, 2)).mean()
        assert abs(with_ink - share) < 0.03


def test_neighbours_of_a_part_of_a_batch_are_those_of_the_whole(real: dict[str, Split]) -> None:
    images, others = real["train"].images[:30], real["train"].images[30:60]
    whole, part = beside(images, others, 0.5), beside(images[10:20], others[10:20], 0.5, first=10, of=30)
    assert np.array_equal(part, whole[10:20])
    assert not np.array_equal(whole, beside(images, others, 0.5, seed=3))
