"""Digits as people draw them: pen paths for several handwriting styles of each, and pictures of them.

A path's points lie in the unit square, x to the right and y down; ``wobble`` makes each drawing a little different.
The page test draws the paths with a mouse; the picture tests render them with Pillow.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Path = list[Point]


def _line(*points: Point) -> Path:
    """Straight pieces, sampled as a pen would be."""
    path: Path = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        steps = max(2, math.ceil(math.hypot(x1 - x0, y1 - y0) / 0.03))
        path += [(x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps) for k in range(steps)]
    return [*path, points[-1]]


def _curve(*points: Point) -> Path:
    """A smooth curve through the points (Catmull-Rom)."""
    padded = [points[0], *points, points[-1]]
    path: Path = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        steps = max(3, math.ceil(math.hypot(c[0] - b[0], c[1] - b[1]) / 0.03))
        for k in range(steps):
            t = k / steps
            path.append(
                tuple(  # type: ignore[arg-type]
                    0.5 * (2 * q + (r - p) * t + (2 * p - 5 * q + 4 * r - s) * t**2 + (3 * q - p - 3 * r + s) * t**3)
                    for p, q, r, s in zip(a, b, c, d, strict=True)
                )
            )
    return [*path, points[-1]]


def _oval(cx: float, cy: float, rx: float, ry: float, start: float = -90, sweep: float = -365) -> Path:
    """Part of an ellipse, in degrees from the right-hand side, clockwise as seen on screen."""
    steps = max(8, math.ceil(abs(sweep) / 10))
    angles = [math.radians(start + sweep * k / steps) for k in range(steps + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


STYLES: dict[int, dict[str, list[Path]]] = {
    0: {
        "round": [_oval(0.5, 0.5, 0.32, 0.42)],
        "narrow": [_oval(0.5, 0.5, 0.2, 0.43)],
        "wide": [_oval(0.5, 0.5, 0.4, 0.4)],
        "slanted": [[(x + 0.25 * (0.5 - y), y) for x, y in _oval(0.5, 0.5, 0.23, 0.43)]],
        "open": [_oval(0.5, 0.5, 0.3, 0.42, -70, -340)],
    },
    1: {
        "bar": [_line((0.5, 0.08), (0.5, 0.92))],
        "slanted": [_line((0.62, 0.08), (0.4, 0.92))],
        "flag": [_line((0.38, 0.24), (0.54, 0.08), (0.54, 0.92))],
        "flag and base": [_line((0.36, 0.25), (0.53, 0.08), (0.53, 0.9)), _line((0.32, 0.91), (0.74, 0.91))],
        "base": [_line((0.5, 0.08), (0.5, 0.9)), _line((0.3, 0.91), (0.7, 0.91))],
    },
    2: {
        "plain": [
            _curve((0.22, 0.28), (0.34, 0.11), (0.56, 0.08), (0.73, 0.22), (0.68, 0.45), (0.45, 0.68), (0.22, 0.9))
            + _line((0.22, 0.9), (0.8, 0.9))
        ],
        "loop": [
            _curve(
                (0.22, 0.26),
                (0.4, 0.1),
                (0.66, 0.16),
                (0.7, 0.38),
                (0.5, 0.66),
                (0.28, 0.86),
                (0.2, 0.78),
                (0.32, 0.71),
                (0.5, 0.83),
                (0.68, 0.9),
                (0.84, 0.8),
            )
        ],
        "swan": [
            _curve(
                (0.25, 0.2),
                (0.45, 0.08),
                (0.68, 0.16),
                (0.7, 0.34),
                (0.55, 0.58),
                (0.28, 0.86),
                (0.42, 0.84),
                (0.6, 0.9),
                (0.8, 0.86),
            )
        ],
        "square": [_line((0.25, 0.12), (0.7, 0.12), (0.72, 0.45), (0.25, 0.88), (0.78, 0.88))],
        "slanted": [
            _curve((0.34, 0.24), (0.52, 0.08), (0.76, 0.14), (0.76, 0.34), (0.5, 0.62), (0.16, 0.9))
            + _line((0.16, 0.9), (0.72, 0.88))
        ],
    },
    3: {
        "round": [
            _curve((0.25, 0.2), (0.45, 0.08), (0.68, 0.16), (0.68, 0.36), (0.44, 0.47))
            + _curve((0.44, 0.47), (0.72, 0.56), (0.74, 0.78), (0.5, 0.92), (0.22, 0.8))
        ],
        "flat top": [
            _line((0.25, 0.1), (0.72, 0.1), (0.45, 0.42))
            + _curve((0.45, 0.42), (0.7, 0.5), (0.76, 0.7), (0.58, 0.9), (0.35, 0.9), (0.22, 0.8))
        ],
        "looped": [
            _curve(
                (0.26, 0.18),
                (0.48, 0.08),
                (0.68, 0.2),
                (0.6, 0.4),
                (0.42, 0.48),
                (0.44, 0.42),
                (0.66, 0.52),
                (0.74, 0.7),
                (0.56, 0.9),
                (0.24, 0.84),
            )
        ],
        "narrow": [
            _curve((0.36, 0.16), (0.5, 0.08), (0.64, 0.2), (0.6, 0.38), (0.46, 0.46))
            + _curve((0.46, 0.46), (0.64, 0.56), (0.66, 0.78), (0.5, 0.92), (0.33, 0.84))
        ],
        "slanted": [
            _curve((0.36, 0.16), (0.58, 0.07), (0.78, 0.18), (0.7, 0.38), (0.46, 0.46))
            + _curve((0.46, 0.46), (0.68, 0.56), (0.66, 0.78), (0.42, 0.92), (0.16, 0.82))
        ],
    },
    4: {
        "open": [_line((0.28, 0.1), (0.24, 0.52), (0.76, 0.52)), _line((0.68, 0.12), (0.66, 0.92))],
        "closed": [_line((0.62, 0.92), (0.62, 0.08), (0.2, 0.62), (0.82, 0.62))],
        "crossed": [_line((0.34, 0.1), (0.22, 0.56), (0.82, 0.54)), _line((0.6, 0.3), (0.56, 0.92))],
        "curved": [
            _curve((0.28, 0.12), (0.24, 0.36), (0.34, 0.52), (0.55, 0.52), (0.7, 0.44)),
            _line((0.72, 0.1), (0.66, 0.92)),
        ],
        "tall": [_line((0.34, 0.1), (0.32, 0.46), (0.68, 0.44)), _line((0.66, 0.08), (0.62, 0.94))],
    },
    5: {
        "two strokes": [
            _line((0.3, 0.12), (0.28, 0.44))
            + _curve((0.28, 0.44), (0.5, 0.38), (0.72, 0.52), (0.72, 0.76), (0.5, 0.92), (0.24, 0.84)),
            _line((0.3, 0.12), (0.74, 0.1)),
        ],
        "one stroke": [
            _line((0.74, 0.1), (0.32, 0.12), (0.28, 0.46))
            + _curve((0.28, 0.46), (0.5, 0.4), (0.72, 0.54), (0.72, 0.76), (0.5, 0.92), (0.22, 0.86))
        ],
        "curvy": [
            _curve(
                (0.76, 0.12),
                (0.5, 0.1),
                (0.36, 0.16),
                (0.3, 0.36),
                (0.48, 0.44),
                (0.68, 0.58),
                (0.68, 0.8),
                (0.46, 0.92),
                (0.2, 0.86),
            )
        ],
        "square": [_line((0.74, 0.1), (0.3, 0.1), (0.3, 0.48), (0.7, 0.48), (0.7, 0.88), (0.26, 0.88))],
        "slanted": [
            _line((0.84, 0.08), (0.44, 0.12), (0.34, 0.46))
            + _curve((0.34, 0.46), (0.56, 0.4), (0.72, 0.52), (0.66, 0.76), (0.42, 0.92), (0.14, 0.86))
        ],
    },
    6: {
        "curved": [
            _curve(
                (0.66, 0.08),
                (0.44, 0.24),
                (0.3, 0.5),
                (0.28, 0.74),
                (0.46, 0.92),
                (0.68, 0.82),
                (0.7, 0.62),
                (0.52, 0.52),
                (0.32, 0.66),
            )
        ],
        "straight": [
            _curve(
                (0.58, 0.08), (0.42, 0.4), (0.3, 0.68), (0.38, 0.9), (0.6, 0.9), (0.7, 0.72), (0.54, 0.58), (0.34, 0.7)
            )
        ],
        "hooked": [
            _curve(
                (0.72, 0.2),
                (0.58, 0.08),
                (0.38, 0.2),
                (0.26, 0.5),
                (0.3, 0.8),
                (0.5, 0.92),
                (0.7, 0.8),
                (0.68, 0.6),
                (0.48, 0.52),
                (0.3, 0.64),
            )
        ],
        "small loop": [
            _curve(
                (0.6, 0.06),
                (0.42, 0.3),
                (0.33, 0.6),
                (0.36, 0.84),
                (0.5, 0.93),
                (0.62, 0.84),
                (0.58, 0.7),
                (0.46, 0.68),
                (0.36, 0.78),
            )
        ],
        "upright": [
            _curve(
                (0.38, 0.06),
                (0.34, 0.4),
                (0.32, 0.72),
                (0.44, 0.92),
                (0.64, 0.88),
                (0.7, 0.7),
                (0.56, 0.56),
                (0.34, 0.68),
            )
        ],
    },
    7: {
        "plain": [_line((0.22, 0.12), (0.76, 0.12), (0.42, 0.92))],
        "barred": [_line((0.22, 0.12), (0.76, 0.12), (0.42, 0.92)), _line((0.36, 0.52), (0.72, 0.5))],
        "curved": [_line((0.22, 0.14), (0.74, 0.12)) + _curve((0.74, 0.12), (0.6, 0.36), (0.48, 0.62), (0.44, 0.92))],
        "serif": [_line((0.24, 0.26), (0.24, 0.12), (0.76, 0.12), (0.46, 0.92))],
        "upright": [_line((0.28, 0.12), (0.7, 0.1), (0.62, 0.92))],
    },
    8: {
        "one stroke": [
            _curve(
                (0.68, 0.2),
                (0.5, 0.08),
                (0.32, 0.2),
                (0.4, 0.4),
                (0.6, 0.54),
                (0.7, 0.74),
                (0.5, 0.92),
                (0.3, 0.76),
                (0.4, 0.55),
                (0.6, 0.4),
                (0.68, 0.2),
            )
        ],
        "two circles": [_oval(0.5, 0.28, 0.19, 0.2), _oval(0.5, 0.7, 0.24, 0.22)],
        "narrow": [
            _curve(
                (0.6, 0.18),
                (0.5, 0.08),
                (0.38, 0.2),
                (0.44, 0.42),
                (0.57, 0.58),
                (0.6, 0.78),
                (0.48, 0.92),
                (0.36, 0.78),
                (0.44, 0.56),
                (0.58, 0.4),
                (0.6, 0.18),
            )
        ],
        "slanted": [
            _curve(
                (0.78, 0.2),
                (0.62, 0.08),
                (0.44, 0.18),
                (0.46, 0.38),
                (0.6, 0.54),
                (0.6, 0.76),
                (0.42, 0.92),
                (0.24, 0.8),
                (0.34, 0.58),
                (0.62, 0.4),
                (0.78, 0.2),
            )
        ],
        "open top": [
            _curve(
                (0.72, 0.12),
                (0.46, 0.1),
                (0.34, 0.24),
                (0.46, 0.42),
                (0.64, 0.58),
                (0.66, 0.8),
                (0.48, 0.92),
                (0.3, 0.8),
                (0.38, 0.6),
                (0.6, 0.4),
                (0.7, 0.14),
            )
        ],
    },
    9: {
        "straight tail": [
            _curve((0.68, 0.22), (0.5, 0.1), (0.32, 0.24), (0.36, 0.46), (0.56, 0.48), (0.68, 0.26))
            + _line((0.68, 0.26), (0.64, 0.92))
        ],
        "curved tail": [
            _curve((0.68, 0.22), (0.48, 0.09), (0.3, 0.26), (0.36, 0.46), (0.56, 0.46), (0.68, 0.26))
            + _curve((0.68, 0.26), (0.7, 0.56), (0.6, 0.84), (0.42, 0.92), (0.28, 0.84))
        ],
        "slanted": [
            _curve((0.72, 0.2), (0.56, 0.08), (0.36, 0.2), (0.34, 0.42), (0.52, 0.46), (0.7, 0.24))
            + _line((0.7, 0.24), (0.44, 0.92))
        ],
        "two strokes": [_oval(0.46, 0.28, 0.19, 0.19, 0), _line((0.65, 0.14), (0.65, 0.92))],
        "narrow": [
            _curve((0.6, 0.2), (0.5, 0.1), (0.38, 0.24), (0.42, 0.42), (0.54, 0.4), (0.6, 0.2))
            + _line((0.6, 0.2), (0.57, 0.92))
        ],
    },
}


def wobble(paths: Sequence[Path], rng: np.random.Generator, amount: float = 1.0) -> list[Path]:
    """The same digit as another hand would draw it: turned, slanted and stretched a little, and not quite steady."""
    turn, slant = rng.normal(0, 0.06) * amount, rng.normal(0, 0.06) * amount
    stretch_x, stretch_y = 1 + rng.normal(0, 0.06, 2) * amount
    phases = rng.uniform(0, 2 * math.pi, (2, 3))
    sizes = rng.normal(0, 0.008, (2, 3)) * amount
    drawn = []
    for path in paths:
        shift = rng.normal(0, 0.008, 2) * amount  # the pen is put down anew
        moved: Path = []
        for x, y in path:
            dx, dy = (x - 0.5) * stretch_x, (y - 0.5) * stretch_y
            dx += slant * dy
            rx = dx * math.cos(turn) - dy * math.sin(turn)
            ry = dx * math.sin(turn) + dy * math.cos(turn)
            bend = [
                sum(s * math.sin(3 * (k + 1) * (x + y) + p) for k, (s, p) in enumerate(zip(*row, strict=True)))
                for row in zip(sizes, phases, strict=True)
            ]
            moved.append((0.5 + rx + bend[0] + shift[0], 0.5 + ry + bend[1] + shift[1]))
        drawn.append(moved)
    return drawn


def place(paths: Sequence[Path], size: float, centre: Point = (0.5, 0.5)) -> list[Path]:
    """Scaled to ``size`` (share of the canvas's side) around ``centre``."""
    return [[(centre[0] + (x - 0.5) * size, centre[1] + (y - 0.5) * size) for x, y in path] for path in paths]


def thin_out(path: Path, apart: float = 0.07, bend: float = 0.6) -> Path:
    """Fewer points, as a quick pen reports them: every ``apart``, and where the line turns by ``bend`` radians."""
    kept = [path[0]]
    for before, here, after in zip(path, path[1:], path[2:], strict=False):
        turn = math.atan2(after[1] - here[1], after[0] - here[0]) - math.atan2(here[1] - before[1], here[0] - before[0])
        turn = abs(math.remainder(turn, 2 * math.pi))
        if turn > bend or math.hypot(here[0] - kept[-1][0], here[1] - kept[-1][1]) >= apart:
            kept.append(here)
    return [*kept, path[-1]]


def render(
    paths: Sequence[Path], side: int = 280, width: float = 18, ink: int = 0, paper: int = 255, smooth: bool = True
) -> Image.Image:
    """A grey picture (side x side) of the paths, the stroke ``width`` pixels wide with round ends."""
    over = 4 if smooth and side <= 600 else (2 if smooth else 1)
    picture = Image.new("L", (side * over, side * over), paper)
    pen = ImageDraw.Draw(picture)
    radius = width * over / 2
    for path in paths:
        points = [(x * side * over, y * side * over) for x, y in path]
        pen.line(points, fill=ink, width=max(1, round(width * over)), joint="curve")
        if radius > 1:
            for x, y in (points[0], points[-1]):
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    return picture.resize((side, side), Image.Resampling.BOX) if over > 1 else picture
