"""One network, trained by several processes: each learns from its share of every batch, and all take the same step.

``TF_CONFIG`` names the processes, as TensorFlow's ``MultiWorkerMirroredStrategy`` reads it; without it there is one.
"""

import functools
import json
import os
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from digits.errors import DigitsError
from training.params import BadParams

VARIABLE = "TF_CONFIG"


class WorkersApart(DigitsError):
    """The processes that should train together cannot, or no longer."""

    code = "workers_apart"


_LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.InternalError)


@dataclass(frozen=True)
class Workers:
    """The processes that train together, and which of them this is."""

    strategy: tf.distribute.Strategy
    """Models and optimisers are made in its scope; a step runs by its ``run``."""
    index: int
    count: int

    @property
    def is_chief(self) -> bool:
        """True for the one that writes the files."""
        return self.index == 0

    def share(self, batch_size: int) -> slice:
        """The images of a batch that this process learns from.

        Raises:
            BadParams: the batch cannot be shared out evenly.
        """
        if batch_size % self.count:
            raise BadParams(
                f"train.batch_size is {batch_size}; allowed with {self.count} workers: a multiple of {self.count}"
            )
        return self.part(batch_size)

    def part(self, count: int) -> slice:
        """This process's part of ``count`` things, as even as can be."""
        return slice(self.index * count // self.count, (self.index + 1) * count // self.count)

    def check_together(self, err: tf.errors.OpError) -> None:
        """When a step failed: was it because another worker is gone?

        Raises:
            WorkersApart: it was.
        """
        if self.count > 1 and isinstance(err, _LOST):
            raise WorkersApart(
                f"worker {self.index} of {self.count} lost the others, and cannot go on with half a step: "
                f"start all of them again. {_one_line(err)}"
            ) from err

    def sum(self, value: Any) -> Any:
        """A tensor of each process, added up."""
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)


def join_workers() -> Workers:
    """Find the others named in TF_CONFIG, and wait until all are there; alone without it.

    To be called before TensorFlow has done anything else, and once a process: later calls give the same answer.

    Raises:
        WorkersApart: TF_CONFIG is not as expected, or its address for this process cannot be had.
    """
    text = os.environ.get(VARIABLE, "")
    return _join(text) if text else Workers(tf.distribute.get_strategy(), 0, 1)


@functools.cache
def _join(text: str) -> Workers:
    index, addresses = _read(text)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError) as err:
        raise WorkersApart(
            f"worker {index} cannot listen at {addresses[index]}, as {VARIABLE} says, or the others "
            f"({', '.join(addresses)}) did not come: {_one_line(err)}"
        ) from err
    if strategy.num_replicas_in_sync != len(addresses):
        raise WorkersApart(f"{VARIABLE} names {len(addresses)} workers; {strategy.num_replicas_in_sync} came together")
    return Workers(strategy, index, len(addresses))


def _read(text: str) -> tuple[int, list[str]]:
    """This process's index and the addresses of all."""
    try:
        config = json.loads(text)
        addresses, task = config["cluster"]["worker"], config["task"]
        index = task["index"]
        if task["type"] == "worker" and set(config["cluster"]) == {"worker"} and 0 <= index < len(addresses):
            return index, addresses
    except (ValueError, KeyError, TypeError) as err:
        raise _not_understood(text) from err
    raise _not_understood(text)


def _not_understood(text: str) -> WorkersApart:
    return WorkersApart(
        f"{VARIABLE} is {text[:200]!r}; expected is "
        '{"cluster": {"worker": ["host-0:port", "host-1:port"]}, "task": {"type": "worker", "index": 0}} '
        "with the index of this process, or no such variable to train alone"
    )


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())[:300]
