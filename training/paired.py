"""Two networks read the same images: how much less does one get right, and could that be chance?

What both read right, or both wrong, says nothing about which is better. All of it is in the two counts of images that
only one of them reads right.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

_DRAWS = 10_000


@dataclass(frozen=True)
class Paired:
    """How often each of two networks is right where the other is wrong."""

    images: int
    gained: int
    """Images that only the new network reads right."""
    lost: int
    """Images that only the old network reads right."""

    @property
    def difference(self) -> float:
        """Accuracy of the new network less that of the old, -1 to 1."""
        return (self.gained - self.lost) / self.images


def pair(new_right: np.ndarray, old_right: np.ndarray) -> Paired:
    """Count over two rows of bool (N,), N at least 1: which images each network reads right."""
    gained = int(np.count_nonzero(new_right & ~old_right))
    return Paired(len(new_right), gained, int(np.count_nonzero(old_right & ~new_right)))


def mcnemar(paired: Paired) -> float:
    """The two-sided p-value of equal accuracy: the exact binomial form of McNemar's test (Psychometrika 12, 1947).

    Were the networks equally good, each image that only one of them reads right would be a fair coin's throw. 1 where
    there is no such image.
    """
    thrown = paired.gained + paired.lost
    return float(binomtest(paired.lost, thrown).pvalue) if thrown else 1.0


def bootstrap_interval(paired: Paired, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the difference of accuracies (Efron and Tibshirani 1993, chapter 13).

    Images are drawn again with what both networks made of them, 10,000 times. An image counts +1, -1 or 0, so a draw of
    all images is a draw from a multinomial distribution, and is made as one.
    """
    counts = np.array([paired.gained, paired.lost, paired.images - paired.gained - paired.lost])
    drawn = np.random.default_rng(seed).multinomial(paired.images, counts / paired.images, _DRAWS)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / paired.images, [0.025, 0.975])
    return float(low), float(high)
