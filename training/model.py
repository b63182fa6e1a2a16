"""The multilayer perceptron, its optimiser and its learning-rate schedule, as params.yaml describes them."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from training.params import ModelParams, TrainParams
from training.workspace import BadArtifact

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
_PREDICT_BATCH = 1000
_FEW_FEATURES = 16
"""Up to so many it pays to compute a convolution of one plane in rows, on a CPU."""
_BLOCK_PX = 4
"""Side of the blocks of pixels along an image's edge of which some are paper."""


def resolve_precision(precision: str) -> str:
    """``auto`` becomes mixed_bfloat16 on CPUs that multiply bfloat16: twice as fast there, slower elsewhere."""
    if precision != "auto":
        return precision
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    flags = next((line for line in cpu.splitlines() if line.startswith("flags")), "")
    return "mixed_bfloat16" if _BFLOAT16_FLAGS & set(flags.split()) else "float32"


def build_model(params: ModelParams, class_count: int, precision: str) -> keras.Model:
    """An untrained perceptron: images float32 (N, 28, 28) in 0..255 -> logits float32 (N, C) of C classes.

    Receptive fields are convolutions here; ``training.receptive_fields.free`` makes them dense. The scaling to 0..1 is
    its first layer, so that nobody who calls it can forget it. Initial weights come from Keras's global seed
    (``keras.utils.set_random_seed``).
    """
    policy = keras.dtype_policies.DTypePolicy(precision)
    l2 = keras.regularizers.L2(params.l2) if params.l2 else None
    images = keras.Input((IMAGE_HEIGHT, IMAGE_WIDTH), dtype="float32", name="images")
    x = keras.layers.Rescaling(1 / 255, dtype="float32", name="scale")(images)
    if params.least_contrast < 1:
        x = Stretch(params.least_contrast, params.paper_share, dtype="float32", name="stretch")(x)
    # A normalisation has its own offset: the layer before it needs none.
    setting: dict[str, Any] = {
        "use_bias": params.normalisation == "none",
        "kernel_initializer": "he_normal",
        "kernel_regularizer": l2,
        "dtype": policy,
    }
    if params.averaged_turn_deg:
        x = TurnedCopies(params.averaged_turn_deg, dtype="float32", name="copies")(x)
    if params.receptive_fields:
        x = keras.layers.Reshape((IMAGE_HEIGHT, IMAGE_WIDTH, 1), dtype=policy, name="plane")(x)
    for i, field in enumerate(params.receptive_fields, start=1):
        shape = field.features, field.size, field.stride, field.padding
        convolution = Field(*shape, name=f"tied_{i}", **setting)
        x = _activate(convolution(x), params, policy, i)
    x = keras.layers.Flatten(dtype=policy, name="flatten")(x)
    for i, width in enumerate(params.hidden_widths, start=len(params.receptive_fields) + 1):
        x = _activate(keras.layers.Dense(width, name=f"dense_{i}", **setting)(x), params, policy, i)
    x = keras.layers.Dense(class_count, kernel_regularizer=l2, dtype="float32", name="logits")(x)
    if params.averaged_turn_deg:
        x = MeanOfCopies(dtype="float32", name="mean")(x)
    return keras.Model(images, Calibration(dtype="float32", name="calibration")(x), name="digits")


def _activate(x: Any, params: ModelParams, policy: keras.dtype_policies.DTypePolicy, i: int) -> Any:
    """What follows the weights of hidden layer ``i``."""
    if params.normalisation == "batch":
        # Several workers that learn from one batch take its mean and variance together.
        together = tf.distribute.get_strategy().num_replicas_in_sync > 1
        x = keras.layers.BatchNormalization(momentum=0.95, synchronized=together, dtype=policy, name=f"norm_{i}")(x)
    elif params.normalisation == "layer":
        x = keras.layers.LayerNormalization(dtype=policy, name=f"norm_{i}")(x)
    x = keras.layers.Activation(params.activation, dtype=policy, name=f"activation_{i}")(x)
    if params.dropout:
        x = keras.layers.Dropout(params.dropout, dtype=policy, name=f"dropout_{i}")(x)
    return x


def stretch(images: Any, least: float, paper_share: float = 0.0) -> Any:
    """Images (N, 28, 28) of 0..1 with the paper of each at 0 and its darkest pixel at 1.

    Less than ``least`` between the two is not stretched further than that much would be: a blank sheet stays blank.
    Paper is as light as the lightest pixel. With a ``paper_share`` that share of the blocks along the edge, the
    lightest ones, are paper, and the mean of the darkest of these is its level: neither one odd pixel nor a neighbour's
    ink along one side decides it.
    """
    if paper_share:
        blocks = tf.matmul(tf.reshape(images, (-1, IMAGE_HEIGHT * IMAGE_WIDTH)), _edge_blocks())
        lightest, _ = tf.nn.top_k(-blocks, max(1, round(paper_share * blocks.shape[1])))
        paper = -lightest[:, -1:, None]
        images = tf.maximum(images, paper)
    else:
        paper = tf.reduce_min(images, axis=(1, 2), keepdims=True)
    darkest = tf.reduce_max(images, axis=(1, 2), keepdims=True)
    return (images - paper) / tf.maximum(darkest - paper, least)


