"""Images of nothing known: what they are, and that a network learns from them to be unsure."""

import io

import numpy as np
import pytest
from rich.console import Console

from tests.training.conftest import make_workspace
from training.outliers import draw_outliers
from training.workspace import Split


@pytest.fixture(scope="module")
def learn(real: dict[str, Split]) -> Split:
    return Split(real["train"].images[:1200], real["train"].labels[:1200])


@pytest.mark.parametrize("count", [1, 11, 600])
def test_as_many_as_asked_the_same_for_the_same_seed(learn: Split, count: int) -> None:
    drawn = draw_outliers(learn, count, seed=3)
    assert drawn.shape == (count, 28, 28)
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn, draw_outliers(learn, count, seed=3))
    assert not np.array_equal(drawn, draw_outliers(learn, count, seed=4))


def test_no_two_are_the_same_and_none_is_an_image_learnt_from(learn: Split) -> None:
    drawn = draw_outliers(learn, 600, seed=3).reshape(600, -1)
    assert len(np.unique(drawn, axis=0)) == 600
    assert len(np.unique(np.concatenate([drawn, learn.images.reshape(1200, -1)]), axis=0)) == 1800


def test_a_network_that_learnt_with_outliers_is_less_sure_of_others(tmp_path, real) -> None:
    """Ten epochs each: unsure of half as many again of outliers it has not met, and as sure of digits."""
    from training.model import build_predict
    from training.train import fit

    learn = Split(real["train"].images[2000:6000], real["train"].labels[2000:6000])
    held_out = Split(real["train"].images[1200:1500], real["train"].labels[1200:1500])
    strange = draw_outliers(learn, 300, seed=9)
    unsure, sure = {}, {}
    for share in (0.0, 0.5):
        changes = {"train.outlier_share": share, "train.epochs": 10, "model.hidden_widths": [256, 128]}
        _, params = make_workspace(tmp_path / str(share), real, **changes)
        model, history = fit(learn, held_out, params, Console(file=io.StringIO()))
        answer = build_predict(model)
        unsure[share] = float((answer(strange).max(axis=1) < 0.5).mean())
        sure[share] = float(answer(held_out.images).max(axis=1).mean())
        assert history[-1].validation_accuracy > 0.9
    assert unsure[0.5] > 1.5 * unsure[0.0]
    assert sure[0.5] > 0.97 * sure[0.0]
