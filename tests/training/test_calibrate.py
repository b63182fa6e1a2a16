"""How sure the network is, and when it had better not answer."""

import numpy as np
import pytest
from scipy.special import softmax

from digits.certainty import certainty
from training.calibrate import abstention_threshold, fit_temperature, selective_curve


@pytest.mark.parametrize("too_sure_by", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found(too_sure_by: float) -> None:
    """Labels drawn from softmax(logits), then the logits multiplied: the fit gives the factor back, within 5 %."""
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (20_000, 10))
    labels = (softmax(logits, axis=1).cumsum(axis=1) > random.uniform(size=(20_000, 1))).argmax(axis=1)
    assert fit_temperature(too_sure_by * logits, labels) == pytest.approx(too_sure_by, rel=0.05)


def test_a_network_that_is_always_right_keeps_a_finite_temperature() -> None:
    """Its loss falls for ever as it grows surer: the bound holds it."""
    logits = 10.0 * np.eye(10)
    assert 0.05 <= fit_temperature(logits, np.arange(10)) < 1.0


def test_certainty_falls_with_a_rival_more_than_with_many_others() -> None:
    """Three answers of 60 %: beside one rival, beside nine equal others, and beside nothing; then a blank mind."""
    probabilities = np.array([[0.6, 0.4] + [0.0] * 8, [0.6] + [0.4 / 9] * 9, [1.0] + [0.0] * 9, [0.1] * 10])
    rival, many, alone, none = certainty(probabilities)
    assert rival == pytest.approx(0.6)
    assert many == pytest.approx(0.6 / (0.6 + 0.4 / 9 + 0.2 * 0.4 * 8 / 9))
    assert alone == 1.0
    assert none == pytest.approx(0.1 / (0.2 + 0.2 * 0.8))


def test_certainty_is_never_below_the_probability_and_is_that_for_two_classes() -> None:
    probabilities = softmax(np.random.default_rng(3).normal(0, 3, (500, 10)), axis=1).astype(np.float32)
    found = certainty(probabilities)
    assert (found >= probabilities.max(axis=1) - 1e-7).all()
    assert (found <= 1.0).all()
    two = np.array([[0.3, 0.7], [0.5, 0.5]])
    assert certainty(two).tolist() == pytest.approx([0.7, 0.5])


def test_the_threshold_leaves_the_share_unanswered_that_was_asked() -> None:
    probabilities = softmax(np.random.default_rng(2).normal(0, 3, (1_000, 10)), axis=1)
    threshold = abstention_threshold(probabilities, 0.01)
    assert (certainty(probabilities) < threshold).mean() == pytest.approx(0.01, abs=0.001)
    assert abstention_threshold(probabilities, 0.0) == 0.0


def test_the_selective_curve_counts_the_surest_first() -> None:
    """Three answers: sure and right, less sure and wrong, unsure and right."""
    probabilities = np.zeros((3, 10))
    probabilities[[0, 1, 2], [4, 5, 6]] = [0.6, 0.9, 0.7]
    probabilities[[0, 1, 2], 7] = [0.4, 0.1, 0.3]
    coverage, accuracy = selective_curve(probabilities, np.array([4, 5, 0]))
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert accuracy.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
