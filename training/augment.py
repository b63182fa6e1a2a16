"""Deformed copies of digits, drawn inside the training graph: one affine map, one elastic field and one pen an image.

To some of them comes a neighbour: the edge of another digit, as where digits are cut out of a number.

After Simard, Steinkraus and Platt, "Best practices for convolutional neural networks applied to visual document
analysis" (ICDAR 2003). The elastic field is a sum of Gaussian bumps on a coarse grid, which has the same statistics as
blurred per-pixel noise but needs a tenth of the random numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from digits.contract import IMAGE_BYTES, IMAGE_HEIGHT, IMAGE_WIDTH
from training.params import AugmentParams

_NODE_STEP_PX = 4.0
_NEIGHBOUR_PX = 16, 20
"""From an image's middle to its neighbour's, at least and at most: about as close as written digits stand."""


def build_augment(params: AugmentParams) -> Callable[..., Any]:
    """Make ``augment(images_u8 (N, 28, 28), seed int32 (2,)) -> float32 (N, 28, 28) in 0..255``.

    The same seed gives the same images. With every strength at 0 it only casts. ``augment(images_u8, seed, first, of)``
    deforms N images as the images from ``first`` on of a batch of ``of`` would be.
    """
    if params.is_off:
        return lambda images_u8, *_: tf.cast(images_u8, tf.float32)

    basis = tf.constant(_elastic_basis(params.elastic_sigma_px) * np.sqrt(params.elastic_px), tf.float32)  # (28, K)
    rows, columns = np.mgrid[0:IMAGE_HEIGHT, 0:IMAGE_WIDTH].astype(np.float32)
    centre_y, centre_x = (IMAGE_HEIGHT - 1) / 2, (IMAGE_WIDTH - 1) / 2
    grid_y = tf.constant(rows.reshape(1, -1) - centre_y)  # (1, 784)
    grid_x = tf.constant(columns.reshape(1, -1) - centre_x)

    def augment(images_u8: Any, seed: Any, first: int = 0, of: int | None = None) -> Any:
        count = tf.shape(images_u8)[0]
        drawn = count if of is None else of
        seeds = tf.random.experimental.stateless_split(seed, 2)

        draw = tf.random.stateless_uniform((6, drawn, 1), seeds[0], -1.0, 1.0)[:, first : first + count]
        turn = draw[0] * params.rotation_rad  # (N, 1)
        scale_x = 1.0 / (1.0 + draw[1] * params.scale)
        scale_y = 1.0 / (1.0 + draw[2] * params.scale)
        shear = draw[3] * params.shear
        cos, sin = tf.cos(turn), tf.sin(turn)
        # Where in the source does each output pixel come from?
        source_x = scale_x * (cos * grid_x + (shear - sin) * grid_y) + (
            centre_x + draw[4] * params.shift_px
        )  # (N, 784)
        source_y = scale_y * (sin * grid_x + cos * grid_y) + (centre_y + draw[5] * params.shift_px)

        if params.elastic_px > 0:
            noise = tf.random.stateless_normal((2, drawn, basis.shape[1], basis.shape[1]), seeds[1])
            noise = noise[:, first : first + count]
            field = tf.einsum("yk,cnkl,xl->cnyx", basis, noise, basis)  # (2, N, 28, 28)
            field = tf.reshape(field, (2, count, IMAGE_BYTES))
            source_x += field[0]
            source_y += field[1]
        deformed = _sample(images_u8, source_y, source_x)
        if params.pen > 0:
            pen_seed = tf.random.experimental.stateless_fold_in(seed, 2)
            pen = tf.random.stateless_uniform((drawn, 1, 1), pen_seed, -params.pen, params.pen)
            deformed = _thicken(deformed, pen[first : first + count])
        return deformed

    return augment


def add_neighbours(images: Any, others_u8: Any, share: float, seed: Any, first: int = 0, of: int | None = None) -> Any:
    """Let the edge of another image come into some images, from the left, the right, above or below.

    Args:
        images: float32 (N, 28, 28).
        others_u8: a neighbour for each, uint8 (N, 28, 28).
        share: of the images that get it, 0 to 1, by chance.
        seed: int32 (2,); the same seed chooses the same images, sides and distances.
        first: with ``of``: N images are treated as those from ``first`` on of a batch of ``of`` would be.
        of: how many images the batch has; None for N.

    Returns:
        float32 (N, 28, 28): of image and neighbour the darker, at each pixel.
    """
    count = tf.shape(images)[0]
    draw = tf.random.stateless_uniform((4, count if of is None else of), seed)[:, first : first + count]
    nearest, furthest = _NEIGHBOUR_PX
    away = nearest + tf.cast(draw[0] * (furthest - nearest + 1), tf.int32)
    away *= tf.where(draw[1] < 0.5, -1, 1)
    upright = draw[2] < 0.5
    down, right = tf.where(upright, away, 0)[:, None], tf.where(upright, 0, away)[:, None]

    rows, columns = np.mgrid[0:IMAGE_HEIGHT, 0:IMAGE_WIDTH].reshape(2, 1, -1).astype(np.int32)
    row, column = rows - down, columns - right  # (N, 784)
    inside = (row >= 0) & (row < IMAGE_HEIGHT) & (column >= 0) & (column < IMAGE_WIDTH)
    inside &= (draw[3] < share)[:, None]
    flat = tf.pad(tf.reshape(others_u8, (count, IMAGE_BYTES)), ((0, 0), (0, 1)))  # the place after the last is paper
    edges = tf.gather(flat, tf.where(inside, row * IMAGE_WIDTH + column, IMAGE_BYTES), batch_dims=1)
    return tf.maximum(images, tf.cast(tf.reshape(edges, tf.shape(images)), tf.float32))


def _thicken(images: Any, share: Any) -> Any:
    """Bring images (N, 28, 28) a ``share`` (N, 1, 1) of the way to the darkest neighbour, below 0 to the lightest.

    Neighbours of a pixel are itself and the four beside it.
    """
    padded = tf.pad(images, ((0, 0), (1, 1), (1, 1)))
    darkest = lightest = images
    for beside in (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]):
        darkest, lightest = tf.maximum(darkest, beside), tf.minimum(lightest, beside)
    return images + tf.maximum(share, 0.0) * (darkest - images) + tf.minimum(share, 0.0) * (images - lightest)


def _elastic_basis(sigma_px: float) -> np.ndarray:
    """Gaussian bumps along one axis, (28, K), such that noise of variance 1 on them gives variance 1 in the middle."""
    reach = 2 * sigma_px
    nodes = np.arange(-reach, IMAGE_HEIGHT - 1 + reach + 1e-6, _NODE_STEP_PX)
    pixels = np.arange(IMAGE_HEIGHT)
    bumps = np.exp(-0.5 * ((pixels[:, None] - nodes[None, :]) / sigma_px) ** 2)
    return bumps / np.sqrt((bumps**2).sum(axis=1).mean())


def _sample(images_u8: Any, source_y: Any, source_x: Any) -> Any:
    """Read images (N, 28, 28) at fractional places (N, 784), bilinearly; paper (0) outside.

    The four neighbours of a pixel are packed into one 32-bit word first: one gather instead of four.
    """
    count = tf.shape(images_u8)[0]
    wide, high = IMAGE_WIDTH + 2, IMAGE_HEIGHT + 2
    padded = tf.cast(tf.pad(images_u8, ((0, 0), (1, 2), (1, 2))), tf.int32)  # (N, 31, 31)
    pairs = _or_shifted(padded[:, :, :-1], padded[:, :, 1:], 8)
    words = tf.reshape(_or_shifted(pairs[:, :-1], pairs[:, 1:], 16), (count, high * wide))

    # A blank border pixel stands for everything outside.
    y = tf.clip_by_value(source_y + 1.0, 0.0, IMAGE_HEIGHT + 1.0)
    x = tf.clip_by_value(source_x + 1.0, 0.0, IMAGE_WIDTH + 1.0)
    y0, x0 = tf.floor(y), tf.floor(x)
    places = tf.cast(y0 * wide + x0, tf.int32)  # (N, 784)
    found = tf.bitcast(tf.gather(words, places, batch_dims=1), tf.uint8)  # (N, 784, 4), the lowest bits first
    found = tf.cast(found, tf.float32)
    dy, dx = y - y0, x - x0
    upper = found[..., 0] + dx * (found[..., 1] - found[..., 0])
    lower = found[..., 2] + dx * (found[..., 3] - found[..., 2])
    return tf.reshape(upper + dy * (lower - upper), (count, IMAGE_HEIGHT, IMAGE_WIDTH))


def _or_shifted(low: Any, high: Any, bits: int) -> Any:
    return tf.bitwise.bitwise_or(low, tf.bitwise.left_shift(high, bits))
