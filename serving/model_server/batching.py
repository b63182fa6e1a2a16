"""Server-side batching: calls of one signature that wait at the same time run as one.

The parameters are TensorFlow Serving's (its batching guide says how to choose them). What differs, on purpose: calls
whose rows have different shapes go into different batches rather than fail; a batch that fails is run again call by
call, so that one bad picture is one caller's error; and a signature whose rows cannot be joined runs as it would
without batching.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog
from tensorflow.core.protobuf import meta_graph_pb2

from serving.model_server.config import Batching
from serving.model_server.errors import Code, ServingError, invalid_argument
from serving.model_server.model import Array, Arrays, Call, Model

log = structlog.get_logger()


@dataclass(slots=True)
class _Task:
    """A call, or a part of one: its arrays in the order of the call's inputs, and who waits for it."""

    feeds: Sequence[Array]
    size: int
    since_s: float
    answer: "Future[dict[str, Array]]" = field(default_factory=Future)


@dataclass(slots=True)
class _Batch:
    call: Call
    opened_s: float
    tasks: list[_Task] = field(default_factory=list)
    size: int = 0


@dataclass(frozen=True, slots=True)
class Observer:
    """Told of each batch: rows in it, rows of filling, and for each call the seconds it waited."""

    batch: Callable[[int, int], object] = lambda _size, _filling: None
    waited: Callable[[float], object] = lambda _seconds: None