def _edge_blocks() -> np.ndarray:
    """What takes an image, flat, to the mean of each block along its edge: float32 (784, 24)."""
    high, wide = IMAGE_HEIGHT // _BLOCK_PX, IMAGE_WIDTH // _BLOCK_PX
    number = np.arange(high * wide).reshape(high, wide)
    inner = number[1:-1, 1:-1].ravel()
    of_pixel = np.kron(number, np.ones((_BLOCK_PX, _BLOCK_PX), int)).ravel()
    edge = np.setdiff1d(number, inner)
    return (of_pixel[:, None] == edge).astype(np.float32) / _BLOCK_PX**2


def turned_copies(images: Any, angle_deg: float) -> Any:
    """Each image (N, H, W) turned about its middle by -angle, 0 and +angle, linear between pixels, paper (0) outside.

    Returns:
        (N * 3, H, W), the copies of an image in a row.
    """
    height, width = images.shape[1:]
    places, shares = _turns(height, width, angle_deg)
    flat = tf.reshape(images, (-1, height * width))
    read = tf.gather(tf.pad(flat, ((0, 0), (0, 1))), places.ravel(), axis=1)
    turned = tf.reduce_sum(tf.reshape(read, (-1, *places.shape)) * shares, axis=-1)  # (N, 2, H * W)
    copies = tf.concat([turned[:, :1], flat[:, None], turned[:, 1:]], axis=1)
    return tf.reshape(copies, (-1, height, width))


def mean_of_copies(logits: Any) -> Any:
    """The mean logits (N, C) of each image's three copies (N * 3, C)."""
    return tf.reduce_mean(tf.reshape(logits, (-1, 3, logits.shape[-1])), axis=1)


