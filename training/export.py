"""The SavedModel that is served: the contract's signatures, float32, nothing of Keras in it.

Batch normalisation is folded into the dense layers (at inference it is a scale and an offset), which makes a single
image four times as fast as the network exported as it was trained. The arithmetic from uint8 pixels on is in the graph.
Beside it lies the main signature as a TF Lite model, which our model server answers with in about half the time
(docs/decisions/0033).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console

from digits import contract
from digits.errors import DigitsError
from training.model import (
    Calibration,
    Stretch,
    TurnedCopies,
    load_model,
    mean_of_copies,
    model_sha256,
    predict_probabilities,
    stretch,
    turned_copies,
)
from training.params import Params
from training.verify import GOLDEN_FILE, verify
from training.workspace import Split, Workspace, load_split, read_json, write_json

_ACTIVATIONS = {
    "relu": tf.nn.relu,
    "gelu": lambda x: tf.nn.gelu(x, approximate=False),
    "silu": tf.nn.silu,
    "elu": tf.nn.elu,
    "tanh": tf.tanh,
}


class NotApproved(DigitsError):
    """The gate judged another candidate."""

    code = "not_approved"


class NotWritten(DigitsError):
    """The exported model cannot be stored."""

    code = "not_written"


def export(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: write artifacts/export/{saved_model/, export.json} for an approved candidate.

    For a rejected one ``saved_model`` holds only a note that says so: a rejection is a result, and DVC records an
    experiment only when all its stages end well. There is nothing in it to serve, and publishing asks for the approval.

    Raises:
        NotApproved: the gate judged other weights. Nothing is written.
        NotTheSame: the export differs from Keras on the golden images.
        NotWritten: the disk is full, or cannot be written.
    """
    model_file = workspace.artifact("train", "model.keras")
    approval = read_json(workspace.artifact("gate", "approval.json"))
    if approval.get("approved") is not True:
        _write_rejection(workspace.stage_dir("export"), console)
        return
    model = load_model(model_file)
    sha256 = model_sha256(model)
    if approval.get("model_sha256") != sha256:
        raise NotApproved("the gate approved other weights than artifacts/train/model.keras: run `dvc repro`")

    held_out = load_split(workspace.artifact("prepare", "validation.npz"))
    out = workspace.stage_dir("export")
    part = out / ".saved_model.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(out / "saved_model", ignore_errors=True)
    try:
        golden = choose_golden(held_out, params.export.golden_images)
        difference = write_saved_model(part, model, params.data.classes, golden, params.export.warmup_batch_sizes)
        part.rename(out / "saved_model")
    except (OSError, tf.errors.OpError) as err:
        raise NotWritten(
            f"cannot write the exported model in {out}: {' '.join(str(err).split())[:200]}. Nothing was exported; "
            "mend that (often: free some disk space) and run `dvc repro`"
        ) from err
    finally:
        shutil.rmtree(part, ignore_errors=True)
    write_json(
        out / "export.json",
        {
            "schema": 1,
            "model_sha256": sha256,
            "abstain_below": float(model.get_layer("calibration").abstain_below),
            "golden_images": len(golden),
            "golden_max_difference": round(difference, 9),
            "signatures": [contract.SIGNATURE, contract.ENCODED_SIGNATURE, contract.CLASSES_SIGNATURE],
        },
    )
    console.print(
        f"exported to {out / 'saved_model'}; differs from Keras by at most {difference:.1e} on {len(golden)} images"
    )


def _write_rejection(out: Path, console: Console) -> None:
    shutil.rmtree(out / "saved_model", ignore_errors=True)
    (out / "saved_model").mkdir()
    note = "the gate rejected this candidate: nothing is exported (why: artifacts/gate/decision.json)"
    (out / "saved_model" / "REJECTED.txt").write_text(note + "\n", encoding="utf-8")
    write_json(out / "export.json", {"schema": 1, "rejected": True})
    console.print(note)


def choose_golden(split: Split, count: int) -> np.ndarray:
    """The first images of each class in turn, uint8 (count, 28, 28): every class is among the first of them."""
    ranks = np.zeros(len(split.labels), int)
    for label in np.unique(split.labels):
        members = split.labels == label
        ranks[members] = np.arange(members.sum())
    return split.images[np.lexsort((split.labels, ranks))[:count]]