class Batcher:
    """The queues and threads that all models share."""

    def __init__(self, options: Batching, observer: Observer | None = None) -> None:
        self.options = options
        self._observer = observer or Observer()
        self._ready = threading.Condition()
        self._queues: dict[Hashable, deque[_Batch]] = {}
        for index in range(options.num_batch_threads):
            threading.Thread(target=self._work, name=f"batch-{index}", daemon=True).start()

    def run(self, key: Hashable, call: Call, feeds: Sequence[Array]) -> dict[str, Array]:
        """Run ``call`` together with others of the same ``key``; returns when it is done.

        Raises:
            ServingError: INVALID_ARGUMENT for more rows than a batch may have, UNAVAILABLE when the queue is full,
                and what the call itself raises.
        """
        size, limit = len(feeds[0]), self.options.max_batch_size
        if size > limit:
            raise invalid_argument(f"Task size {size} is larger than maximum input batch size {limit}")
        step, now = self.options.capacity, time.monotonic()
        tasks = [
            _Task([feed[start : start + step] for feed in feeds], min(step, size - start), now)
            for start in range(0, size, step)
        ]
        self._schedule(key, call, tasks)
        parts = [task.answer.result() for task in tasks]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in call.outputs}

    def _schedule(self, key: Hashable, call: Call, tasks: Sequence[_Task]) -> None:
        with self._ready:
            queue = self._queues.get(key)
            if queue is None:
                queue = self._queues[key] = deque()
            opened = _opened(queue, tasks, self.options.capacity)
            if len(queue) + opened > self.options.max_enqueued_batches:
                if not queue:
                    del self._queues[key]
                raise ServingError(
                    Code.UNAVAILABLE, "The batch scheduling queue to which this task was submitted is full"
                )
            for task in tasks:
                if not queue or queue[-1].size + task.size > self.options.capacity:
                    queue.append(_Batch(call, task.since_s))
                    self._ready.notify()
                batch = queue[-1]
                batch.tasks.append(task)
                batch.size += task.size
                if batch.size == self.options.capacity:
                    self._ready.notify()

    def _work(self) -> None:
        while True:
            with self._ready:
                while (batch := self._take()) is None:
                    self._ready.wait(self._next_due_s())
            try:
                self._process(batch)
            except Exception as err:  # whatever it is, nobody may wait for ever
                log.exception("internal_error", method="batch")
                for task in batch.tasks:
                    if not task.answer.done():
                        task.answer.set_exception(err)

    def _take(self) -> _Batch | None:
        """The next batch that is full or has waited long enough; queues take turns."""
        now = time.monotonic()
        for key, queue in self._queues.items():
            if len(queue) > 1 or queue[0].size == self.options.capacity or self._due_s(queue[0]) <= now:
                batch = queue.popleft()
                del self._queues[key]
                if queue:
                    self._queues[key] = queue
                return batch
        return None

    def _due_s(self, batch: _Batch) -> float:
        return batch.opened_s + self.options.batch_timeout_s

    def _next_due_s(self) -> float | None:
        """Seconds until a batch has waited long enough; None when there is none."""
        due = [self._due_s(queue[0]) for queue in self._queues.values()]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _process(self, batch: _Batch) -> None:
        now = time.monotonic()
        for task in batch.tasks:
            self._observer.waited(now - task.since_s)
        filling = self.options.padded(batch.size) - batch.size
        self._observer.batch(batch.size, filling)
        try:
            feeds = self._join([task.feeds for task in batch.tasks], filling)
            outputs = _compute(batch.call, feeds, batch.size + filling)
        except ServingError as err:
            self._one_by_one(batch, err)
            return
        start = 0
        for task in batch.tasks:
            # A copy, so that an answer does not hold the whole batch in memory; a batch of one is its answer.
            whole = len(batch.tasks) == 1 and not filling
            rows = slice(start, start + task.size)
            task.answer.set_result(outputs if whole else {name: array[rows].copy() for name, array in outputs.items()})
            start += task.size

    def _one_by_one(self, batch: _Batch, err: ServingError) -> None:
        if len(batch.tasks) == 1:
            batch.tasks[0].answer.set_exception(err)
            return
        for task in batch.tasks:
            try:
                task.answer.set_result(batch.call.compute(task.feeds))
            except ServingError as own:
                task.answer.set_exception(own)

    def _join(self, feeds: Sequence[Sequence[Array]], filling: int) -> list[Array]:
        joined = []
        for parts in zip(*feeds, strict=True):
            arrays = _pad(parts) if self.options.pad_variable_length_inputs else list(parts)
            if filling:
                arrays.append(np.repeat(arrays[-1][:1], filling, axis=0))  # a row that is known to be acceptable
            joined.append(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        return joined


class BatchedModel(Model):
    """A model whose calls go through a ``Batcher``."""

    def __init__(self, model: Model, batcher: Batcher) -> None:
        super().__init__(model.path, model.signatures)
        self._model = model
        self._batcher = batcher

    def run(self, signature_name: str, inputs: Arrays, output_filter: Sequence[str] = ()) -> dict[str, Array]:
        """As for any model, from a batch where rows can be joined."""
        call = self._model.call(signature_name, output_filter)
        feeds = call.feeds(inputs)
        sizes = {len(feed) for feed in feeds} if call.batchable else set()
        if len(sizes) != 1 or sizes == {0}:
            return call.compute(feeds)
        shapes = () if self._batcher.options.pad_variable_length_inputs else tuple(feed.shape[1:] for feed in feeds)
        return self._batcher.run((id(call), shapes), call, feeds)

    def run_together(self, wanted: Mapping[str, Sequence[str]], inputs: Arrays) -> dict[str, dict[str, Array]]:
        """Unbatched, as in TensorFlow Serving."""
        return self._model.run_together(wanted, inputs)

    def close(self) -> None:
        """Free the model. It is closed when its last call has ended, so that no batch of it waits."""
        self._model.close()

    def _make_call(self, _name: str, _signature: meta_graph_pb2.SignatureDef, _filter: Sequence[str]) -> Call:
        raise NotImplementedError("calls are those of the model within")


def _compute(call: Call, feeds: Sequence[Array], rows: int) -> dict[str, Array]:
    outputs = call.compute(feeds)
    if any(len(array) != rows for array in outputs.values()):
        raise ServingError(
            Code.FAILED_PRECONDITION,
            "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes of the input "
            "tensors",
        )
    return outputs


def _opened(queue: Sequence[_Batch], tasks: Sequence[_Task], capacity: int) -> int:
    """How many batches ``tasks`` would add to the queue."""
    opened, last = 0, queue[-1].size if queue else capacity
    for task in tasks:
        if last + task.size > capacity:
            opened, last = opened + 1, 0
        last += task.size
    return opened


def _pad(parts: Sequence[Array]) -> list[Array]:
    """Rows of different shapes, filled up with zeros (or empty strings) at their ends to the largest of each size."""
    shape = np.max([part.shape[1:] for part in parts], axis=0)
    padded = []
    for part in parts:
        fill: Any = b"" if part.dtype.kind == "O" else 0
        widths = [(0, 0), *((0, int(size)) for size in shape - part.shape[1:])]
        padded.append(np.pad(part, widths, constant_values=fill) if any(w for _, w in widths) else part)
    return padded
