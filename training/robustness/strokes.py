"""Lines drawn into small images, many at once, with smooth edges."""

from collections.abc import Sequence

import numpy as np

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH

BOX_PX = 20.0
"""Side of the square that a figure is scaled to fit, as the data set's digits are."""


def draw_lines(lines: Sequence[np.ndarray], half_width_px: np.ndarray) -> np.ndarray:
    """Draw the same number of connected lines into each image.

    Args:
        lines: float (N, points, 2) each, x and y in pixels, (0, 0) the middle of the first pixel. Two equal points
            draw a dot.
        half_width_px: float (N,), half the width of the pen.

    Returns:
        float32 (N, 28, 28), 0 paper to 1 ink. A pixel's ink falls linearly over the pixel at the line's edge.
    """
    return ink_of_lines(distance_to_lines(lines), half_width_px)


def distance_to_lines(lines: Sequence[np.ndarray]) -> np.ndarray:
    """From each pixel to the nearest of the lines of ``draw_lines``, float32 (N, 784)."""
    rows, columns = np.mgrid[0:IMAGE_HEIGHT, 0:IMAGE_WIDTH].astype(np.float32).reshape(2, 1, -1)
    nearest = np.full((len(lines[0]), rows.size), np.inf, np.float32)  # squared distance to the lines
    for line in lines:
        line = line.astype(np.float32)
        for start, end in zip(line[:, :-1].swapaxes(0, 1), line[:, 1:].swapaxes(0, 1), strict=True):  # (N, 2)
            along = end - start
            length = np.maximum((along**2).sum(axis=1, keepdims=True), 1e-6)
            from_x, from_y = columns - start[:, :1], rows - start[:, 1:]  # (N, 784)
            at = np.clip((from_x * along[:, :1] + from_y * along[:, 1:]) / length, 0.0, 1.0)
            np.minimum(nearest, (from_x - at * along[:, :1]) ** 2 + (from_y - at * along[:, 1:]) ** 2, out=nearest)
    return np.sqrt(nearest)


def ink_of_lines(distance_px: np.ndarray, half_width_px: np.ndarray) -> np.ndarray:
    """What ``draw_lines`` returns, from the distances float (N, 784)."""
    ink = np.clip(half_width_px[:, None].astype(np.float32) + 0.5 - distance_px, 0.0, 1.0)
    return ink.reshape(-1, IMAGE_HEIGHT, IMAGE_WIDTH)


def draw_figures(lines: Sequence[np.ndarray], half_width_px: np.ndarray) -> np.ndarray:
    """Draw figures as the data set has its digits: scaled into 20 x 20 pixels, centre of mass in the middle.

    Args:
        lines: float (N, points, 2) each, in any unit.
        half_width_px: float (N,), half the width of the pen after scaling.

    Returns:
        uint8 (N, 28, 28), ink 255 on paper 0.
    """
    points = np.concatenate(lines, axis=1)
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    room = BOX_PX - 2 * half_width_px[:, None, None]
    scale = room / np.maximum((high - low).max(axis=2, keepdims=True), 1e-6)
    middle = np.array([IMAGE_WIDTH - 1, IMAGE_HEIGHT - 1]) / 2
    placed = [(line - (low + high) / 2) * scale + middle for line in lines]
    ink = draw_lines(placed, half_width_px)
    rows, columns = np.mgrid[0:IMAGE_HEIGHT, 0:IMAGE_WIDTH]
    mass = np.maximum(ink.sum(axis=(1, 2)), 1e-6)
    centre = np.stack([(ink * columns).sum(axis=(1, 2)), (ink * rows).sum(axis=(1, 2))], axis=1) / mass[:, None]
    moved = [line + (np.array([IMAGE_WIDTH, IMAGE_HEIGHT]) / 2 - centre)[:, None, :] for line in placed]
    return to_u8(draw_lines(moved, half_width_px))


def curve(points: np.ndarray, steps: int) -> np.ndarray:
    """A smooth line through points (N, K, 2): Catmull and Rom's spline, ``steps`` pieces between each two."""
    padded = np.concatenate([points[:, :1], points, points[:, -1:]], axis=1)
    before, start, end, after = (padded[:, i : i + points.shape[1] - 1, None] for i in range(4))  # (N, K - 1, 1, 2)
    at = (np.arange(steps) / steps)[None, None, :, None]
    pieces = 0.5 * (
        2 * start
        + (end - before) * at
        + (2 * before - 5 * start + 4 * end - after) * at**2
        + (3 * (start - end) + after - before) * at**3
    )
    return np.concatenate([pieces.reshape(len(points), (points.shape[1] - 1) * steps, 2), points[:, -1:]], axis=1)


def to_u8(share: np.ndarray) -> np.ndarray:
    """Ink as a share, cut off at 0 and 1 -> uint8, rounded."""
    return np.rint(np.clip(share, 0.0, 1.0) * 255.0).astype(np.uint8)