def write_saved_model(
    folder: Path, model: keras.Model, classes: tuple[str, ...], golden: np.ndarray, warmup_batch_sizes: tuple[int, ...]
) -> float:
    """Write a complete version folder and return its greatest difference from Keras on the golden images.

    Raises:
        NotTheSame: it differs by more than rounding.
    """
    pack(folder, model, classes, golden, warmup_batch_sizes)
    return verify(folder)


def pack(
    folder: Path,
    model: keras.Model,
    classes: tuple[str, ...],
    golden: np.ndarray,
    warmup_batch_sizes: tuple[int, ...],
) -> None:
    """Write a complete version folder: the SavedModel, golden answers of Keras, warm-up requests."""
    served = ServedPerceptron(model, classes)
    tf.saved_model.save(served, str(folder), signatures=served.signatures())
    _write_lite_model(folder)
    extra = folder / "assets.extra"
    extra.mkdir()
    (folder / contract.CLASSES_FILE).write_text(json.dumps(classes, ensure_ascii=False) + "\n", encoding="utf-8")
    expected = predict_probabilities(model, golden)
    np.savez_compressed(folder / GOLDEN_FILE, images=golden, probabilities=expected)
    _write_warmup(folder / contract.WARMUP_FILE, golden, warmup_batch_sizes)


class ServedPerceptron(tf.Module):
    """The perceptron of ``training.model.build_model`` with its normalisation folded in."""

    def __init__(self, model: keras.Model, classes: tuple[str, ...]) -> None:
        super().__init__(name="digits")
        self._classes = classes
        self._layers: list[tuple[Any, ...]] = [
            tuple(tf.Variable(a, trainable=False) if isinstance(a, np.ndarray) else a for a in layer)
            for layer in fold_layers(model)
        ]
        # Tracked by name, so that the variables are in the SavedModel.
        self.weights = [a for layer in self._layers for a in layer if isinstance(a, tf.Variable)]
        self._scale = float(model.get_layer("scale").scale)
        # The numbers alone: a Keras layer held here would be saved with it.
        stretches = ((layer.least, layer.paper_share) for layer in model.layers if isinstance(layer, Stretch))
        self._least_contrast, self._paper_share = next(stretches, (1.0, 0.0))
        # Answers are the mean over the image as it is and turned by this angle both ways.
        self._turn_deg = next((layer.angle_deg for layer in model.layers if isinstance(layer, TurnedCopies)), 0.0)
        self._abstain_below = float(model.get_layer("calibration").abstain_below)

    def signatures(self) -> dict[str, Any]:
        """Concrete functions by signature name, as digits/contract.py has them."""
        shape = (None, contract.IMAGE_HEIGHT, contract.IMAGE_WIDTH)
        images = tf.TensorSpec(shape, tf.uint8, name=contract.INPUT_IMAGES)
        encoded = tf.TensorSpec((None,), tf.string, name=contract.INPUT_IMAGE_BYTES)
        digit = tf.TensorSpec((None,), tf.int64, name=contract.OUTPUT_DIGIT)
        return {
            contract.SIGNATURE: tf.function(self.classify, input_signature=[images]).get_concrete_function(),
            contract.ENCODED_SIGNATURE: tf.function(
                self.classify_encoded, input_signature=[encoded]
            ).get_concrete_function(),
            contract.CLASSES_SIGNATURE: tf.function(self.name_classes, input_signature=[digit]).get_concrete_function(),
        }

    def classify(self, images: Any) -> dict[str, Any]:
        """Classify images uint8 (N, 28, 28)."""
        x = tf.cast(images, tf.float32) * self._scale
        if self._least_contrast < 1:
            x = stretch(x, self._least_contrast, self._paper_share)
        if self._turn_deg:
            x = turned_copies(x, self._turn_deg)
        x = tf.reshape(x, (-1, contract.IMAGE_BYTES))  # (N, 784), or more with copies
        for kernel, bias, norm, activation in self._layers:
            x = tf.matmul(x, kernel)
            if bias is not None:
                x = tf.nn.bias_add(x, bias)
            if norm is not None:
                gamma, beta, epsilon = norm
                mean, variance = tf.nn.moments(x, axes=[1], keepdims=True)
                x = (x - mean) * tf.math.rsqrt(variance + epsilon) * gamma + beta
            if activation is not None:
                x = _ACTIVATIONS[activation](x)
        if self._turn_deg:
            x = mean_of_copies(x)
        return {
            contract.OUTPUT_PROBABILITIES: tf.nn.softmax(x),
            contract.OUTPUT_DIGIT: tf.argmax(x, axis=1, output_type=tf.int64),
        }

    def classify_encoded(self, image_bytes: Any) -> dict[str, Any]:
        """Classify PNG or JPEG files of 28 x 28 pixels each; another size fails with a message that says so."""
        height, width = contract.IMAGE_HEIGHT, contract.IMAGE_WIDTH

        def decode(content: Any) -> Any:
            image = tf.io.decode_image(content, channels=1, expand_animations=False)
            size = tf.shape(image)[:2]
            wrong = tf.strings.format(f"expected an image of {height} x {width} pixels, got (rows, columns) {{}}", size)
            with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(size == (height, width)), [wrong])]):
                return tf.reshape(image, (height, width))

        images = tf.map_fn(decode, image_bytes, fn_output_signature=tf.TensorSpec((height, width), tf.uint8))
        return self.classify(images)

    def name_classes(self, digit: Any) -> dict[str, Any]:
        """The names of classes int64 (N,), and how sure an answer must be; one threshold for all as yet."""
        return {
            contract.OUTPUT_NAME: tf.gather(tf.constant(self._classes), digit),
            contract.OUTPUT_ABSTAIN_BELOW: tf.fill(tf.shape(digit), tf.constant(self._abstain_below, tf.float32)),
        }


