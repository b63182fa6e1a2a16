"""Are test images of the same kind as training images? Differences as effect sizes, beyond what chance explains.

With 60,000 images every difference is significant and none may matter, so sizes are judged and not p-values; with 300,
chance alone makes a size, so three standard errors are taken off.
"""

import numpy as np
import pandas as pd

from training.validation.features import FEATURES

_STANDARD_ERRORS = 3.0
_BINS = 10


def compare(train: pd.DataFrame, test: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """A row for each feature over all images (``label`` is "all"), then for each feature of each class.

    Returns:
        ``name``, ``feature``, ``label``; ``d``, Cohen's d of test against train in pooled standard deviations;
        ``effect``, how far its size exceeds three of its standard errors, 0 if not; ``psi``, the population stability
        index over tenths of the training images beyond its expectation by chance, for all classes together only (0
        elsewhere). Where either side has fewer than two images nothing is compared: 0.
    """
    rows = [_row(f, f, "all", train[f], test[f], _psi(train[f], test[f])) for f in FEATURES]
    for label, name in enumerate(classes):
        of_train, of_test = train[train["label"] == label], test[test["label"] == label]
        rows += [_row(f"{f} of class {name}", f, name, of_train[f], of_test[f], 0.0) for f in FEATURES]
    return pd.DataFrame(rows)


def _row(name: str, feature: str, label: str, train: pd.Series, test: pd.Series, psi: float) -> dict[str, object]:
    d, error = _cohens_d(train.to_numpy(), test.to_numpy())
    effect = max(0.0, abs(d) - _STANDARD_ERRORS * error)
    return {"name": name, "feature": feature, "label": label, "d": d, "effect": effect, "psi": psi}


def _cohens_d(train: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """Cohen's d and its standard error (Hedges and Olkin 1985)."""
    n, m = len(train), len(test)
    if n < 2 or m < 2:
        return 0.0, 0.0
    pooled = ((n - 1) * train.var(ddof=1) + (m - 1) * test.var(ddof=1)) / (n + m - 2)
    if pooled < 1e-12:
        # Two constants: the same, or apart by any number of their standard deviations.
        return (0.0 if np.isclose(train[0], test[0]) else float(np.sign(test[0] - train[0])) * 100.0), 0.0
    d = (test.mean() - train.mean()) / np.sqrt(pooled)
    return float(d), float(np.sqrt((n + m) / (n * m) + d * d / (2 * (n + m))))


def _psi(train: pd.Series, test: pd.Series) -> float:
    """The population stability index less its mean under chance, (bins - 1) (1/n + 1/m); at least 0."""
    n, m = len(train), len(test)
    if n < 2 or m < 2:
        return 0.0
    # A feature that is often the same value has fewer tenths than ten.
    edges = np.unique(np.quantile(train, np.linspace(0, 1, _BINS + 1)[1:-1]))
    expected = np.bincount(np.searchsorted(edges, train, side="right"), minlength=len(edges) + 1)
    came = np.bincount(np.searchsorted(edges, test, side="right"), minlength=len(edges) + 1)
    p, q = (expected + 0.5) / (n + 0.5 * len(expected)), (came + 0.5) / (m + 0.5 * len(came))
    index = float(((q - p) * np.log(q / p)).sum())
    return max(0.0, index - len(edges) * (1 / n + 1 / m))
