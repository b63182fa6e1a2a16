"""Fifteen ways in which images of digits get damaged, at five strengths each.

The kinds are those of Mu and Gilmer, "MNIST-C: a robustness benchmark for computer vision" (2019); the drawing and the
strengths are our own, so figures are not comparable with theirs. Training deforms digits smoothly and slightly; nothing
here is used in it. Each image draws its own direction, place or noise, and draws the same at every strength: only the
amount grows.
"""

import copy
import zlib
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from training.robustness.strokes import distance_to_lines, ink_of_lines, to_u8

STRENGTHS = (1, 2, 3, 4, 5)

_CENTRE = np.array([IMAGE_WIDTH - 1, IMAGE_HEIGHT - 1]) / 2
_Drawn = Callable[[float], np.ndarray]
"""Damages by an amount. All that chance decides is drawn before, and costs time only once."""
_Damage = Callable[[np.ndarray, np.random.Generator], _Drawn]


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
    return corrupt_at_will(images_u8, kind, seed)(strength)


def corrupt_at_will(images_u8: np.ndarray, kind: str, seed: int) -> Callable[[int], np.ndarray]:
    """``corrupt`` as a function of the strength: quicker where several are asked for."""
    damage, amounts = CORRUPTIONS[kind]
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    drawn = damage(images_u8.astype(np.float32) / 255.0, rng)
    return lambda strength: to_u8(drawn(amounts[STRENGTHS.index(strength)]))


def _noise(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    noise = rng.standard_normal(ink.shape, np.float32)
    return lambda deviation: ink + deviation * noise


def _shot(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    """As few photons as 1 / faintness where the ink is full, and a little stray light on the paper."""

    def damage(faintness: float) -> np.ndarray:
        photons = 1.0 / faintness
        return copy.deepcopy(rng).poisson((ink + 0.05) * photons) / photons - 0.05

    return damage


def _impulse(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    chance, value = rng.random(ink.shape, np.float32), rng.integers(0, 2, ink.shape)
    return lambda share: np.where(chance < share, value, ink)


def _blur(ink: np.ndarray, _rng: np.random.Generator) -> _Drawn:
    return lambda sigma_px: ndimage.gaussian_filter(ink, (0, sigma_px, sigma_px), mode="constant")


def _shear(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    signs = _signs(len(ink), rng)
    return lambda slope: _warp(ink, _matrices(xy=slope * signs))


def _rotation(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    signs = _signs(len(ink), rng)

    def damage(angle_deg: float) -> np.ndarray:
        angles = np.radians(angle_deg) * signs
        cos, sin = np.cos(angles), np.sin(angles)
        return _warp(ink, _matrices(xx=cos, xy=-sin, yx=sin, yy=cos))

    return damage


def _scale(ink: np.ndarray, _rng: np.random.Generator) -> _Drawn:
    def damage(factor: float) -> np.ndarray:
        # Blurred first where it shrinks, or thin strokes would fall between the samples.
        smooth = ndimage.gaussian_filter(ink, (0, *[0.35 * (1 / factor - 1)] * 2), mode="constant")
        inverse = np.full(len(ink), 1 / factor)
        return _warp(smooth, _matrices(xx=inverse, yy=inverse))

    return damage


def _translation(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    angles = rng.uniform(0, 2 * np.pi, len(ink))
    directions, still = np.stack([np.cos(angles), np.sin(angles)], axis=1), _matrices(xx=np.ones(len(ink)))
    return lambda distance_px: _warp(ink, still, distance_px * directions)


def _brightness(ink: np.ndarray, _rng: np.random.Generator) -> _Drawn:
    return lambda added: ink + added


def _stripe(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    """An upright stripe through the digit, in which ink and paper are swapped."""
    from_middle = np.abs(np.arange(IMAGE_WIDTH) - rng.uniform(8, 19, (len(ink), 1, 1)))
    return lambda width_px: np.where(from_middle < width_px / 2, 1.0 - ink, ink)


def _fog(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    """Clouds of three sizes that brighten paper and ink alike."""
    clouds = np.zeros_like(ink)
    for sigma_px, weight in ((6.0, 4.0), (3.0, 2.0), (1.5, 1.0)):
        grain = rng.standard_normal(ink.shape, np.float32)
        layer = ndimage.gaussian_filter(grain, (0, sigma_px, sigma_px), mode="wrap")
        clouds += weight * layer / layer.std(axis=(1, 2), keepdims=True)
    low, high = clouds.min(axis=(1, 2), keepdims=True), clouds.max(axis=(1, 2), keepdims=True)
    return lambda density: 1.0 - (1.0 - ink) * (1.0 - density * (clouds - low) / (high - low))


def _dotted_line(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    """Straight dotted lines from edge to edge, each through the middle half of the image."""
    rows, columns = np.mgrid[0:IMAGE_HEIGHT, 0:IMAGE_WIDTH].astype(np.float32)
    gap_px = 3.0
    to_dots = []  # of each line, from each pixel to the nearest dot
    for _ in range(3):
        through_x, through_y = rng.uniform(7, 20, (2, len(ink), 1, 1)).astype(np.float32)
        angle = rng.uniform(0, np.pi, (len(ink), 1, 1)).astype(np.float32)
        x, y = columns - through_x, rows - through_y
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle)
        to_dots.append(np.hypot(along - gap_px * np.rint(along / gap_px), across))

    def damage(lines: float) -> np.ndarray:
        drawn = to_dots[: int(np.ceil(lines))]
        return np.maximum.reduce([ink, *(np.clip(0.85 + 0.4 * lines / len(to_dots) - far, 0, 1) for far in drawn)])

    return damage


def _zigzag(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    """A zigzag line across the image at any angle."""
    count, corners = len(ink), 9
    x = np.linspace(-16, 16, corners) + rng.uniform(-1, 1, (count, corners))
    y = np.where(np.arange(corners) % 2, 1.0, -1.0) * rng.uniform(2, 4, (count, corners))
    angle = rng.uniform(0, np.pi, (count, 1))
    cos, sin = np.cos(angle), np.sin(angle)
    middle = _CENTRE + rng.uniform(-4, 4, (count, 1, 2))
    line = middle + np.stack([cos * x - sin * y, sin * x + cos * y], axis=2)
    distance = distance_to_lines([line])
    return lambda half_width_px: np.maximum(ink, ink_of_lines(distance, np.full(count, half_width_px)))


def _spatter(ink: np.ndarray, rng: np.random.Generator) -> _Drawn:
    """Drops that cover that share of the image."""
    field = ndimage.gaussian_filter(rng.standard_normal(ink.shape, np.float32), (0, 1.3, 1.3), mode="wrap")

    def damage(share: float) -> np.ndarray:
        threshold = np.quantile(field, 1 - share, axis=(1, 2), keepdims=True)
        return np.maximum(ink, np.clip(0.5 + 6 * (field - threshold), 0, 1))

    return damage


def _edges(ink: np.ndarray, _rng: np.random.Generator) -> _Drawn:
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
    outline = strong[pieces]
    return lambda share: (1 - share) * ink + share * outline


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
    count, height, width = padded.shape
    x = np.clip(source[:, 0] + 1, 0, IMAGE_WIDTH + 1)
    y = np.clip(source[:, 1] + 1, 0, IMAGE_HEIGHT + 1)
    left, top = x.astype(np.intp), y.astype(np.intp)
    right_share, low_share = x - left, y - top
    at = (np.arange(count)[:, None] * height + top) * width + left
    upper, lower = (
        padded.take(at + below) * (1 - right_share) + padded.take(at + below + 1) * right_share for below in (0, width)
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
