"""How far a measured share may be from the true one: 95 % intervals."""

import numpy as np

_Z = 1.959964


def wilson_interval(right: float, count: float) -> tuple[float, float]:
    """The score interval of a share of ``count`` independent yes-or-no answers (Wilson 1927).

    It stays within 0..1 even when all are right, and the share itself is always inside.
    """
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = share + _Z * _Z / (2 * count)
    spread = _Z * np.sqrt(share * (1 - share) / count + _Z * _Z / (4 * count * count))
    scale = 1 + _Z * _Z / count
    # Where all or none are right a bound is the share itself, and may come out of the rounding on its other side.
    low, high = float((centre - spread) / scale), float((centre + spread) / scale)
    return min(share, max(0.0, low)), max(share, min(1.0, high))


def mean_interval(values: np.ndarray, least: float = 0.0, greatest: float = 1.0) -> tuple[float, float]:
    """The normal interval of the mean of independent values (N,) within ``least`` to ``greatest``.

    For the share of an image's variants that is read right: an image's variants depend on each other, images do not.
    """
    if len(values) < 2:
        return least, greatest
    spread = _Z * float(values.std(ddof=1)) / np.sqrt(len(values))
    return max(least, float(values.mean() - spread)), min(greatest, float(values.mean() + spread))
