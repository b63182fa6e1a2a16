"""A process that trains one trial after another, as the search tells it through a pipe.

It knows nothing of Optuna: it is told values, tells how each epoch went, and is told whether to go on.
"""

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from digits.errors import DigitsError
from training.params import Params, change_params
from training.workspace import Split, import_tensorflow_quietly, load_split


@dataclass(frozen=True)
class Task:
    """What all trials of a search share."""

    params: Params
    learn: Path
    held_out: Path
    threads: int
    log: Path
    """Where a worker writes what would disturb the terminal."""


@dataclass(frozen=True)
class EpochDone:
    """A message to the search, which answers True (go on) or False (prune)."""

    epoch: int
    loss: float
    """Negative log-likelihood of the validation images, nats."""
    accuracy: float


@dataclass(frozen=True)
class TrialDone:
    """A message to the search: the trial trained to its end."""

    loss: float
    """Negative log-likelihood of the validation images, nats, after the temperature is fitted."""
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class TrialGivenUp:
    """A message to the search: pruned (no reason), or values that cannot be trained with."""

    seconds: float
    reason: str = ""


class _PrunedError(Exception):
    """Carries the search's answer out of the training loop."""


def work(connection: Connection, task: Task) -> None:
    """Train what comes through the pipe until None comes, or nobody is there any more."""
    _write_to(task.log)
    os.environ["OMP_NUM_THREADS"] = str(task.threads)
    import_tensorflow_quietly()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(task.threads)
    tf.config.threading.set_inter_op_parallelism_threads(task.threads)
    learn, held_out = (
        _choose(load_split(task.learn), task.params.search.images, task.params.seed),
        load_split(task.held_out),
    )
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (values := connection.recv()) is not None:
            connection.send(_try(values, learn, held_out, task.params, connection))


def _try(
    values: dict[str, Any], learn: Split, held_out: Split, params: Params, connection: Connection
) -> TrialDone | TrialGivenUp:
    import keras

    from training.model import predict_probabilities
    from training.train import Epoch, fit, score

    def on_epoch(epoch: Epoch) -> None:
        connection.send(EpochDone(epoch.epoch, epoch.validation_loss, epoch.validation_accuracy))
        if not connection.recv():
            raise _PrunedError

    keras.backend.clear_session()
    gc.collect()  # the graph of the trial before refers to itself
    started = time.perf_counter()
    seconds: Callable[[], float] = lambda: round(time.perf_counter() - started, 1)  # noqa: E731 - a stopwatch
    try:
        model, _ = fit(learn, held_out, change_params(params, values), Console(quiet=True), on_epoch=on_epoch)
    except _PrunedError:
        return TrialGivenUp(seconds())
    except DigitsError as err:  # a loss that is no number, values that contradict each other
        return TrialGivenUp(seconds(), str(err))
    loss, accuracy = score(predict_probabilities(model, held_out.images), held_out.labels)
    return TrialDone(loss, accuracy, seconds())


def _choose(split: Split, count: int, seed: int) -> Split:
    """So many images of a split, drawn at random and kept in their order."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(split.labels))[:count])
    return Split(split.images[chosen], split.labels[chosen])


def _write_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
