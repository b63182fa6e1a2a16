"""The statistics of two networks on the same images, against values worked out by hand."""

import numpy as np
import pytest

from training.paired import Paired, bootstrap_interval, mcnemar, pair


def test_only_images_that_one_of_the_two_reads_right_are_counted() -> None:
    new = np.array([1, 1, 1, 0, 0, 0], bool)
    old = np.array([1, 0, 0, 1, 0, 0], bool)
    assert pair(new, old) == Paired(images=6, gained=2, lost=1)
    assert pair(new, old).difference == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),  # two ways of two
        (0, 5, 2 / 32),
        (0, 6, 2 / 64),
        (6, 0, 2 / 64),
        (2, 10, 2 * (1 + 12 + 66) / 2**12),
        (1, 8, 2 * (1 + 9) / 2**9),
    ],
)
def test_mcnemars_p_is_both_tails_of_fair_throws(gained: int, lost: int, p: float) -> None:
    """Binomial coefficients summed by hand; images on which both agree do not matter."""
    assert mcnemar(Paired(20, gained, lost)) == pytest.approx(p)
    assert mcnemar(Paired(10_000, gained, lost)) == pytest.approx(p)


def test_the_bootstrap_interval_is_that_of_images_drawn_again() -> None:
    """Against the drawing of images themselves, one by one, and against the normal approximation."""
    paired = Paired(2_000, gained=30, lost=50)
    worth = np.repeat([1, -1, 0], [30, 50, 1_920])
    draws = np.random.default_rng(1).choice(worth, (4_000, 2_000)).mean(axis=1)
    low, high = bootstrap_interval(paired)
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=6e-4)
    assert (low, high) == pytest.approx(paired.difference + 1.96 * np.array([-1, 1]) * np.sqrt(80) / 2_000, abs=6e-4)


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    """200 samples of 10,000 images from networks that differ by -0.002: 95 % of the intervals hold it, within 5 %."""
    samples = np.random.default_rng(2).multinomial(10_000, [0.003, 0.005, 0.992], 200)
    intervals = [bootstrap_interval(Paired(10_000, int(gained), int(lost))) for gained, lost, _ in samples]
    held = np.mean([low <= -0.002 <= high for low, high in intervals])
    assert 0.90 < held < 1.0


def test_the_same_counts_give_the_same_interval_and_equal_answers_one_of_no_width() -> None:
    assert bootstrap_interval(Paired(500, 3, 4)) == bootstrap_interval(Paired(500, 3, 4))
    assert bootstrap_interval(Paired(500, 0, 0)) == (0.0, 0.0)
