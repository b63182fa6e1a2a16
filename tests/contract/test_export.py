"""What is exported is what digits/contract.py says, and answers as Keras does."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from digits import contract
from training.params import ModelParams
from training.workspace import BadArtifact, import_tensorflow_quietly

ROOT = Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(3).integers(0, 256, (40, 28, 28), dtype=np.uint8)


def make_model(**changes: Any) -> Any:
    """An untrained network whose batch normalisation has seen data: nothing in it is 0 or 1 by chance."""
    import_tensorflow_quietly()
    import keras

    from training.model import build_model

    settings = {"hidden_widths": (32, 16), "activation": "relu", "normalisation": "batch", "dropout": 0.1, "l2": 0.0}
    settings |= {"receptive_fields": (), "averaged_turn_deg": 0.0, "least_contrast": 0.2, "paper_share": 0.0}
    keras.utils.set_random_seed(5)
    model = build_model(ModelParams(**{**settings, **changes}), len(contract.DIGITS), "float32")
    rng = np.random.default_rng(4)
    weights = [rng.uniform(0.2, 1.2, w.shape) for w in model.get_weights()]
    model.set_weights([w * rng.choice([-0.1, 0.1], w.shape) if w.ndim == 2 else w for w in weights])
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def exported(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training.export import write_saved_model

    folder = tmp_path_factory.mktemp("export") / "saved_model"
    write_saved_model(folder, model, contract.DIGITS, IMAGES[:10], warmup_batch_sizes=(1, 4))
    return folder


def ask(folder: Path, signature: str, **inputs: Any) -> dict[str, np.ndarray]:
    import tensorflow as tf

    answer = tf.saved_model.load(str(folder)).signatures[signature](**{k: tf.constant(v) for k, v in inputs.items()})
    return {name: tensor.numpy() for name, tensor in answer.items()}


def test_signatures_have_the_contracts_names_types_and_shapes(exported: Path) -> None:
    import tensorflow as tf

    signatures = tf.saved_model.load(str(exported)).signatures
    assert set(signatures) == {contract.SIGNATURE, contract.ENCODED_SIGNATURE, contract.CLASSES_SIGNATURE}
    _, inputs = signatures[contract.SIGNATURE].structured_input_signature
    assert inputs == {"images": tf.TensorSpec((None, 28, 28), tf.uint8, name="images")}
    _, inputs = signatures[contract.ENCODED_SIGNATURE].structured_input_signature
    assert inputs == {"image_bytes": tf.TensorSpec((None,), tf.string, name="image_bytes")}
    _, inputs = signatures[contract.CLASSES_SIGNATURE].structured_input_signature
    assert inputs == {"digit": tf.TensorSpec((None,), tf.int64, name="digit")}
    for name in (contract.SIGNATURE, contract.ENCODED_SIGNATURE):
        outputs = signatures[name].structured_outputs
        assert set(outputs) == {"probabilities", "digit"}
        assert outputs["probabilities"].dtype == tf.float32
        assert outputs["probabilities"].shape.as_list() == [None, 10]
        assert outputs["digit"].dtype == tf.int64
        assert outputs["digit"].shape.as_list() == [None]


def test_a_model_says_what_its_classes_are_called_and_how_sure_to_be(model: Any, exported: Path) -> None:
    """Asked by their numbers over the wire, with how sure an answer must be; and in a file beside it."""
    answer = ask(exported, contract.CLASSES_SIGNATURE, digit=np.array([7, 0], np.int64))
    assert answer["name"].tolist() == [b"7", b"0"]
    assert answer["abstain_below"].tolist() == [float(model.get_layer("calibration").abstain_below)] * 2
    assert json.loads((exported / contract.CLASSES_FILE).read_text()) == list(contract.DIGITS)


@pytest.mark.parametrize("normalisation", ["batch", "layer", "none"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "elu", "tanh"])
def test_every_kind_of_network_answers_as_keras_does(tmp_path: Path, normalisation: str, activation: str) -> None:
    """Batch norm is folded, layer norm is not; either way the probabilities are Keras's."""
    from training.export import ServedPerceptron
    from training.model import predict_probabilities

    model = make_model(normalisation=normalisation, activation=activation)
    expected = predict_probabilities(model, IMAGES)
    answer = ServedPerceptron(model, contract.DIGITS).classify(IMAGES)
    assert np.abs(answer["probabilities"].numpy() - expected).max() < 1e-5
    assert np.array_equal(answer["digit"].numpy(), expected.argmax(axis=1))
    assert expected.std() > 0.001  # not all alike


