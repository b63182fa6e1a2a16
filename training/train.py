"""Fit the perceptron: seeded, in one graph, with the data in memory.

Receptive fields learn in unison, from the labels, and end as dense layers. With free epochs there is a second phase:
each weight then learns on its own, from the answers of the network that came out of the first.
"""

import csv
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.calibrate import abstention_threshold, fit_temperature
from training.curves import draw_curves
from training.loop import Loop, TrainingDiverged
from training.memory import memory_for
from training.model import build_model, build_predict, model_sha256, resolve_precision
from training.params import BadParams, Params
from training.receptive_fields import free
from training.workers import Workers, join_workers
from training.workspace import Split, Workspace, load_split, whole_file, write_json

_CHUNK_STEPS = 50


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images came to: loss and accuracy on deformed ones, the loss on outliers too."""

    epoch: int
    loss: float
    accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float


def train(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: read the prepared splits, fit, write model.keras, history.csv, curves.png and training.json.

    Of several workers (training/workers.py) one writes.
    """
    learn = load_split(workspace.artifact("prepare", "train.npz"))
    held_out = load_split(workspace.artifact("prepare", "validation.npz"))
    out = workspace.stage_dir("train")
    last_good_file = out / "last_good.keras"  # no output of the stage: it is there only after a fit that failed
    last_good_file.unlink(missing_ok=True)

    started = time.perf_counter()
    try:
        model, history = fit(learn, held_out, params, console)
    except TrainingDiverged as err:
        raise TrainingDiverged(f"{err}. {_keep(err.last_good, last_good_file)}") from err
    fit_seconds = time.perf_counter() - started
    workers = join_workers()
    if not workers.is_chief:
        console.print(f"worker {workers.index} of {workers.count} is done; worker 0 writes the files")
        return

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


