"""How clearly an answer stands before the others: by this it is judged whether it had better not be used."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

WEIGHT_OF_OTHERS: Final = 0.2
"""Found on held-out images, docs/decisions/0039: with 1 certainty is the answer's probability, with 0 it is blind to
what is spread over many classes, as for a letter."""


def certainty(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """The certainty of each answer, 0..1: float (N, C) -> float64 (N,).

    ``p1 / (p1 + p2 + 0.2 (1 - p1 - p2))`` of the likeliest class's probability and the next one's. A rival costs five
    times what the same probability spread over other classes costs: where two digits compete the answer is often wrong,
    where many have a little each it is only less sure. Never below the answer's probability, and equal to it where
    there are two classes.
    """
    if probabilities.shape[1] < 2:
        return np.ones(len(probabilities))
    ordered = np.partition(probabilities.astype(np.float64), -2, axis=1)
    second, best = ordered[:, -2], ordered[:, -1]
    others = np.maximum(1.0 - best - second, 0.0)
    found: NDArray[np.float64] = best / (best + second + WEIGHT_OF_OTHERS * others)
    return found
