"""Digits moved by whole pixels, and drawn with a thinner or a thicker pen: the same digits to anybody who reads."""

import numpy as np
from scipy import ndimage

DIRECTIONS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right)
"""Eight steps (down, right)."""


def shift(images_u8: np.ndarray, down: int, right: int) -> np.ndarray:
    """Move images (N, 28, 28) by whole pixels; paper comes in, what leaves is lost."""
    moved = np.roll(images_u8, (down, right), axis=(1, 2))
    if down:
        moved[:, (slice(None, down) if down > 0 else slice(down, None))] = 0
    if right:
        moved[:, :, (slice(None, right) if right > 0 else slice(right, None))] = 0
    return moved


def thin(images_u8: np.ndarray) -> np.ndarray:
    """A pixel less of stroke: each pixel becomes the least of two by two (grey erosion)."""
    return ndimage.grey_erosion(images_u8, size=(1, 2, 2), mode="constant")


def thicken(images_u8: np.ndarray) -> np.ndarray:
    """Up to two pixels more of stroke: each pixel becomes the greatest of itself and its four neighbours."""
    cross = ndimage.generate_binary_structure(2, 1)[None]  # (1, 3, 3)
    return ndimage.grey_dilation(images_u8, footprint=cross, mode="constant")
