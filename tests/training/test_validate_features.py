"""The features of drawings whose measures are known."""

from typing import get_args

import numpy as np
import pandas as pd
import pytest

from digits.contract import DIGITS
from training.params import FeatureName
from training.validation.drift import compare
from training.validation.features import CHUNK_IMAGES, FEATURES, measure
from training.workspace import Split


def bar(rows: slice, columns: slice) -> np.ndarray:
    image = np.zeros((28, 28), np.uint8)
    image[rows, columns] = 255
    return image


def test_params_know_the_features_that_are_measured() -> None:
    assert set(get_args(FeatureName)) == set(FEATURES)


def test_an_upright_bar_has_the_measures_of_one() -> None:
    """20 pixels high, 3 wide, from row 4 and column 12."""
    row = measure(bar(slice(4, 24), slice(12, 15))[None]).iloc[0]
    assert row["ink_px"] == 60
    assert (row["centroid_x_px"], row["centroid_y_px"]) == (13, 13.5)
    assert row["spread_x_px"] == pytest.approx(np.sqrt((3**2 - 1) / 12))
    assert row["spread_y_px"] == pytest.approx(np.sqrt((20**2 - 1) / 12))
    assert row["slant"] == pytest.approx(0)
    assert row["stroke_width_px"] == pytest.approx(2 * 60 / 46)
    assert row["border_ink"] == 0
    share = 60 / 784
    assert row["entropy_bits"] == pytest.approx(-share * np.log2(share) - (1 - share) * np.log2(1 - share))


def test_a_stroke_that_leans_right_has_a_positive_slant_and_its_mirror_the_negative() -> None:
    image = np.zeros((28, 28), np.uint8)
    for y in range(4, 24):
        image[y, 23 - y : 26 - y] = 255  # one pixel to the left for each pixel down
    leaning, mirrored = (measure(i[None])["slant"].iloc[0] for i in (image, image[:, ::-1]))
    assert leaning == pytest.approx(1)
    assert mirrored == pytest.approx(-1)


def test_paper_alone_is_measured_without_a_number_that_is_none() -> None:
    row = measure(np.zeros((1, 28, 28), np.uint8)).iloc[0]
    assert np.isfinite(row.to_numpy(np.float64)).all()
    assert row["ink_px"] == row["entropy_bits"] == row["stroke_width_px"] == 0


def test_chunks_make_no_difference(real: dict[str, Split], monkeypatch: pytest.MonkeyPatch) -> None:
    images = real["train"].images[:1000]
    whole, told = measure(images), []
    monkeypatch.setattr("training.validation.features.CHUNK_IMAGES", 64)
    pd.testing.assert_frame_equal(measure(images, told.append), whole)
    assert sum(told) == 1000
    assert len(told) == 16
    assert CHUNK_IMAGES > 64


def test_drift_is_an_effect_beyond_chance() -> None:
    """Two draws of one kind do not drift; a shift by one standard deviation is an effect of about 1."""
    rng = np.random.default_rng(0)

    def draw(count: int, shift: float) -> pd.DataFrame:
        frame = pd.DataFrame({feature: rng.normal(5, 2, count) for feature in FEATURES})
        frame["slant"] += 2 * shift
        return frame.assign(label=rng.integers(0, 10, count))

    same, shifted = (compare(draw(3000, 0), draw(1000, by), DIGITS) for by in (0, 1))
    assert same["effect"].max() < 0.1
    assert same["psi"].max() < 0.02
    slant = shifted.set_index("name").loc["slant"]
    assert slant["d"] == pytest.approx(1, abs=0.1)
    assert 0.8 < slant["effect"] < slant["d"]
    assert slant["psi"] > 0.5
    assert shifted[shifted["feature"] != "slant"]["effect"].max() < 0.1


def test_a_constant_that_changed_is_a_drift() -> None:
    constant = pd.DataFrame(dict.fromkeys(FEATURES, [1.0] * 50)).assign(label=3)
    assert compare(constant, constant, DIGITS)["effect"].max() == 0
    assert compare(constant, constant.assign(slant=2.0), DIGITS)["effect"].max() > 10