def _keep(last_good: keras.Model | None, path: Path) -> str:
    """Save what there is of a fit that failed, and say so."""
    if last_good is None:
        return "No epoch had ended, so there are no weights to keep"
    with whole_file(path) as part:
        last_good.save(part)
    return f"The weights after the last good epoch, not calibrated, are kept in {path}"


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
        OutOfMemory: the batch does not fit into memory; names one that would.
        TrainingDiverged: the loss is no finite number; names the step and the rate, and has the last good weights.
    """
    setting = params.train
    if setting.batch_size > len(learn.labels):
        raise BadParams(
            f"train.batch_size is {setting.batch_size}; allowed: at most the {len(learn.labels)} training images"
        )
    workers = join_workers()
    keras.utils.set_random_seed(params.seed)
    precision = resolve_precision(setting.precision)
    class_count = len(params.data.classes)
    with workers.strategy.scope():
        model = build_model(params.model, class_count, precision)
    averaged = build_model(params.model, class_count, "float32")
    with _progress(console) as progress:
        course = _Course(learn, held_out, params, progress, on_epoch, workers)
        course.run(model, averaged, params)
        if params.model.receptive_fields:
            teacher = model
            teacher.set_weights(averaged.get_weights())
            with workers.strategy.scope():
                model = free(averaged, params.model, precision)
            averaged = free(averaged, params.model, "float32")
            course.run(model, averaged, _when_free(params), teacher)
    calibrate(averaged, held_out, setting.abstain_share)
    return averaged, course.history


def _when_free(params: Params) -> Params:
    """The parameters of the last phase, in which receptive fields have become dense layers."""
    setting = params.train.model_copy(
        update={"epochs": params.train.free_epochs, "learning_rate": params.train.free_learning_rate}
    )
    return params.model_copy(update={"train": setting})


class _Course:
    """One fit from beginning to end: order of the images, progress bar, history."""

    def __init__(
        self,
        learn: Split,
        held_out: Split,
        params: Params,
        progress: Progress,
        on_epoch: Callable[[Epoch], None] | None,
        workers: Workers,
    ) -> None:
        self.history: list[Epoch] = []
        self._good: tuple[keras.Model, list[np.ndarray]] | None = None
        self._learn = learn
        self._held_out = held_out
        self._rng = np.random.default_rng(params.seed)
        self._steps_per_epoch = len(learn.labels) // params.train.batch_size
        self._epochs = params.train.epochs + params.train.free_epochs
        self._on_epoch = on_epoch
        self._workers = workers
        self._progress = progress
        self._task = progress.add_task("train", total=self._epochs * self._steps_per_epoch, note="preparing the graph")

    def run(
        self, model: keras.Model, averaged: keras.Model, params: Params, teacher: keras.Model | None = None
    ) -> None:
        """Train ``model`` for ``params.train.epochs``; ``averaged``, the same layers in float32, gets the result."""
        if not params.train.epochs:
            return
        try:
            with memory_for(model, params.train.batch_size, len(self._learn.labels), self._workers.count):
                self._run(model, averaged, params, teacher)
        except TrainingDiverged as err:
            err.last_good = self._last_good()
            raise

    def _run(self, model: keras.Model, averaged: keras.Model, params: Params, teacher: keras.Model | None) -> None:
        drawn_before = len(self.history) * self._steps_per_epoch
        total_steps = params.train.epochs * self._steps_per_epoch
        loop = Loop(model, self._learn, params, total_steps, self._workers, drawn_before, teacher)
        predict = build_predict(averaged)
        for epoch in range(params.train.epochs):
            started = time.perf_counter()
            loss, accuracy = self._run_epoch(loop, epoch * self._steps_per_epoch, params.train.batch_size)
            loop.copy_average_to(averaged)
            validation_loss, validation_accuracy = score(predict(self._held_out.images), self._held_out.labels)
            if not np.isfinite(validation_loss):
                step = (epoch + 1) * self._steps_per_epoch - 1
                raise TrainingDiverged(
                    f"the loss on the validation images is {validation_loss} after step {step} "
                    f"(learning rate {float(loop.rate(step)):.3g}): lower train.learning_rate in params.yaml"
                )
            self._good = averaged, averaged.get_weights()
            self.history.append(
                Epoch(
                    epoch=len(self.history) + 1,
                    loss=loss,
                    accuracy=accuracy,
                    validation_loss=validation_loss,
                    validation_accuracy=validation_accuracy,
                    learning_rate=float(loop.rate((epoch + 1) * self._steps_per_epoch - 1)),
                    seconds=round(time.perf_counter() - started, 3),
                )
            )
            if self._on_epoch:
                self._on_epoch(self.history[-1])

    def _last_good(self) -> keras.Model | None:
        """The averaged network as the last epoch that ended well left it."""
        if self._good is None:
            return None
        model, weights = self._good
        model.set_weights(weights)
        return model

    def _run_epoch(self, loop: Loop, first_step: int, batch_size: int) -> tuple[float, float]:
        """One pass over the images in a new order; the mean loss and the share of right answers."""
        order = self._rng.permutation(len(self._learn.labels))[: self._steps_per_epoch * batch_size]
        batches = order.astype(np.int32).reshape(self._steps_per_epoch, batch_size)
        loss = right = 0.0
        for first in range(0, self._steps_per_epoch, _CHUNK_STEPS):
            chunk = batches[first : first + _CHUNK_STEPS]
            chunk_loss, chunk_right = loop.run(chunk, first_step + first)
            loss += chunk_loss
            right += chunk_right
            steps_done = first + len(chunk)
            note = (
                f"epoch {len(self.history) + 1}/{self._epochs}  loss {loss / steps_done:.3f}  "
                f"accuracy {right / (steps_done * batch_size):.2%}"
            )
            if self.history:
                note += f"  validation {self.history[-1].validation_accuracy:.2%}"
            self._progress.update(self._task, advance=len(chunk), note=note)
        return loss / self._steps_per_epoch, right / order.size


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
