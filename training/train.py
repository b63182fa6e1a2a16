"""Fit the perceptron: seeded, in one graph, with the data in memory.

About 50 steps run in one call of a ``tf.function``: Python is out of the way, yet there is time to redraw the progress
bar and to notice a loss that is no number. While one batch is learnt from, the next is being drawn.
"""

import csv
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from digits.errors import DigitsError
from training.augment import build_augment
from training.calibrate import abstention_threshold, fit_temperature
from training.curves import draw_curves
from training.model import (
    build_model,
    build_optimiser,
    build_predict,
    build_schedule,
    model_sha256,
    resolve_precision,
)
from training.params import BadParams, Params, TrainParams
from training.workspace import Split, Workspace, load_split, whole_file, write_json

_CHUNK_STEPS = 50


class TrainingDiverged(DigitsError):
    """The loss became NaN or infinite."""

    code = "training_diverged"


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images came to. Accuracy of training is on deformed images."""

    epoch: int
    loss: float
    accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float


def train(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: read the prepared splits, fit, write model.keras, history.csv, curves.png and training.json."""
    learn = load_split(workspace.artifact("prepare", "train.npz"))
    held_out = load_split(workspace.artifact("prepare", "validation.npz"))
    out = workspace.stage_dir("train")

    started = time.perf_counter()
    model, history = fit(learn, held_out, params, console)
    fit_seconds = time.perf_counter() - started

    with whole_file(out / "model.keras") as part:
        model.save(part)
    _write_history(out / "history.csv", history)
    draw_curves(out / "curves.png", [asdict(epoch) for epoch in history])
    write_json(
        out / "training.json",
        {
            "schema": 1,
            "model_sha256": model_sha256(model),
            "weights": model.count_params(),
            "epochs": len(history),
            "training_images": len(learn.labels),
            "validation_images": len(held_out.labels),
            "validation_accuracy": history[-1].validation_accuracy,
            "validation_loss": history[-1].validation_loss,
            "temperature": round(float(model.get_layer("calibration").temperature), 4),
            "abstain_below": round(float(model.get_layer("calibration").abstain_below), 4),
            "precision": resolve_precision(params.train.precision),
            "seed": params.seed,
            "profile": params.profile,
            "fit_seconds": round(fit_seconds, 1),
        },
    )
    console.print(
        f"trained {model.count_params():,} weights in {fit_seconds:.0f} s: "
        f"validation accuracy {history[-1].validation_accuracy:.2%} (n = {len(held_out.labels):,})"
    )


