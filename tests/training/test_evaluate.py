"""The figures are what their definitions say, worked out by hand."""

from typing import Any

import numpy as np
import pytest


def answers(labels: list[int], read: list[int], confidence: float = 0.91) -> tuple[np.ndarray, np.ndarray]:
    probabilities = np.full((len(read), 10), (1 - confidence) / 9)
    probabilities[np.arange(len(read)), read] = confidence
    return probabilities, np.array(labels)


def measure(labels: list[int], read: list[int], confidence: float = 0.91) -> dict[str, Any]:
    from training.evaluate import measure

    return measure(*answers(labels, read, confidence), bin_count=10)


def test_precision_recall_and_f1_by_hand() -> None:
    """Of three zeros two are read as 0; of one 1 none, and of the rest all are read right."""
    labels = [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    read = [0, 0, 1, 0, 2, 3, 4, 5, 6, 7, 8, 9]
    metrics = measure(labels, read)
    zero, one = metrics["classes"][:2]
    # Wilson's interval of 2 of 3, with z = 1.96: (2/3 + z²/6 ± z √((2/3)(1/3)/3 + z²/36)) / (1 + z²/3)
    low, high = pytest.approx(0.2077, abs=1e-4), pytest.approx(0.9385, abs=1e-4)
    two_thirds = pytest.approx(2 / 3)
    figures = {}
    for name in ("precision", "recall", "f1"):
        figures |= {name: two_thirds, f"{name}_low": low, f"{name}_high": high}
    assert zero == {"digit": 0, "images": 3, **figures}
    none_of_one = pytest.approx(0.7935, abs=1e-4)  # z² / (1 + z²)
    for name in ("precision", "recall", "f1"):
        figures |= {name: 0.0, f"{name}_low": 0.0, f"{name}_high": none_of_one}
    assert one == {"digit": 1, "images": 1, **figures}
    assert metrics["accuracy"] == 10 / 12
    assert metrics["errors"] == 2
    assert metrics["macro_recall"] == pytest.approx((2 / 3 + 0 + 8) / 10)
    assert metrics["min_class_recall"] == 0.0


def test_log_likelihood_brier_and_calibration_error_by_hand() -> None:
    """Ten answers at 91 %, nine of them right: the calibration error is 1 %."""
    labels = list(range(10))
    metrics = measure(labels, [*labels[:9], 0])
    wrong = 0.01
    assert metrics["nll"] == pytest.approx(-(9 * np.log(0.91) + np.log(wrong)) / 10)
    assert metrics["ece"] == pytest.approx(abs(0.9 - 0.91))
    right_brier = 0.09**2 + 9 * wrong**2
    wrong_brier = 0.91**2 + 0.99**2 + 8 * wrong**2
    assert metrics["brier"] == pytest.approx((9 * right_brier + wrong_brier) / 10)


def test_every_answer_falls_in_one_bin() -> None:
    from training.evaluate import reliability_bins

    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(10, 0.2), 500)
    probabilities[0] = np.eye(10)[3]  # exactly 1
    bins = reliability_bins(probabilities, rng.integers(0, 10, 500), 15)
    assert sum(b["count"] for b in bins) == 500
    for b in bins:
        assert not b["count"] or b["low"] < b["confidence"] <= b["high"] + 1e-12


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(9920, 10000, 0.99006, 0.99358), (10, 10, 0.72247, 1.0), (0, 10, 0.0, 0.27753), (0, 0, 0.0, 1.0)],
)
def test_the_wilson_interval_agrees_with_its_tables(right: int, count: int, low: float, high: float) -> None:
    from training.intervals import wilson_interval

    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("share", [0, 1])
def test_the_wilson_interval_holds_the_share_where_all_or_none_are_right(share: int) -> None:
    """For any count, in spite of rounding: plots draw the distance to either end."""
    from training.intervals import wilson_interval

    for count in range(1, 5_000):
        low, high = wilson_interval(share * count, count)
        assert 0.0 <= low <= share <= high <= 1.0


def test_the_confusion_matrix_has_true_digits_in_rows() -> None:
    from training.evaluate import confusion_matrix

    confusion = confusion_matrix(np.array([3, 3, 8]), np.array([3, 8, 8]), 10)
    assert (confusion[3, 3], confusion[3, 8], confusion[8, 8]) == (1, 1, 1)
    assert confusion.sum() == 3


def test_a_calibrated_network_still_has_a_calibration_error() -> None:
    """100 answers at 90 %: the share that is right has a deviation of 3 %, whose mean absolute value is 2.4 %."""
    from training.evaluate import calibrated_ece

    probabilities, _ = answers([0] * 100, [0] * 100, confidence=0.9)
    mean, high = calibrated_ece(probabilities, 15)
    assert mean == pytest.approx(0.03 * np.sqrt(2 / np.pi), abs=0.004)
    assert high == pytest.approx(0.03 * 1.96, abs=0.012)


def test_macro_intervals_are_those_of_images_drawn_again() -> None:
    """200 of two classes, 90 % right: the mean recall's deviation is that of 200 answers; perfect answers have none."""
    from training.evaluate import macro_intervals

    labels = np.repeat([0, 1], 100)
    read = labels.copy()
    read[::10] = 1 - read[::10]
    low, high = macro_intervals(labels, read, 2)["macro_recall"]
    deviation = np.sqrt(0.9 * 0.1 / 200)
    assert (low, high) == pytest.approx((0.9 - 1.96 * deviation, 0.9 + 1.96 * deviation), abs=0.01)
    assert macro_intervals(labels, labels, 2)["macro_f1"] == (1.0, 1.0)