def test_an_answer_averaged_over_turns_is_the_mean_of_the_answers_to_each() -> None:
    """Three times asked by hand, images turned by SciPy; once by the network, once by what is exported of it."""
    import tensorflow as tf

    from training.export import ServedPerceptron
    from training.model import build_predict

    alone, averaging = make_model(least_contrast=1.0), make_model(least_contrast=1.0, averaged_turn_deg=12.0)
    ask_alone = tf.function(lambda images: alone(images, training=False))
    turned = [
        ndimage.rotate(IMAGES.astype(np.float32), angle, axes=(1, 2), reshape=False, order=1, mode="grid-constant")
        for angle in (-12, 0, 12)
    ]
    answers = [np.asarray(ask_alone(images)) for images in turned]
    expected = np.mean(answers, axis=0)
    assert np.std(answers, axis=0).max() > 0.001  # a turn does change the answer
    np.testing.assert_allclose(build_predict(averaging, logits=True)(IMAGES), expected, rtol=1e-4, atol=1e-4)
    shares = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    served = ServedPerceptron(averaging, contract.DIGITS).classify(IMAGES)["probabilities"].numpy()
    np.testing.assert_allclose(served, shares, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("paper_share", [0.0, 0.67])
def test_grey_paper_and_faint_ink_are_no_other_image(paper_share: float) -> None:
    """Brighter, or of half the contrast: the same answer from Keras and what is exported; a blank sheet is blank."""
    from training.export import ServedPerceptron
    from training.model import build_predict

    model = make_model(paper_share=paper_share)
    answer = build_predict(model)
    served = ServedPerceptron(model, contract.DIGITS)
    images = IMAGES // 2 * 2
    expected = answer(images)
    for changed in (images // 2, images // 2 + 90):
        np.testing.assert_allclose(answer(changed), expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(served.classify(changed)["probabilities"], expected, rtol=1e-3, atol=1e-4)
    grey = np.full((3, 28, 28), 200, np.uint8)
    np.testing.assert_allclose(answer(grey), answer(np.zeros_like(grey)), rtol=1e-4)
    as_it_is = build_predict(make_model(least_contrast=1.0))
    assert np.abs(as_it_is(images // 2) - as_it_is(images)).max() > 0.01


def test_paper_may_be_told_from_the_edge_whatever_one_pixel_or_one_side_says() -> None:
    """A pixel lighter than the paper, and ink all along one side: with a ``paper_share`` the rest stays as it was."""
    from training.model import stretch

    grey = np.pad(IMAGES[:, 4:24, 4:24], ((0, 0), (4, 4), (4, 4))).astype(np.float32) / 510 + 0.3
    expected = np.asarray(stretch(grey, 0.2, 0.67))
    np.testing.assert_allclose(expected, stretch(grey, 0.2), atol=1e-6)
    odd, beside = grey.copy(), grey.copy()
    odd[:, 0, 0] = 0.0
    beside[:, :, :4] = grey.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(stretch(odd, 0.2, 0.67), expected, atol=0.02)
    np.testing.assert_allclose(np.asarray(stretch(beside, 0.2, 0.67))[:, :, 4:], expected[:, :, 4:], atol=1e-5)
    assert np.abs(np.asarray(stretch(odd, 0.2)) - expected).max() > 0.2


def test_batch_norm_is_folded_away(model: Any) -> None:
    from training.export import fold_layers

    layers = fold_layers(model)
    assert [kernel.shape for kernel, *_ in layers] == [(784, 32), (32, 16), (16, 10)]
    assert all(norm is None for _, _, norm, _ in layers)
    assert all(kernel.dtype == bias.dtype == np.float32 for kernel, bias, *_ in layers)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_any_number_of_images_is_answered(exported: Path, count: int) -> None:
    answer = ask(exported, contract.SIGNATURE, images=IMAGES[:count])
    assert answer["probabilities"].shape == (count, 10)
    assert answer["digit"].shape == (count,)


def test_a_png_is_answered_as_its_pixels_are(exported: Path) -> None:
    files = []
    for image in IMAGES[:3]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    encoded = ask(exported, contract.ENCODED_SIGNATURE, image_bytes=np.array(files, object))
    plain = ask(exported, contract.SIGNATURE, images=IMAGES[:3])
    assert np.array_equal(encoded["probabilities"], plain["probabilities"])


def test_an_encoded_picture_of_another_size_is_refused_in_words(exported: Path) -> None:
    import tensorflow as tf

    buffer = io.BytesIO()
    Image.new("L", (30, 28)).save(buffer, "PNG")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"expected an image of 28 x 28 pixels, got .*\[28 30\]"):
        ask(exported, contract.ENCODED_SIGNATURE, image_bytes=np.array([buffer.getvalue()], object))


def test_warm_up_records_are_predict_requests_that_the_model_answers(exported: Path) -> None:
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    shapes = []
    for record in tf.data.TFRecordDataset(str(exported / contract.WARMUP_FILE)).as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        assert request.model_spec.name == contract.MODEL_NAME
        inputs = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        answer = ask(exported, request.model_spec.signature_name, **inputs)
        shapes.append((request.model_spec.signature_name, len(answer["digit"])))
    assert shapes == [(contract.SIGNATURE, 1), (contract.SIGNATURE, 4), (contract.ENCODED_SIGNATURE, 1)]


@pytest.mark.parametrize("changes", [
    {}, {"activation": "gelu"}, {"activation": "silu"}, {"activation": "elu"}, {"activation": "tanh"},
    {"normalisation": "layer"}, {"normalisation": "none"}, {"averaged_turn_deg": 12.0},
], ids=str)  # fmt: skip
def test_the_tf_lite_model_answers_as_the_saved_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Whatever the network is made of, any number of images, and every time with the same bytes."""
    from training.export import pack
    from training.verify import predict_lite_model

    model = make_model(**changes)
    pack(tmp_path / "1", model, contract.DIGITS, IMAGES, (1,))
    for count in (1, 7):
        probabilities, digits = predict_lite_model(tmp_path / "1", IMAGES[:count])
        saved = ask(tmp_path / "1", contract.SIGNATURE, images=IMAGES[:count])
        np.testing.assert_allclose(probabilities, saved["probabilities"], atol=1e-5)
        assert digits.tolist() == saved["digit"].tolist()
    pack(tmp_path / "2", model, contract.DIGITS, IMAGES, (1,))
    written = [(tmp_path / name / contract.LITE_FILE).read_bytes() for name in "12"]
    assert written[0] == written[1]


def run_verify(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from training.__main__ import app; app(['verify', sys.argv[1]], standalone_mode=False); "
    code += "print('tensorflow' in sys.modules, 'keras' in sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "DO_NOT_TRACK": "1"},
    )  # fmt: skip


def test_verify_accepts_the_export_in_a_fresh_process_without_keras(exported: Path) -> None:
    done = run_verify(exported)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "answers as the trained model did" in done.stderr
    assert done.stdout == "True False\n"


def test_verify_refuses_altered_golden_answers(exported: Path, tmp_path: Path) -> None:
    from training.verify import GOLDEN_FILE, NotTheSame, verify

    copy = shutil.copytree(exported, tmp_path / "copy")
    with np.load(copy / GOLDEN_FILE) as golden:
        images, probabilities = golden["images"], golden["probabilities"]
    np.savez(copy / GOLDEN_FILE, images=images, probabilities=np.roll(probabilities, 1, axis=1))
    with pytest.raises(NotTheSame, match="answers otherwise than Keras did"):
        verify(copy)
    np.savez(copy / GOLDEN_FILE, images=images, probabilities=np.full_like(probabilities, np.nan))
    with pytest.raises(NotTheSame):
        verify(copy)


def test_verify_refuses_a_tf_lite_model_of_another_network(exported: Path, tmp_path: Path) -> None:
    from training.export import pack
    from training.verify import NotTheSame, verify

    copy = shutil.copytree(exported, tmp_path / "copy")
    pack(tmp_path / "other", make_model(hidden_widths=(8,)), contract.DIGITS, IMAGES, (1,))
    shutil.copy(tmp_path / "other" / contract.LITE_FILE, copy)
    with pytest.raises(NotTheSame, match=r"model\.tflite answers otherwise"):
        verify(copy)
    (copy / contract.LITE_FILE).write_bytes(b"TFL3 no model")
    with pytest.raises(BadArtifact, match="no complete TF Lite model"):
        verify(copy)
    (copy / contract.LITE_FILE).unlink()  # as versions of before
    verify(copy)


@pytest.mark.parametrize("missing", ["saved_model.pb", "variables/variables.index", "assets.extra/golden.npz"])
def test_verify_refuses_an_incomplete_folder(exported: Path, tmp_path: Path, missing: str) -> None:
    from training.verify import verify

    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / missing).unlink()
    with pytest.raises(BadArtifact, match=r"no complete version|no readable"):
        verify(copy)


def test_a_network_that_is_not_folded_rightly_is_not_exported(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export compares itself with Keras before anyone may publish it."""
    from training import export
    from training.verify import NotTheSame

    def forget_an_offset(model: Any) -> list[tuple[Any, ...]]:
        layers = fold(model)
        kernel, bias, *rest = layers[-1]
        return [*layers[:-1], (kernel, bias + np.linspace(0, 5, 10, dtype=np.float32), *rest)]

    fold = export.fold_layers
    monkeypatch.setattr(export, "fold_layers", forget_an_offset)
    with pytest.raises(NotTheSame):
        export.write_saved_model(tmp_path / "saved_model", model, contract.DIGITS, IMAGES[:10], (1,))
