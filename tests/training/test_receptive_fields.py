"""Receptive fields learn in unison and end as dense layers."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.training.conftest import make_workspace
from training.params import Params
from training.workspace import Split

FIELDS = [{"size": 5, "stride": 2, "features": 4}, {"size": 5, "stride": 2, "features": 8, "padding": "same"}]
QUIET = Console(quiet=True)
UNITS = [12 * 12 * 4, 6 * 6 * 8]


@pytest.fixture
def params(tmp_path: Path, real: dict[str, Split]) -> Params:
    changes = {
        "model.receptive_fields": FIELDS,
        "model.hidden_widths": [16],
        "train.epochs": 2,
        "train.free_epochs": 1,
    }
    return make_workspace(tmp_path, real, **changes)[1]


@pytest.mark.parametrize("normalisation", ["batch", "none"])
def test_freed_layers_answer_as_the_tied_ones_did(params: Params, real: dict[str, Split], normalisation: str) -> None:
    """Every number of a layer counts: kernels, offsets and the statistics of batches are drawn at random."""
    from training.model import build_model, build_predict
    from training.receptive_fields import free

    setting = params.model.model_copy(update={"normalisation": normalisation})
    tied = build_model(setting, 10, "float32")
    rng = np.random.default_rng(1)
    for weight in tied.weights:
        weight.assign(weight + rng.uniform(0.1, 0.4, weight.shape).astype(np.float32))
    freed = free(tied, setting, "float32")
    images = real["test"].images[:50]
    expected = build_predict(tied, logits=True)(images)
    assert np.ptp(expected) > 1.0
    np.testing.assert_allclose(build_predict(freed, logits=True)(images), expected, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(28, 28), (20, 28)])
def test_a_field_computed_in_rows_is_a_convolution(stride: int, size: tuple[int, int]) -> None:
    """Its answers and its kernel's gradient, against TensorFlow's convolution, wherever places end."""
    import tensorflow as tf

    from training.model import Field

    rng = np.random.default_rng(3)
    images = tf.constant(rng.normal(size=(7, *size, 1)), tf.float32)
    field = Field(6, 5, stride)
    field.build(images.shape)
    with tf.GradientTape(persistent=True) as tape:
        found = field(images)
        expected = tf.nn.conv2d(images, field.kernel.value, stride, "VALID") + field.bias.value
        losses = [tf.reduce_sum(tf.square(answers)) for answers in (found, expected)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    gradient, wanted = (tape.gradient(loss, field.kernel.value) for loss in losses)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-2)


def test_what_comes_out_is_dense_layers_whose_weights_have_gone_their_own_ways(
    params: Params, real: dict[str, Split]
) -> None:
    """Not a convolution in disguise: weights that were 0 or the same are neither after the free epochs."""
    import keras

    from training.train import fit

    learn, held_out = (Split(real[n].images[:300], real[n].labels[:300]) for n in ("train", "test"))
    model, history = fit(learn, held_out, params, QUIET)
    assert [epoch.epoch for epoch in history] == [1, 2, 3]
    assert not [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    assert [layer.units for layer in dense] == [*UNITS, 16, 10]

    kernel = np.asarray(dense[0].kernel).reshape(28, 28, 12, 12, 4)
    inside = np.stack([kernel[2 * i : 2 * i + 5, 2 * i : 2 * i + 5, i, i] for i in range(3, 9)])  # (6, 5, 5, 4)
    assert np.abs(inside - inside[0]).max() > 1e-5
    outside = kernel[14:18, 14:18, 0, 0]
    assert np.abs(outside).max() > 1e-6


def test_the_same_seed_gives_the_same_freed_weights(params: Params, real: dict[str, Split]) -> None:
    from training.model import model_sha256
    from training.train import fit

    learn = Split(real["train"].images[:300], real["train"].labels[:300])
    first, again = (model_sha256(fit(learn, learn, params, QUIET)[0]) for _ in range(2))
    assert first == again
