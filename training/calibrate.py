"""How sure should the network be, and when should it rather not answer? Fitted on validation images alone."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from digits.certainty import certainty

_LEAST, _GREATEST = 0.05, 20.0


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number to divide logits by so that confidence and accuracy agree best.

    It changes how sure answers are and never which digit is read (Guo et al., "On calibration of modern neural
    networks", ICML 2017). One number fitted on thousands of images does not overfit them.

    Args:
        logits: float (N, C), N at least 1.
        labels: int (N,), the true digits.

    Returns:
        The temperature with the least negative log-likelihood, 0.05 to 20; above 1 for a network that is too sure.
    """
    rows = np.arange(len(labels))
    logits = logits.astype(np.float64)

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels].mean())

    found = minimize_scalar(loss, bounds=(np.log(_LEAST), np.log(_GREATEST)), method="bounded")
    return float(np.exp(found.x))


def abstention_threshold(probabilities: np.ndarray, share: float) -> float:
    """The certainty below which ``share`` of these answers lie: float (N, C) -> 0..1. With share 0, 0."""
    if share == 0:
        return 0.0
    return float(np.quantile(certainty(probabilities), share))


def selective_curve(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of the surest answers, over how many of them are given (El-Yaniv and Wiener, JMLR 2010).

    Args:
        probabilities: float (N, C).
        labels: int (N,).

    Returns:
        coverage (N,), from 1/N to 1, and the accuracy (N,) of that share of the answers, the surest first.
    """
    right = (probabilities.argmax(axis=1) == labels)[np.argsort(-certainty(probabilities), kind="stable")]
    given = np.arange(1, len(labels) + 1)
    return given / len(labels), np.cumsum(right) / given
