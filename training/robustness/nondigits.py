"""Images that show none of the classes: letters, scribbles, noise, blank paper. An honest network abstains on them.

Letters are drawn by their shape, each in a hand of its own: slant, proportions, pen and every joint vary. Those that
can be read as a digit are left out (B D G I J L O Q S U Y Z and most small ones), for nobody could tell them apart.
"""

import numpy as np
from scipy import ndimage

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from training.robustness.strokes import curve, draw_figures, to_u8

_Stroke = tuple[tuple[float, float], ...]

LETTERS: dict[str, tuple[_Stroke, ...]] = {
    "A": (((0.0, 1.0), (0.5, 0.0), (1.0, 1.0)), ((0.2, 0.62), (0.8, 0.62))),
    "E": (((0.9, 0.0), (0.0, 0.0), (0.0, 1.0), (0.9, 1.0)), ((0.0, 0.5), (0.7, 0.5))),
    "F": (((0.9, 0.0), (0.0, 0.0), (0.0, 1.0)), ((0.0, 0.48), (0.7, 0.48))),
    "H": (((0.0, 0.0), (0.0, 1.0)), ((0.9, 0.0), (0.9, 1.0)), ((0.0, 0.5), (0.9, 0.5))),
    "K": (((0.0, 0.0), (0.0, 1.0)), ((0.85, 0.0), (0.0, 0.55), (0.9, 1.0))),
    "M": (((0.0, 1.0), (0.1, 0.0), (0.5, 0.65), (0.9, 0.0), (1.0, 1.0)),),
    "N": (((0.0, 1.0), (0.0, 0.0), (0.85, 1.0), (0.85, 0.0)),),
    "P": (((0.0, 1.0), (0.0, 0.0), (0.6, 0.0), (0.8, 0.12), (0.8, 0.4), (0.6, 0.52), (0.0, 0.52)),),
    "R": (((0.0, 1.0), (0.0, 0.0), (0.6, 0.0), (0.8, 0.25), (0.6, 0.5), (0.0, 0.5)), ((0.4, 0.5), (0.9, 1.0))),
    "T": (((0.0, 0.0), (1.0, 0.0)), ((0.5, 0.0), (0.5, 1.0))),
    "V": (((0.0, 0.0), (0.45, 1.0), (0.9, 0.0)),),
    "W": (((0.0, 0.0), (0.22, 1.0), (0.5, 0.3), (0.78, 1.0), (1.0, 0.0)),),
    "X": (((0.0, 0.0), (0.9, 1.0)), ((0.9, 0.0), (0.0, 1.0))),
    "h": (((0.0, 0.0), (0.0, 1.0)), ((0.0, 0.6), (0.3, 0.42), (0.6, 0.5), (0.68, 0.7), (0.68, 1.0))),
    "m": (
        ((0.0, 0.3), (0.0, 1.0)),
        ((0.0, 0.5), (0.25, 0.32), (0.45, 0.45), (0.47, 1.0)),
        ((0.47, 0.5), (0.7, 0.32), (0.92, 0.45), (0.95, 1.0)),
    ),
    "n": (((0.0, 0.2), (0.0, 1.0)), ((0.0, 0.45), (0.35, 0.22), (0.7, 0.35), (0.75, 1.0))),
}
"""Strokes in a unit square, x to the right, y down."""


def draw_nondigits(count: int, seed: int) -> dict[str, np.ndarray]:
    """Non-digits by kind: ``letters``, ``scribbles``, ``noise`` and ``blank``, ``count`` images each at least.

    Returns:
        uint8 (M, 28, 28) each, ink 255 on paper 0; letters in turn, as many of each.
    """
    rng = np.random.default_rng([seed, 1])
    each = -(-count // len(LETTERS))
    return {
        "letters": np.stack([draw_letter(name, each, rng) for name in LETTERS], axis=1).reshape(-1, 28, 28),
        "scribbles": draw_scribbles(count, rng),
        "noise": draw_noise(count, rng),
        "blank": draw_blank(count),
    }


def draw_letter(name: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """One letter in ``count`` hands, uint8 (count, 28, 28)."""
    turn, slant = rng.normal(0, 0.1, count), rng.normal(-0.1, 0.15, count)
    wide = rng.uniform(0.65, 1.05, count)
    cos, sin, zero = np.cos(turn), np.sin(turn), np.zeros(count)
    upright = np.stack([np.stack([wide, slant], axis=1), np.stack([zero, zero + 1.0], axis=1)], axis=1)
    turned = np.stack([np.stack([cos, -sin], axis=1), np.stack([sin, cos], axis=1)], axis=1)
    hand = turned @ upright  # (N, 2, 2)
    strokes = []
    for stroke in LETTERS[name]:
        points = np.array(stroke) + rng.normal(0, 0.03, (count, len(stroke), 2))
        strokes.append(points @ hand.swapaxes(1, 2))
    return draw_figures(strokes, rng.uniform(0.8, 1.5, count))


def draw_scribbles(count: int, rng: np.random.Generator) -> np.ndarray:
    """One long curve to and fro, uint8 (count, 28, 28): it crosses itself far more often than a digit does."""
    points = rng.uniform(0, 1, (count, 12, 2))
    return draw_figures([curve(points, 5)], rng.uniform(0.7, 1.2, count))


def draw_noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """Specks, grains and clouds in turn, uint8 (count, 28, 28)."""
    shape = (count, IMAGE_HEIGHT, IMAGE_WIDTH)
    grain = rng.random(shape)
    kind = np.arange(count) % 3
    specks = (grain < rng.uniform(0.1, 0.5, (count, 1, 1))).astype(float)
    clouds = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 2, 2), mode="wrap")
    clouds = (clouds - clouds.min(axis=(1, 2), keepdims=True)) / np.ptp(clouds, axis=(1, 2), keepdims=True)
    return to_u8(np.where(kind[:, None, None] == 0, specks, np.where(kind[:, None, None] == 1, grain, clouds)))


def draw_blank(count: int) -> np.ndarray:
    """Nothing on it, from white paper to all ink in even steps, uint8 (count, 28, 28)."""
    levels = np.rint(np.linspace(0, 255, count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None], (count, IMAGE_HEIGHT, IMAGE_WIDTH)).copy()
