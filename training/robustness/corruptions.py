"""Fifteen ways in which images of digits get damaged, at five strengths each.

The kinds are those of Mu and Gilmer, "MNIST-C: a robustness benchmark for computer vision" (2019); the drawing and the
strengths are our own, so figures are not comparable with theirs. Training deforms digits smoothly and slightly; nothing
here is used in it. Each image draws its own direction, place or noise, and draws the same at every strength: only the
amount grows.
"""

import zlib
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from training.robustness.strokes import draw_lines, to_u8

STRENGTHS = (1, 2, 3, 4, 5)

_CENTRE = np.array([IMAGE_WIDTH - 1, IMAGE_HEIGHT - 1]) / 2
_Damage = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def corrupt(images_u8: np.ndarray, kind: str, strength: int, seed: int) -> np.ndarray:
    """Damage images.

    Args:
        images_u8: uint8 (N, 28, 28), ink 255 on paper 0.
        kind: a key of ``CORRUPTIONS``.
        strength: 1 (slight) to 5.
        seed: the same seed damages the same images in the same way.

    Returns:
        uint8 (N, 28, 28).
    """
    damage, amounts = CORRUPTIONS[kind]
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    ink = images_u8.astype(np.float32) / 255.0
    return to_u8(damage(ink, amounts[STRENGTHS.index(strength)], rng))


