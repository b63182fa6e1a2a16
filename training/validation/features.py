"""One row of numbers for each image, so that checks run on a dozen columns and not on 784 pixels.

Coordinates are in pixels from the upper left pixel's middle, x to the right, y down. Work goes in chunks, so memory
beyond the images and their rows stays the same for any number of images.
"""

import hashlib
from collections.abc import Callable
from typing import Final

import numpy as np
import pandas as pd

from digits.contract import IMAGE_BYTES, IMAGE_HEIGHT, IMAGE_WIDTH
from training.params import FeatureName

CHUNK_IMAGES = 8192
_BORDER_PX = 2
_INKED = 128
_GREY_LEVELS = 16

FEATURES: Final[dict[FeatureName, str]] = {
    "ink_px": "ink, as a number of fully inked pixels",
    "centroid_x_px": "centre of the ink, from the left",
    "centroid_y_px": "centre of the ink, from above",
    "spread_x_px": "standard deviation of the ink across",
    "spread_y_px": "standard deviation of the ink up and down",
    "slant": "how far the ink leans to the right for each pixel up",
    "stroke_width_px": "twice the inked area over its outline",
    "border_ink": "mean of pixel / 255 in the outermost two pixels",
    "entropy_bits": "entropy of the pixels' grey in 16 levels",
}
"""The features of an image, and what each is."""


def measure(images: np.ndarray, advance: Callable[[int], None] = lambda _count: None) -> pd.DataFrame:
    """The features of images, and what checks need besides.

    Args:
        images: uint8 (N, 28, 28).
        advance: told the number of images done after each chunk.

    Returns:
        A row an image, in order: ``FEATURES``, ``ink_share`` (mean of pixel / 255), ``least_pixel``,
        ``greatest_pixel`` and ``content``, a 64-bit hash of the pixels.
    """
    parts = []
    for first in range(0, max(1, len(images)), CHUNK_IMAGES):
        chunk = images[first : first + CHUNK_IMAGES]
        parts.append(_measure_chunk(chunk))
        advance(len(chunk))
    return pd.concat(parts, ignore_index=True)


def _measure_chunk(images: np.ndarray) -> pd.DataFrame:
    pixels = images.reshape(len(images), IMAGE_BYTES)  # (N, 784)
    # Sums of whole numbers below 2^53: exact, so the same on every machine.
    total, x, y, xx, yy, xy, border = (pixels.astype(np.float64) @ _MOMENTS).T
    weight = np.maximum(total, 1.0)
    mean_x, mean_y = x / weight, y / weight
    variance_x = np.maximum(xx / weight - mean_x**2, 0.0)
    variance_y = np.maximum(yy / weight - mean_y**2, 0.0)
    return pd.DataFrame(
        {
            "ink_px": total / 255.0,
            "centroid_x_px": mean_x,
            "centroid_y_px": mean_y,
            "spread_x_px": np.sqrt(variance_x),
            "spread_y_px": np.sqrt(variance_y),
            "slant": -(xy / weight - mean_x * mean_y) / np.maximum(variance_y, 1e-6),
            "stroke_width_px": _stroke_width(images),
            "border_ink": border / 255.0 / _MOMENTS[:, -1].sum(),
            "entropy_bits": _entropy(pixels),
            "ink_share": total / 255.0 / IMAGE_BYTES,
            "least_pixel": pixels.min(axis=1).astype(np.int64),
            "greatest_pixel": pixels.max(axis=1).astype(np.int64),
            "content": _hashes(pixels),
        }
    )


def _moments() -> np.ndarray:
    """The weights (784, 7) whose products with an image sum its ink, moments up to the second, and border."""
    y, x = np.mgrid[:IMAGE_HEIGHT, :IMAGE_WIDTH].astype(np.float64)
    border = np.ones((IMAGE_HEIGHT, IMAGE_WIDTH))
    border[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = 0.0
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, border], axis=-1).reshape(IMAGE_BYTES, 7)


_MOMENTS = _moments()


def _stroke_width(images: np.ndarray) -> np.ndarray:
    """A stroke of length L and width w has area L w and an outline of about 2 L; 0 without ink."""
    inked = np.pad(images >= _INKED, ((0, 0), (1, 1), (1, 1)))
    outline = np.count_nonzero(inked[:, 1:] != inked[:, :-1], axis=(1, 2))
    outline += np.count_nonzero(inked[:, :, 1:] != inked[:, :, :-1], axis=(1, 2))
    return 2.0 * np.count_nonzero(inked, axis=(1, 2)) / np.maximum(outline, 1)


def _entropy(pixels: np.ndarray) -> np.ndarray:
    levels = pixels // (256 // _GREY_LEVELS) + np.arange(len(pixels))[:, None] * _GREY_LEVELS
    counts = np.bincount(levels.ravel(), minlength=len(pixels) * _GREY_LEVELS).reshape(-1, _GREY_LEVELS)
    shares = counts[: len(pixels)] / IMAGE_BYTES
    return -(shares * np.log2(np.maximum(shares, 1e-12))).sum(axis=1) + 0.0


def _hashes(pixels: np.ndarray) -> np.ndarray:
    # Two of a million different images share 64 bits with a chance of 1 in 40 million.
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in pixels)
    return np.frombuffer(digests, np.uint64)