def fold_layers(model: keras.Model) -> list[tuple[Any, ...]]:
    """The model's dense layers as (kernel, bias, layer norm or None, activation or None), the rest folded into them.

    Batch norm computes ``gamma * (x W - mean) / sqrt(variance + epsilon) + beta``, which is another W and an offset;
    the temperature divides the last W and offset.
    """
    folded: list[list[Any]] = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense):
            bias = np.asarray(layer.bias) if layer.use_bias else None
            folded.append([np.asarray(layer.kernel), bias, None, None])
        elif isinstance(layer, keras.layers.BatchNormalization):
            kernel, bias = folded[-1][:2]
            mean, variance = np.asarray(layer.moving_mean, np.float64), np.asarray(layer.moving_variance, np.float64)
            factor = np.asarray(layer.gamma, np.float64) / np.sqrt(variance + layer.epsilon)
            offset = (0.0 if bias is None else bias) - mean
            folded[-1][0] = (kernel * factor).astype(np.float32)
            folded[-1][1] = (offset * factor + np.asarray(layer.beta, np.float64)).astype(np.float32)
        elif isinstance(layer, keras.layers.LayerNormalization):
            folded[-1][2] = (np.asarray(layer.gamma), np.asarray(layer.beta), float(layer.epsilon))
        elif isinstance(layer, keras.layers.Activation):
            folded[-1][3] = layer.activation.__name__
        elif isinstance(layer, Calibration):
            temperature = np.asarray(layer.temperature, np.float64)
            folded[-1][:2] = [(np.asarray(a, np.float64) / temperature).astype(np.float32) for a in folded[-1][:2]]
    return [tuple(entry) for entry in folded]


def _write_lite_model(folder: Path) -> None:
    """The main signature of the SavedModel in ``folder``, converted; float32 as before."""
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=[contract.SIGNATURE])
    (folder / contract.LITE_FILE).write_bytes(converter.convert())


def _write_warmup(path: Path, images: np.ndarray, batch_sizes: tuple[int, ...]) -> None:
    """One Predict request a batch size and one for the encoded endpoint, for a server to replay before it serves."""
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    def request(signature: str, name: str, tensor: Any) -> bytes:
        predict = predict_pb2.PredictRequest()
        predict.model_spec.name = contract.MODEL_NAME
        predict.model_spec.signature_name = signature
        predict.inputs[name].CopyFrom(tf.make_tensor_proto(tensor))
        log = prediction_log_pb2.PredictLog(request=predict)
        return prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString()

    with tf.io.TFRecordWriter(str(path)) as writer:
        for size in batch_sizes:
            writer.write(
                request(contract.SIGNATURE, contract.INPUT_IMAGES, np.resize(images, (size, *images.shape[1:])))
            )
        png = tf.io.encode_png(images[0][..., None]).numpy()
        writer.write(request(contract.ENCODED_SIGNATURE, contract.INPUT_IMAGE_BYTES, np.array([png], object)))