def fit(
    learn: Split,
    held_out: Split,
    params: Params,
    console: Console,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> tuple[keras.Model, list[Epoch]]:
    """Fit a new perceptron and return it in float32, calibrated, with averaged weights, and its history.

    The same seed, data and machine give the same weights. ``on_epoch`` sees each epoch as it ends; what it raises ends
    the fit and comes out.

    Raises:
        BadParams: a batch is larger than the training split.
        TrainingDiverged: the loss is no finite number; names the step and the rate.
    """
    setting = params.train
    if setting.batch_size > len(learn.labels):
        raise BadParams(
            f"train.batch_size is {setting.batch_size}; allowed: at most the {len(learn.labels)} training images"
        )
    keras.utils.set_random_seed(params.seed)
    steps_per_epoch = len(learn.labels) // setting.batch_size
    total_steps = steps_per_epoch * setting.epochs

    class_count = len(params.data.classes)
    model = build_model(params.model, class_count, resolve_precision(setting.precision))
    averaged = build_model(params.model, class_count, "float32")
    predict = build_predict(averaged)
    loop = _Loop(model, learn, params, total_steps)
    history: list[Epoch] = []
    rng = np.random.default_rng(params.seed)

    with _progress(console) as progress:
        task = progress.add_task("train", total=total_steps, note="preparing the graph")
        for epoch in range(1, setting.epochs + 1):
            started = time.perf_counter()
            order = rng.permutation(len(learn.labels))[: steps_per_epoch * setting.batch_size].astype(np.int32)
            batches = order.reshape(steps_per_epoch, setting.batch_size)
            loss_sum = right = 0.0
            for first in range(0, steps_per_epoch, _CHUNK_STEPS):
                chunk = batches[first : first + _CHUNK_STEPS]
                chunk_loss, chunk_right = loop.run(chunk, (epoch - 1) * steps_per_epoch + first)
                loss_sum += chunk_loss
                right += chunk_right
                steps_done = first + len(chunk)
                note = (
                    f"epoch {epoch}/{setting.epochs}  loss {loss_sum / steps_done:.3f}  "
                    f"accuracy {right / (steps_done * setting.batch_size):.2%}"
                )
                if history:
                    note += f"  validation {history[-1].validation_accuracy:.2%}"
                progress.update(task, advance=len(chunk), note=note)
            loop.copy_average_to(averaged)
            validation_loss, validation_accuracy = score(predict(held_out.images), held_out.labels)
            history.append(
                Epoch(
                    epoch=epoch,
                    loss=loss_sum / steps_per_epoch,
                    accuracy=right / order.size,
                    validation_loss=validation_loss,
                    validation_accuracy=validation_accuracy,
                    learning_rate=float(loop.rate(epoch * steps_per_epoch - 1)),
                    seconds=round(time.perf_counter() - started, 3),
                )
            )
            if on_epoch:
                on_epoch(history[-1])
    calibrate(averaged, held_out, setting.abstain_share)
    return averaged, history


def calibrate(model: keras.Model, held_out: Split, abstain_share: float) -> None:
    """Fit the model's temperature and threshold of abstention on validation images, which it has not learnt from."""
    layer = model.get_layer("calibration")
    layer.temperature.assign(1.0)
    layer.temperature.assign(fit_temperature(build_predict(model, logits=True)(held_out.images), held_out.labels))
    layer.abstain_below.assign(abstention_threshold(build_predict(model)(held_out.images), abstain_share))


def score(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean negative log-likelihood (nats) and accuracy of answers (N, C)."""
    truth = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(truth, 1e-12)).mean()), float((probabilities.argmax(axis=1) == labels).mean())


class _Loop:
    """The training graph: data, model, optimiser and averaged weights, and a function that takes many steps."""

    def __init__(self, model: keras.Model, learn: Split, params: Params, total_steps: int) -> None:
        self._model = model
        self._setting: TrainParams = params.train
        self._images = tf.constant(learn.images)
        self._labels = tf.constant(learn.labels, tf.int32)
        self._augment = build_augment(params.augment)
        self._seed = params.seed
        self._class_count = len(params.data.classes)
        self._optimiser = build_optimiser(params.train)
        self._optimiser.build(model.trainable_variables)
        self.rate: Callable[[Any], Any] = build_schedule(params.train, total_steps)
        self._average_steps = params.train.average_share * total_steps
        self._averages = (
            [tf.Variable(w.value, trainable=False) for w in model.weights] if self._average_steps > 1 else []
        )
        signature = (tf.TensorSpec((None, params.train.batch_size), tf.int32), tf.TensorSpec((), tf.int32))
        self._take_steps = tf.function(self._build_steps, input_signature=signature).get_concrete_function()

    def run(self, batches: np.ndarray, first_step: int) -> tuple[float, float]:
        """Take one step for each row of indices (S, batch); return the sum of losses and the right answers."""
        losses, right = self._take_steps(tf.constant(batches), tf.constant(first_step))
        losses = losses.numpy()
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            step = first_step + int(bad[0])
            raise TrainingDiverged(
                f"the loss is {losses[bad[0]]} at step {step} (learning rate {float(self.rate(step)):.3g}): "
                "lower train.learning_rate in params.yaml, or lengthen train.warmup_share"
            )
        return float(losses.sum()), float(right.numpy())

    def copy_average_to(self, target: keras.Model) -> None:
        """Give ``target`` (same layers) the averaged weights, or the latest ones when averaging is off."""
        source = self._averages or self._model.weights
        target.set_weights([np.asarray(w) for w in source])

    def _draw(self, indices: Any, step: Any) -> tuple[Any, Any]:
        images = self._augment(tf.gather(self._images, indices), tf.stack([self._seed, step]))  # (B, 28, 28)
        return images, tf.gather(self._labels, indices)

    def _build_steps(self, batches: Any, first_step: Any) -> tuple[Any, Any]:
        count = tf.shape(batches)[0]

        def body(i: Any, images: Any, labels: Any, losses: Any, right: Any) -> tuple[Any, ...]:
            # Independent of this step's gradient, so the runtime draws it meanwhile.
            following = tf.minimum(i + 1, count - 1)
            next_images, next_labels = self._draw(batches[following], first_step + following)
            loss, hits = self._learn(images, labels, first_step + i)
            losses = losses.write(i, loss)
            return i + 1, next_images, next_labels, losses, right + hits

        images, labels = self._draw(batches[0], first_step)
        losses = tf.TensorArray(tf.float32, size=count)
        start = (tf.constant(0), images, labels, losses, tf.constant(0.0))
        _, _, _, losses, right = tf.while_loop(lambda i, *_: i < count, body, start)
        return losses.stack(), right

    def _learn(self, images: Any, labels: Any, step: Any) -> tuple[Any, Any]:
        """One step of gradient descent; the batch's loss and number of right answers."""
        smoothing = self._setting.label_smoothing
        share = smoothing / self._class_count
        targets = tf.one_hot(labels, self._class_count, 1.0 - smoothing + share, share)
        with tf.GradientTape() as tape:
            logits = self._model(images, training=True)
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
            loss = tf.add_n([loss, *self._model.losses])
        variables = self._model.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        self._optimiser.learning_rate.assign(self.rate(step))
        self._optimiser.apply(gradients, variables)
        self._update_average(step)
        hits = tf.reduce_sum(tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == labels, tf.float32))
        return loss, hits

    def _update_average(self, step: Any) -> None:
        at = tf.cast(step, tf.float32)
        # The start counts for little: the average is as young as the run.
        keep = tf.minimum(1.0 - 1.0 / max(self._average_steps, 1.0), (1.0 + at) / (10.0 + at))
        for average, weight in zip(self._averages, self._model.weights, strict=False):
            average.assign_sub((1.0 - keep) * (average - weight.value))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4 if console.is_terminal else 0.2,
    )


def _write_history(path: Path, history: list[Epoch]) -> None:
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(history[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(epoch) for epoch in history)
