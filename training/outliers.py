"""Images of nothing known, for a network to learn to be unsure about: outlier exposure (Hendrycks et al., ICLR 2019).

Most are figures of a few random strokes, drawn in the size and place of the data set's images; the rest are two images
of different classes laid over each other, noise, and evenly grey sheets. No letter is drawn on purpose: those are what
the evaluation asks about (training/robustness/nondigits.py).
"""

import numpy as np
from scipy import ndimage

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from training.robustness.strokes import curve, draw_figures, to_u8
from training.workspace import Split


def draw_outliers(learn: Split, count: int, seed: int) -> np.ndarray:
    """Draw outliers, uint8 (count, 28, 28), the same for the same seed, some of them from the images of ``learn``."""
    rng = np.random.default_rng([seed, 2])
    few = count // 12
    parts = [_lay_over(learn, few, rng), _noise(few, rng), _grey(few, rng)]
    figures = count - sum(len(part) for part in parts)
    parts += [_figures(figures // 2, rng, on_grid=True), _figures(figures - figures // 2, rng, on_grid=False)]
    return rng.permutation(np.concatenate(parts))


def _figures(count: int, rng: np.random.Generator, *, on_grid: bool) -> np.ndarray:
    """Three to five strokes each, straight or curved, from points anywhere or on a grid of 3 x 3, so that they meet."""
    sizes = np.diff(np.linspace(0, count, 4).astype(int))
    drawn = []
    for strokes, members in zip((3, 4, 5), sizes, strict=True):
        lines = []
        end = _points(members, rng, on_grid)
        for _ in range(strokes):
            start = np.where(rng.random((members, 1, 1)) < 0.5, _points(members, rng, on_grid), end)
            end = _points(members, rng, on_grid)
            # Strokes straight down or across are as common in writing as slanting ones.
            kept = rng.integers(0, 4, (members, 1))
            end[:, :, 0] = np.where(kept == 0, start[:, :, 0], end[:, :, 0])
            end[:, :, 1] = np.where(kept == 1, start[:, :, 1], end[:, :, 1])
            along = end - start
            bend = np.concatenate([-along[:, :, 1:], along[:, :, :1]], axis=2) * rng.uniform(-0.7, 0.7, (members, 1, 1))
            bend *= rng.random((members, 1, 1)) < 0.4
            lines.append(curve(np.concatenate([start, (start + end) / 2 + bend, end], axis=1), 2))
        slant, narrow = rng.normal(0, 0.2, (members, 1)), rng.uniform(0.6, 1.0, (members, 1))
        for line in lines:
            line[:, :, 0] = narrow * line[:, :, 0] + slant * line[:, :, 1]
        drawn.append(draw_figures(lines, rng.uniform(0.7, 1.6, members)))
    return np.concatenate(drawn)


def _points(count: int, rng: np.random.Generator, on_grid: bool) -> np.ndarray:
    """Points (N, 1, 2) in the unit square."""
    if not on_grid:
        return rng.uniform(0, 1, (count, 1, 2))
    return rng.integers(0, 3, (count, 1, 2)) / 2 + rng.normal(0, 0.04, (count, 1, 2))


def _lay_over(learn: Split, count: int, rng: np.random.Generator) -> np.ndarray:
    first, second = rng.integers(0, len(learn.labels), (2, 4 * count))
    differ = np.flatnonzero(learn.labels[first] != learn.labels[second])[:count]
    return np.maximum(learn.images[first[differ]], learn.images[second[differ]])


def _noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """From grains to clouds, from a few specks to as much ink as paper."""
    fields = [
        ndimage.gaussian_filter(rng.standard_normal((size, IMAGE_HEIGHT, IMAGE_WIDTH)), (0, sigma_px, sigma_px))
        for sigma_px, size in zip((0.0, 0.7, 1.5, 3.0), np.diff(np.linspace(0, count, 5).astype(int)), strict=True)
    ]
    field = np.concatenate(fields)
    contrast, level = rng.uniform(0.3, 1.5, (count, 1, 1)), rng.uniform(-0.5, 0.7, (count, 1, 1))
    return to_u8(contrast * field / np.maximum(field.std(axis=(1, 2), keepdims=True), 1e-6) + level)


def _grey(count: int, rng: np.random.Generator) -> np.ndarray:
    level = rng.uniform(0, 1, (count, 1, 1)) * (rng.random((count, 1, 1)) > 0.1)
    return to_u8(level + 0.01 * rng.standard_normal((count, IMAGE_HEIGHT, IMAGE_WIDTH)))