def _turns(height: int, width: int, angle_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """For both turns and each pixel the four places in the image that it is read from, (2, H * W, 4), and their shares.

    The place after the image's last is paper.
    """
    rows, columns = np.mgrid[0:height, 0:width]
    y, x = rows.ravel() - (height - 1) / 2, columns.ravel() - (width - 1) / 2
    angles = np.radians([[-angle_deg], [angle_deg]])
    source_y = np.sin(angles) * x + np.cos(angles) * y + (height - 1) / 2  # (2, H * W)
    source_x = np.cos(angles) * x - np.sin(angles) * y + (width - 1) / 2
    places, shares = [], []
    for down in (0, 1):
        for right in (0, 1):
            row, column = np.floor(source_y) + down, np.floor(source_x) + right
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            places.append(np.where(inside, row * width + column, height * width))
            shares.append((1 - np.abs(source_y - row)) * (1 - np.abs(source_x - column)))
    return np.stack(places, axis=-1).astype(np.int32), np.stack(shares, axis=-1).astype(np.float32)


@keras.saving.register_keras_serializable("digits")
class Stretch(keras.layers.Layer):
    """``stretch`` as a layer."""

    def __init__(self, least: float, paper_share: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.least = least
        self.paper_share = paper_share

    def call(self, images: Any) -> Any:
        """Images (N, 28, 28) in and out."""
        return stretch(images, self.least, self.paper_share)

    def get_config(self) -> dict[str, Any]:
        """What `model.keras` keeps."""
        return {**super().get_config(), "least": self.least, "paper_share": self.paper_share}


@keras.saving.register_keras_serializable("digits")
class Field(keras.layers.Conv2D):
    """A convolution. Of a single plane into few features it is computed a whole row of places at a time.

    The CPU's usual algorithm makes little of the 25 products that each place and feature of such a convolution needs:
    a step of the quick profile would take a quarter longer. Written as one that runs down the image alone, with the
    image's columns for channels, it multiplies six times as much, most of it by 0, in a third of the time.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """What Keras calls: (N, H, W, C), (size, size, C, F) -> (N, H', W', F)."""
        if inputs.shape[-1] > 1 or self.filters > _FEW_FEATURES or self.padding != "valid":
            return super().convolution_op(inputs, kernel)
        down = tf.nn.conv1d(inputs[..., 0], in_rows(kernel, inputs.shape[2], self.strides[1]), self.strides[0], "VALID")
        return tf.reshape(down, (-1, down.shape[1], down.shape[2] // self.filters, self.filters))


def in_rows(kernel: Any, width: int, stride: int) -> Any:
    """A kernel (size, size, 1, F) as it meets whole rows of an image: (size, width, places in a row * F)."""
    size, _, _, features = kernel.shape
    places = (width - size) // stride + 1
    # meets[tap, column, place]: whether this tap of the kernel lies on this column where the kernel is at this place.
    meets = np.arange(width)[None, :, None] == np.arange(size)[:, None, None] + stride * np.arange(places)
    spread = tf.einsum("ytf,tcp->ycpf", kernel[:, :, 0], tf.constant(meets, kernel.dtype))
    return tf.reshape(spread, (size, width, places * features))


@keras.saving.register_keras_serializable("digits")
class TurnedCopies(keras.layers.Layer):
    """``turned_copies`` when the network is asked; nothing while it learns, when each image is seen once."""

    def __init__(self, angle_deg: float, **options: Any) -> None:
        super().__init__(**options)
        self.angle_deg = angle_deg

    def call(self, images: Any, training: bool = False) -> Any:
        """Images (N, 28, 28)."""
        return images if training else turned_copies(images, self.angle_deg)

    def compute_output_shape(self, shape: Any) -> Any:
        """As the input: how many there are is not part of it."""
        return shape

    def get_config(self) -> dict[str, Any]:
        """What `model.keras` keeps."""
        return {**super().get_config(), "angle_deg": self.angle_deg}


@keras.saving.register_keras_serializable("digits")
class MeanOfCopies(keras.layers.Layer):
    """``mean_of_copies`` when the network is asked."""

    def call(self, logits: Any, training: bool = False) -> Any:
        """Logits (N, C)."""
        return logits if training else mean_of_copies(logits)

    def compute_output_shape(self, shape: Any) -> Any:
        """As the input: how many there are is not part of it."""
        return shape


@keras.saving.register_keras_serializable("digits")
class Calibration(keras.layers.Layer):
    """Divides logits by a temperature, 1 until it is fitted, and keeps the threshold of abstention with the weights."""

    def build(self, _shape: Any) -> None:
        """Make the two numbers; training does not touch them."""
        self.temperature = self.add_weight(shape=(), initializer="ones", trainable=False, name="temperature")
        self.abstain_below = self.add_weight(shape=(), initializer="zeros", trainable=False, name="abstain_below")

    def call(self, logits: Any) -> Any:
        """Logits (N, C) in and out."""
        return logits / self.temperature


def build_schedule(params: TrainParams, total_steps: int) -> Any:
    """``rate(step)`` in graph, step counted from 0.

    one_cycle rises linearly and falls linearly to near 0 (Smith and Topin 2018); cosine falls along a half cosine.
    """
    peak = params.learning_rate
    warmup = max(1.0, params.warmup_share * total_steps)

    def rate(step: Any) -> Any:
        at = tf.cast(step, tf.float32)
        if params.schedule == "constant":
            return tf.constant(peak, tf.float32)
        if params.schedule == "cosine":
            return peak * 0.5 * (1.0 + tf.cos(np.pi * at / total_steps))
        falling = (total_steps - at) / max(1.0, total_steps - warmup)
        return peak * tf.minimum((at + 1.0) / warmup, falling)

    return rate


def build_optimiser(params: TrainParams) -> keras.optimizers.Optimizer:
    """The optimiser; the training loop sets its rate before each step."""
    if params.optimiser == "sgd":
        return keras.optimizers.SGD(params.learning_rate, momentum=params.momentum, nesterov=params.momentum > 0)
    if params.optimiser == "adam":
        return keras.optimizers.Adam(params.learning_rate)
    optimiser = keras.optimizers.AdamW(params.learning_rate, weight_decay=params.weight_decay)
    optimiser.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    return optimiser


def load_model(path: Path) -> keras.Model:
    """Read a trained model.keras.

    Raises:
        BadArtifact: it is not one.
    """
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as err:  # keras raises whatever the damaged part raises
        raise BadArtifact(f"{path} cannot be read as a Keras model: {err}. Run `dvc repro train`.") from err


def build_predict(model: keras.Model, *, logits: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """A function from uint8 images (N, 28, 28) to class probabilities, or logits, float32 (N, C).

    It follows the model's weights as they change, and compiles once.
    """

    @tf.function(reduce_retracing=True)
    def answer(images: Any) -> Any:
        answers = model(tf.cast(images, tf.float32), training=False)
        return answers if logits else tf.nn.softmax(answers)

    def predict(images_u8: np.ndarray) -> np.ndarray:
        batches = range(0, len(images_u8), _PREDICT_BATCH)
        parts = [answer(tf.constant(images_u8[i : i + _PREDICT_BATCH])).numpy() for i in batches]
        return np.concatenate(parts) if parts else np.zeros((0, model.output_shape[1]), np.float32)

    return predict


def predict_probabilities(model: keras.Model, images_u8: np.ndarray) -> np.ndarray:
    """Class probabilities, float32 (N, C), of uint8 images (N, 28, 28)."""
    return build_predict(model)(images_u8)


def weights_sha256(named_arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """The identity of a model: one hash over name, type, shape and bytes of each weight in order."""
    digest = hashlib.sha256()
    for name, array in named_arrays:
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def model_sha256(model: keras.Model) -> str:
    """``weights_sha256`` of a Keras model."""
    return weights_sha256((w.path, np.asarray(w)) for w in model.weights)