def _noise(ink: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return ink + deviation * rng.standard_normal(ink.shape, np.float32)


def _shot(ink: np.ndarray, faintness: float, rng: np.random.Generator) -> np.ndarray:
    """As few photons as 1 / faintness where the ink is full, and a little stray light on the paper."""
    photons = 1.0 / faintness
    return rng.poisson((ink + 0.05) * photons) / photons - 0.05


def _impulse(ink: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    chance, value = rng.random(ink.shape, np.float32), rng.integers(0, 2, ink.shape)
    return np.where(chance < share, value, ink)


def _blur(ink: np.ndarray, sigma_px: float, _rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(ink, (0, sigma_px, sigma_px), mode="constant")


def _shear(ink: np.ndarray, slope: float, rng: np.random.Generator) -> np.ndarray:
    slopes = slope * _signs(len(ink), rng)
    return _warp(ink, _matrices(xy=slopes))


def _rotation(ink: np.ndarray, angle_deg: float, rng: np.random.Generator) -> np.ndarray:
    angles = np.radians(angle_deg) * _signs(len(ink), rng)
    cos, sin = np.cos(angles), np.sin(angles)
    return _warp(ink, _matrices(xx=cos, xy=-sin, yx=sin, yy=cos))


def _scale(ink: np.ndarray, factor: float, _rng: np.random.Generator) -> np.ndarray:
    # Blurred first where it shrinks, or thin strokes would fall between the samples.
    smooth = ndimage.gaussian_filter(ink, (0, *[0.35 * (1 / factor - 1)] * 2), mode="constant")
    inverse = np.full(len(ink), 1 / factor)
    return _warp(smooth, _matrices(xx=inverse, yy=inverse))


def _translation(ink: np.ndarray, distance_px: float, rng: np.random.Generator) -> np.ndarray:
    angles = rng.uniform(0, 2 * np.pi, len(ink))
    return _warp(ink, _matrices(xx=np.ones(len(ink))), distance_px * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def _brightness(ink: np.ndarray, added: float, _rng: np.random.Generator) -> np.ndarray:
    return ink + added


def _stripe(ink: np.ndarray, width_px: float, rng: np.random.Generator) -> np.ndarray:
    """An upright stripe through the digit, in which ink and paper are swapped."""
    middle = rng.uniform(8, 19, (len(ink), 1, 1))
    inside = np.abs(np.arange(IMAGE_WIDTH) - middle) < width_px / 2
    return np.where(inside, 1.0 - ink, ink)


def _fog(ink: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """Clouds of three sizes that brighten paper and ink alike."""
    clouds = np.zeros_like(ink)
    for sigma_px, weight in ((6.0, 4.0), (3.0, 2.0), (1.5, 1.0)):
        grain = rng.standard_normal(ink.shape, np.float32)
        layer = ndimage.gaussian_filter(grain, (0, sigma_px, sigma_px), mode="wrap")
        clouds += weight * layer / layer.std(axis=(1, 2), keepdims=True)
    low, high = clouds.min(axis=(1, 2), keepdims=True), clouds.max(axis=(1, 2), keepdims=True)
    return 1.0 - (1.0 - ink) * (1.0 - density * (clouds - low) / (high - low))


def _dotted_line(ink: np.ndarray, lines: float, rng: np.random.Generator) -> np.ndarray:
    """Straight dotted lines from edge to edge, each through the middle half of the image."""
    rows, columns = np.mgrid[0:IMAGE_HEIGHT, 0:IMAGE_WIDTH].astype(np.float32)
    most, gap_px = 3, 3.0
    for number in range(most):
        through_x, through_y = rng.uniform(7, 20, (2, len(ink), 1, 1)).astype(np.float32)
        angle = rng.uniform(0, np.pi, (len(ink), 1, 1)).astype(np.float32)
        if number >= lines:
            break
        x, y = columns - through_x, rows - through_y
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle)
        to_dot = np.hypot(along - gap_px * np.rint(along / gap_px), across)
        ink = np.maximum(ink, np.clip(0.85 + 0.4 * lines / most - to_dot, 0, 1))
    return ink


def _zigzag(ink: np.ndarray, half_width_px: float, rng: np.random.Generator) -> np.ndarray:
    """A zigzag line across the image at any angle."""
    count, corners = len(ink), 9
    x = np.linspace(-16, 16, corners) + rng.uniform(-1, 1, (count, corners))
    y = np.where(np.arange(corners) % 2, 1.0, -1.0) * rng.uniform(2, 4, (count, corners))
    angle = rng.uniform(0, np.pi, (count, 1))
    cos, sin = np.cos(angle), np.sin(angle)
    middle = _CENTRE + rng.uniform(-4, 4, (count, 1, 2))
    line = middle + np.stack([cos * x - sin * y, sin * x + cos * y], axis=2)
    return np.maximum(ink, draw_lines([line], np.full(count, half_width_px)))


def _spatter(ink: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Drops that cover that share of the image."""
    field = ndimage.gaussian_filter(rng.standard_normal(ink.shape, np.float32), (0, 1.3, 1.3), mode="wrap")
    threshold = np.quantile(field, 1 - share, axis=(1, 2), keepdims=True)
    return np.maximum(ink, np.clip(0.5 + 6 * (field - threshold), 0, 1))


def _edges(ink: np.ndarray, share: float, _rng: np.random.Generator) -> np.ndarray:
    """The digit gives way to its outline, found as Canny (1986) does: the slope's crest, weak parts where joined."""
    smooth = ndimage.gaussian_filter(ink, (0, 0.8, 0.8), mode="constant")
    down, right = ndimage.sobel(smooth, axis=1), ndimage.sobel(smooth, axis=2)
    slope = np.hypot(down, right)
    padded = np.pad(slope, ((0, 0), (1, 1), (1, 1)))
    sector = np.rint(np.arctan2(down, right) / (np.pi / 4)).astype(int) % 4
    crest = np.zeros(ink.shape, bool)
    for number, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[:, 1 + dy : 29 + dy, 1 + dx : 29 + dx]
        behind = padded[:, 1 - dy : 29 - dy, 1 - dx : 29 - dx]
        crest |= (sector == number) & (slope >= ahead) & (slope > behind)
    joined = np.zeros((3, 3, 3), bool)
    joined[1] = True  # pieces never reach from one image into the next
    pieces, count = ndimage.label(crest & (slope > 0.5), joined)
    strong = np.zeros(count + 1, bool)
    strong[np.unique(pieces[slope > 1.2])] = True
    strong[0] = False
    return (1 - share) * ink + share * strong[pieces]


def _signs(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice([-1.0, 1.0], count)


def _matrices(**entries: np.ndarray) -> np.ndarray:
    """Matrices (N, 2, 2) over (x, y), the identity but for the entries given."""
    count = len(next(iter(entries.values())))
    matrices = np.tile(np.eye(2), (count, 1, 1))
    for name, values in entries.items():
        matrices[:, "xy".index(name[0]), "xy".index(name[1])] = values
    return matrices


def _warp(ink: np.ndarray, matrices: np.ndarray, shift_px: np.ndarray | None = None) -> np.ndarray:
    """Look each pixel up at matrix @ (pixel - centre) + centre - shift; between pixels linearly, paper outside."""
    rows, columns = np.mgrid[0:IMAGE_HEIGHT, 0:IMAGE_WIDTH]
    grid = np.stack([columns.ravel(), rows.ravel()]) - _CENTRE[:, None]  # (2, 784)
    source = (matrices @ grid + _CENTRE[:, None]).astype(np.float32)  # (N, 2, 784)
    if shift_px is not None:
        source -= shift_px[:, :, None].astype(np.float32)
    # A border of paper on all sides: what lies further out is cut to it.
    padded = np.pad(ink, ((0, 0), (1, 2), (1, 2)))
    width = IMAGE_WIDTH + 3
    flat = padded.reshape(len(ink), -1)
    x = np.clip(source[:, 0] + 1, 0, IMAGE_WIDTH + 1)
    y = np.clip(source[:, 1] + 1, 0, IMAGE_HEIGHT + 1)
    left, top = x.astype(np.intp), y.astype(np.intp)
    right_share, low_share = x - left, y - top
    at = top * width + left
    upper, lower = (
        np.take_along_axis(flat, at + below, 1) * (1 - right_share)
        + np.take_along_axis(flat, at + below + 1, 1) * right_share
        for below in (0, width)
    )
    return (upper * (1 - low_share) + lower * low_share).reshape(ink.shape)


CORRUPTIONS: dict[str, tuple[_Damage, tuple[float, float, float, float, float]]] = {
    "noise": (_noise, (0.15, 0.3, 0.45, 0.6, 0.8)),  # standard deviation, of full ink
    "shot": (_shot, (0.05, 0.15, 0.3, 0.6, 1.0)),  # one over the photons of full ink
    "impulse": (_impulse, (0.05, 0.1, 0.2, 0.3, 0.4)),  # share of pixels that turn black or white
    "blur": (_blur, (0.7, 1.1, 1.5, 2.0, 2.5)),  # sigma in pixels
    "shear": (_shear, (0.2, 0.4, 0.6, 0.8, 1.0)),  # pixels sideways for each pixel down
    "rotation": (_rotation, (10.0, 20.0, 30.0, 40.0, 50.0)),  # degrees
    "scale": (_scale, (0.85, 0.75, 0.65, 0.55, 0.45)),  # factor
    "translation": (_translation, (1.5, 3.0, 4.5, 6.0, 7.5)),  # pixels, in any direction
    "brightness": (_brightness, (0.15, 0.3, 0.45, 0.6, 0.75)),  # added to all pixels, of full ink
    "stripe": (_stripe, (1.0, 2.0, 4.0, 6.0, 8.0)),  # width in pixels
    "fog": (_fog, (0.2, 0.35, 0.5, 0.65, 0.8)),  # greatest density
    "dotted_line": (_dotted_line, (0.5, 1.0, 1.5, 2.0, 3.0)),  # lines, and how heavy
    "zigzag": (_zigzag, (0.1, 0.3, 0.6, 0.9, 1.2)),  # half width in pixels
    "spatter": (_spatter, (0.03, 0.06, 0.1, 0.15, 0.2)),  # share of the image
    "edges": (_edges, (0.2, 0.4, 0.6, 0.8, 1.0)),  # share of the outline in the mix
}
"""What each corruption does, and how much of it at strengths 1 to 5."""
