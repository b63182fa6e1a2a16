"""Do the labels fit the pictures? Each is compared with what the other images say.

A quadratic classifier (the pairwise products of an image's leading principal components, fitted by ridge regression to
the classes; LeCun et al. 1998, section "Principal Component Analysis (PCA) and Polynomial Classifier", 3.3 % error)
reads each image without having seen it: training images by cross-validation, test images after fitting on training
images only. It learns a few of the labels wrong or not, which hardly moves it: a label that it contradicts with a wide
margin is doubtful, as in confident learning (Northcutt et al. 2021).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from training.workspace import Split

FITTED_IMAGES = 20_000
"""At most so many training images are fitted on, evenly spread; more would not change what is found."""
FEWEST_IMAGES = 200
"""With fewer to fit on, nothing can be said."""
DOUBTFUL = 0.5
"""A label with more doubt is doubtful: the scores are fitted to 1 for the class and 0 for the others."""

_FOLDS = 5
_MOST_COMPONENTS = 30
_IMAGES_PER_TERM = 6
_RIDGE = 1e-3
_CHUNK_IMAGES = 4096


@dataclass(frozen=True)
class Reading:
    """What the classifier says of N images."""

    likely: np.ndarray
    """int64 (N,): the class it reads; -1 where nothing can be said."""
    doubt: np.ndarray
    """float64 (N,): the score of the best other class less that of the label, about -1 to 1; 0 where unknown."""


def read_labels(
    train: Split, test: Split, class_count: int, advance: Callable[[int], None] = lambda _count: None
) -> dict[str, Reading]:
    """What the training images say of all images, ``train`` and ``test``.

    Labels that are of no class are left out of the fit and not judged. ``advance`` is told the number of images read.
    """
    images, labels = train.images, train.labels
    known = np.flatnonzero((labels >= 0) & (labels < class_count))
    fitted = known[:: -(-len(known) // FITTED_IMAGES) or 1]
    if len(fitted) < FEWEST_IMAGES:
        return {"train": _unread(len(labels)), "test": _unread(len(test.labels))}
    terms = _Terms(images[fitted])
    folds = np.arange(len(labels)) % _FOLDS
    folds[fitted] = np.arange(len(fitted)) % _FOLDS  # whatever their spacing, no fold has more than its share
    by_fold, everything = _fit(terms, images, labels, class_count, fitted, folds)
    return {
        "train": _judge(terms, train, by_fold, folds, advance),
        "test": _judge(terms, test, everything[None], np.zeros(len(test.labels), np.int64), advance),
    }


class _Terms:
    """Image -> a constant, its leading principal components, and their products in pairs."""

    def __init__(self, images: np.ndarray) -> None:
        components = _MOST_COMPONENTS
        while (components + 1) * (components + 2) // 2 > len(images) / _IMAGES_PER_TERM:
            components -= 1
        pooled = _pool(images)  # (N, 196)
        self._mean = pooled.mean(axis=0)
        variances, axes = np.linalg.eigh(np.cov(pooled - self._mean, rowvar=False))
        size = np.sqrt(max(variances[-components:].sum(), 1e-12))
        self._axes = (axes[:, -components:] / size * 3.0).astype(np.float32)  # so that products are about 1
        self.count = (components + 1) * (components + 2) // 2

    def __call__(self, images: np.ndarray) -> np.ndarray:
        along = (_pool(images) - self._mean) @ self._axes
        terms = np.empty((len(images), self.count), np.float32)
        terms[:, 0] = 1.0
        terms[:, 1 : 1 + along.shape[1]] = along
        first = 1 + along.shape[1]
        for component in range(along.shape[1]):
            partners = along[:, component:]
            np.multiply(along[:, component, None], partners, out=terms[:, first : first + partners.shape[1]])
            first += partners.shape[1]
        return terms


def _pool(images: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels as 0 to 1: float32 (N, 196)."""
    sums = np.zeros((len(images), IMAGE_HEIGHT // 2, IMAGE_WIDTH // 2), np.uint16)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        sums += images[:, row::2, column::2]
    return sums.reshape(len(images), -1).astype(np.float32) / np.float32(4 * 255)


def _fit(
    terms: _Terms, images: np.ndarray, labels: np.ndarray, class_count: int, fitted: np.ndarray, folds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (folds, terms, C), each fitted without the rows of its fold, and weights (terms, C) of all rows."""
    squares = np.zeros((_FOLDS, terms.count, terms.count))
    products = np.zeros((_FOLDS, terms.count, class_count))
    for rows in _chunks(fitted):
        values, truth = terms(images[rows]), np.eye(class_count, dtype=np.float32)[labels[rows]]
        for fold in range(_FOLDS):
            inside = folds[rows] == fold
            squares[fold] += values[inside].T @ values[inside]
            products[fold] += values[inside].T @ truth[inside]
    all_squares, all_products = squares.sum(axis=0), products.sum(axis=0)
    by_fold = [_solve(all_squares - squares[f], all_products - products[f]) for f in range(_FOLDS)]
    return np.stack(by_fold), _solve(all_squares, all_products)


def _solve(squares: np.ndarray, products: np.ndarray) -> np.ndarray:
    ridge = _RIDGE * np.trace(squares) / len(squares)
    weights: np.ndarray = np.linalg.solve(squares + ridge * np.eye(len(squares)), products).astype(np.float32)
    return weights


def _judge(
    terms: _Terms, split: Split, weights: np.ndarray, folds: np.ndarray, advance: Callable[[int], None]
) -> Reading:
    """Read images, each with the weights that were fitted without its fold."""
    likely = np.empty(len(split.labels), np.int64)
    doubt = np.zeros(len(split.labels))
    for rows in _chunks(np.arange(len(split.labels))):
        values = terms(split.images[rows])
        scores = np.empty((len(rows), weights.shape[2]), np.float32)
        for fold, fold_weights in enumerate(weights):
            inside = folds[rows] == fold
            scores[inside] = values[inside] @ fold_weights
        likely[rows] = scores.argmax(axis=1)
        doubt[rows] = _margin_against(scores, split.labels[rows])
        advance(len(rows))
    return Reading(likely, doubt)


def _margin_against(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero((labels >= 0) & (labels < scores.shape[1]))
    margin = np.zeros(len(labels))
    own = scores[rows, labels[rows]].copy()
    others = scores[rows]
    others[np.arange(len(rows)), labels[rows]] = -np.inf
    margin[rows] = others.max(axis=1) - own
    return margin


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), _CHUNK_IMAGES):
        yield rows[first : first + _CHUNK_IMAGES]


def _unread(count: int) -> Reading:
    return Reading(np.full(count, -1, np.int64), np.zeros(count))
