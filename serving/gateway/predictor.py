"""Images in, answers out, whatever the transport. Coalesces calls, keeps deadlines, refuses what it cannot do in time.

A call to the model server costs far more than the model does for one image. So calls that arrive while one is under way
wait together and go upstream as one, bounded in size. No timer holds a call back: when nothing is under way it goes at
once, and batches grow only as load does. Further calls go beside the first, up to a small number, when half as many
wait as are under way, so that neither this process nor the model server idles while the other works; or when the model
is slow: one call that hangs does not hold up the rest. For the same reason clients that all wait for each other's batch
are parted: a call takes no more than its share of all that is in, and goes the moment that its share waits, while the
requests of the others are still being read.
"""

import asyncio
import copy
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import numpy as np

from digits import contract
from digits.certainty import certainty
from digits.errors import DigitsError, ModelUnavailable, Overloaded, UpstreamTimeout
from serving.gateway import eager
from serving.gateway.metrics import Metrics
from serving.gateway.tracing import METADATA, Metadata
from serving.gateway.upstream import LATEST, Predictions, Version
from serving.transport.busy import BusyWait

MAX_TURNS = 2
"""Turns of the event loop for which a batch is kept open while each brings more; in an idle gateway one, some 10 µs."""

SHARE_BESIDE = 0.5
"""What waits goes beside what is under way if it is at least this share of the last call."""

FEW_CALLS = 2
"""Beside so many goes only a call of a whole part: under little load more at once only take time from each other."""

LEAST_PART = 16
"""Calls of fewer images are not worth parting: a call's fixed cost is that of about five images."""

LEAST_PART_SHARE = 0.75
"""A part's least share of a call under lasting overload; else it and the short queue make each other ever smaller."""

FEWER_FALL = 0.1
"""Weight of a smaller number of images that are in, among those before; a larger one counts at once."""

FEW_SHARE = 1 / 16
"""A call of so much of a batch is one of few images."""

FEW_RISE = 0.01
"""Weight of a slower such call among those before."""

SHORT_CALL_COST = 1.5
"""Under lasting overload calls become so small that an image costs so many times what it costs in a whole batch."""

LEAST_SHARE = 3 / 16
"""But no smaller than this share of a batch: on a machine with other work a call's fixed cost grows without bound."""

SHORT_QUEUE_SHARE = 0.5
"""Under lasting overload so much of a batch may wait beside what goes at once; more would wait longer to no use."""

FULL_S = 0.0005
"""For so long a queue that was too long and has not become shorter still is."""

EXPIRY_TICK_S = 0.01
"""A caller learns within this time that its deadline has passed."""

SLOW_CALL_S = 0.01
"""A call under way for longer than this is no reason for others to wait."""


TOO_SLOW = "more images are waiting than can be read in time; try again later"


class Answer(NamedTuple):
    """One image's answer. ``confidence`` is the probability of ``digit``; the ``probabilities``, one a class, sum to 1.

    ``label`` is what the class ``digit`` is called, empty where it is a digit; ``unsure`` whether the answer had better
    not be used.
    """

    digit: int
    confidence: float
    probabilities: list[float]
    model_version: str
    label: str = ""
    unsure: bool = False


class Place:
    """A caller's place among those that wait. Subclass it to say what is to happen when its answers are there.

    Args:
        images_u8: Canonical images, one after another, ``count * 784`` bytes.
        count: How many, at least 1.
        deadline: ``time.monotonic()`` seconds. Once it has passed the images are never sent upstream.
        version: Which version of the model is to answer. Only calls for the same one go upstream together.
        trial: Most of the images are no digits; their answers are not counted among the predictions.
    """

    __slots__ = ("arrived", "count", "deadline", "images_u8", "metadata", "over", "trial", "version")

    def __init__(
        self, images_u8: bytes, count: int, deadline: float, version: Version = LATEST, trial: bool = False
    ) -> None:
        self.images_u8 = images_u8
        self.count = count
        self.deadline = deadline
        self.version = version
        self.trial = trial
        self.metadata: Metadata = ()
        """What is to go upstream with it, of the first in a batch that brings any."""
        self.arrived = 0.0
        self.over = False
        """Answered, refused or left: nothing happens any more."""

    def answered(self, answers: list[Answer]) -> None:
        """One answer for each image. Called in the event loop, once, unless ``refused`` is."""
        raise NotImplementedError

    def refused(self, err: Exception) -> None:
        """There will be no answers. ``err`` is a DigitsError, or a defect."""
        raise NotImplementedError


class Waiting(asyncio.Future[list[Answer]]):
    """A place one can await. Cancel it, or the task that awaits it, to leave."""

    def __init__(self, predictor: "Predictor", place: "_Awaited") -> None:
        super().__init__(loop=predictor.loop)
        self._predictor = predictor
        self._place = place

    def cancel(self, msg: object = None) -> bool:
        """Leave; a place in the queue is free at once."""
        self._predictor.leave(self._place)
        return super().cancel(msg)


class _Awaited(Place):
    __slots__ = ("future",)

    future: Waiting

    def answered(self, answers: list[Answer]) -> None:
        if not self.future.done():
            self.future.set_result(answers)

    def refused(self, err: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(err)


class Predictor:
    """The service behind every adapter. Create it inside a running event loop.

    Args:
        predict: ``(images_u8, count, deadline, version) -> Predictions``: one upstream call. What it does before it
            first waits is done at once, perhaps in ``enter``; see ``eager.start``.
        metrics: Where waits, batches, refusals and answers are counted.
        max_batch: Most images in one upstream call; a single caller with more goes alone.
        max_calls: Most upstream calls under way at once.
        max_queue: Most images waiting.
        max_wait_s: Longest wait that a call is let in for, as measured calls let expect it.
        unsure_below: Answers of less certainty are unsure; None for the model's own threshold.
        max_burst_s: Whole batches that wait for longer than this, and than four calls take, are no burst but more work
            than can be done: a long queue would only make all wait. Queue and batches are kept short then, until
            nobody had to be refused for as long (after CoDel, Nichols and Jacobson 2012).
        busy_wait_s: For so long after a call has left or come back the loop does not sleep.
    """

    def __init__(
        self,
        predict: Callable[[bytes, int, float, Version], Awaitable[Predictions]],
        metrics: Metrics,
        *,
        max_batch: int = 128,
        max_calls: int = 3,
        max_queue: int = 1024,
        max_wait_s: float = 0.25,
        max_burst_s: float = 0.1,
        busy_wait_s: float = 0.0,
        unsure_below: float | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.queued_images = 0
        self._predict = predict
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_calls = max_calls
        self._max_queue = max_queue
        self._unsure_below = unsure_below
        self._queue: OrderedDict[Place, None] = OrderedDict()
        self._calls: dict[int, list[Place]] = {}
        self._tasks: set[asyncio.Future[None]] = set()
        self._call_numbers = itertools.count()
        self._dispatch_is_due = False
        self._seen = self._turns = 0
        self._last_call = 0.0
        self._last_count = 0
        self._ticking = False
        self._max_wait_s = max_wait_s
        self._max_burst_s = max_burst_s
        self._call_s = 0.0
        self._standing_since = self._overload_until = 0.0
        self._full_at, self._full_until, self._come_back_s = 0, 0.0, 1.0
        """What ``sheds`` found last: so many images were too many."""
        self._limit = max_batch
        """Images of one call: ``max_batch``, or fewer under lasting overload."""
        self._images_in = 0.0
        """Images that wait or are under way, the most of late."""
        self._part = min(LEAST_PART, max_batch)
        """A call's share of those, at most ``_limit``."""
        self._few = max(1, int(FEW_SHARE * max_batch))
        self._few_s = 0.0
        """What a call of so few images takes that is alone at the model server."""
        self._many = self._many_s = 0.0
        """Images of a call of more, and how long after the one before it comes back when calls follow each other."""
        self._last_back = 0.0
        """When a call came back last."""
        self._images_per_s = 0.0
        self._closed = False
        self._busy = BusyWait(self.loop, busy_wait_s)
        metrics.watch_predictor(lambda: self.queued_images, lambda: len(self._calls))

    def submit(
        self, images_u8: bytes, count: int, deadline: float, version: Version = LATEST, *, trial: bool = False
    ) -> Waiting:
        """Take a place for ``count`` images; await what comes back for their answers. Arguments as of ``Place``.

        Raises:
            UpstreamTimeout: The deadline has passed already.
            Overloaded: Too many images wait.
            ModelUnavailable: The gateway is shutting down.

        What is awaited raises these too, and whatever else the upstream call did.
        """
        place = _Awaited(images_u8, count, deadline, version, trial)
        place.future = Waiting(self, place)
        place.metadata = METADATA.get()
        self.enter(place)
        return place.future

    def enter(self, place: Place) -> None:
        """Take a place; its ``answered`` or ``refused`` is called later. A future costs more: this is for hot paths.

        Raises:
            UpstreamTimeout, Overloaded, ModelUnavailable: As ``submit``; nothing is called then.
        """
        count = place.count
        if len(place.images_u8) != count * contract.IMAGE_BYTES or count < 1:
            raise ValueError(
                f"expected {count} images of {contract.IMAGE_BYTES} bytes, came {len(place.images_u8)} bytes"
            )
        now = time.monotonic()
        if place.deadline <= now:
            raise _expired()
        if self._closed:
            raise ModelUnavailable("this gateway is shutting down; try again")
        if self.queued_images:
            self._refuse_if_too_much(count, place.deadline - now, now)
        place.arrived = now
        self._queue[place] = None
        self.queued_images += count
        if self.queued_images >= self._part and self._may_call():
            self._send_next()
        if not self._dispatch_is_due or not self._ticking:
            self._wake()

    def check_room(self, deadline: float) -> None:
        """Raise as ``enter`` would now for one image: a picture that will be refused need not be decoded."""
        if self.queued_images:
            now = time.monotonic()
            self._refuse_if_too_much(1, deadline - now, now)

    def sheds(self) -> float:
        """Seconds after which to come back, if overload lasts and one more image has no room; else 0.

        For who has thousands a second to refuse: counted as ``check_room`` counts it, but nothing is raised.
        """
        queued = self.queued_images
        if not queued:
            return 0.0
        now = time.monotonic()
        if now >= self._overload_until:
            return 0.0
        if queued < self._full_at or now >= self._full_until:
            if not self._is_beyond_short_queue(now):
                return 0.0
            self._full_at, self._full_until = queued, now + FULL_S
            self._come_back_s = self._retry_after_s()
        self._metrics.shed("queue_slow")
        return self._come_back_s

    def _refuse_if_too_much(self, count: int, remaining_s: float, now: float) -> None:
        queued = self.queued_images
        if queued + count > self._max_queue:
            self._metrics.shed("queue_full")
            raise Overloaded(f"{queued} images are waiting already; try again later", self._retry_after_s())
        if now < self._overload_until and self._is_beyond_short_queue(now):
            self._refuse_as_too_slow()
        if queued >= self._max_batch:
            self._refuse_if_too_slow(remaining_s, now)

    def _is_beyond_short_queue(self, now: float) -> bool:
        """Overload lasts: who would wait for more than one short call under way and half a batch need not wait."""
        goes_at_once = self._limit * max(0, self._calls_allowed(now) - len(self._calls))
        if self.queued_images < max(1, int(SHORT_QUEUE_SHARE * self._limit)) + goes_at_once:
            return False
        self._overload_until = now + self._burst_s()  # it ends when nobody had to be refused for so long
        return True

    def _refuse_if_too_slow(self, remaining_s: float, now: float) -> None:
        """Much is waiting: at the pace of late, would this one's turn come soon enough to be of use?"""
        if not self._standing_since:
            self._standing_since = now
        elif now - self._standing_since > self._burst_s():
            self._overload_until = now + self._burst_s()
        batches = self.queued_images // self._max_batch
        if batches * self._call_s / self._max_calls > min(remaining_s, self._max_wait_s):
            self._refuse_as_too_slow()

    def _short_batch(self) -> int:
        """Images of a call under lasting overload: the fewest with which none costs more than SHORT_CALL_COST."""
        more = self._many - self._few
        image_s = max(0.0, self._many_s - self._few_s) / more if more > 0 else 0.0
        fixed_s = max(0.0, self._few_s - self._few * image_s)
        whole_s = SHORT_CALL_COST * fixed_s / self._max_batch + (SHORT_CALL_COST - 1) * image_s
        fitting = int(fixed_s / whole_s) if whole_s else 0
        return min(self._max_batch, max(1, int(LEAST_SHARE * self._max_batch), fitting))

    def _burst_s(self) -> float:
        return max(self._max_burst_s, 4 * self._call_s)

    def _refuse_as_too_slow(self) -> None:
        self._metrics.shed("queue_slow")
        raise Overloaded(TOO_SLOW, self._retry_after_s())

    def leave(self, place: Place) -> None:
        """Free the place of a caller that has gone."""
        place.over = True
        if place in self._queue:
            del self._queue[place]
            self.queued_images -= place.count

    async def close(self) -> None:
        """Refuse new calls and wait for those that are in."""
        self._closed = True
        while self._calls or self._dispatch_is_due:
            await asyncio.gather(*self._tasks, asyncio.sleep(0), return_exceptions=True)

    def _wake(self) -> None:
        if not self._dispatch_is_due and self._may_call():
            # Not now but after all that this turn of the loop has read: calls that came together go together.
            self._dispatch_is_due = True
            self.loop.call_soon(self._dispatch)
        if not self._ticking:
            self._ticking = True
            self.loop.call_later(EXPIRY_TICK_S, self._tick)

    def _may_call(self) -> bool:
        under_way = len(self._calls)
        if not under_way:
            return True
        now = time.monotonic()
        if under_way >= self._calls_allowed(now):
            return False
        enough = self._part if under_way >= FEW_CALLS else min(self._limit, SHARE_BESIDE * self._last_count)
        return self.queued_images >= enough or now - self._last_call > SLOW_CALL_S

    def _calls_allowed(self, now: float) -> int:
        """Under lasting overload one fewer: there is work for the model server anyway, and more would wait there."""
        return self._max_calls - 1 if now < self._overload_until and self._max_calls > FEW_CALLS else self._max_calls

    def _dispatch(self) -> None:
        if self.queued_images > self._seen and self._turns < MAX_TURNS:
            # More has come in this turn: as long as that goes on, what comes next may still join.
            self._seen = self.queued_images
            self._turns += 1
            self.loop.call_soon(self._dispatch)
            return
        self._dispatch_is_due = False
        self._seen = self._turns = 0
        while self._queue and self._may_call():
            self._send_next()

    def _send_next(self) -> None:
        batch = self._next_batch()
        if batch:
            self._last_call = time.monotonic()
            self._last_count = sum(place.count for place in batch)
            number = next(self._call_numbers)
            self._calls[number] = batch
            self._busy.had_work()
            task = eager.start(self._call(number, batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next_batch(self) -> list[Place]:
        now = time.monotonic()
        self._limit = self._max_batch if now >= self._overload_until else self._short_batch()
        images_in = self.queued_images + sum(place.count for batch in self._calls.values() for place in batch)
        self._images_in = max(images_in, _smoothed(self._images_in, images_in, FEWER_FALL))
        least = LEAST_PART if now >= self._overload_until else math.ceil(LEAST_PART_SHARE * self._limit)
        self._part = min(self._limit, max(least, math.ceil(self._images_in / self._max_calls)))
        batch: list[Place] = []
        count = 0
        while self._queue:
            first = next(iter(self._queue))
            if batch and (count + first.count > self._part or first.version != batch[0].version):
                break
            self._queue.popitem(last=False)
            self.queued_images -= first.count
            if first.deadline <= now:
                _refuse(first, _expired())
            else:
                batch.append(first)
                count += first.count
        if batch:
            if self.queued_images < self._max_batch:
                self._standing_since = 0.0
            self._metrics.batch(count, now - batch[0].arrived)
        return batch

    async def _call(self, number: int, batch: list[Place]) -> None:
        started = time.monotonic()
        count = sum(place.count for place in batch)
        alone = len(self._calls) == 1
        METADATA.set(next((place.metadata for place in batch if place.metadata), ()))
        try:
            images_u8 = b"".join([place.images_u8 for place in batch])
            found = await self._predict(images_u8, count, max(place.deadline for place in batch), batch[0].version)
            self._answer(batch, found)
            if not any(waiting.trial for waiting in batch):
                self._metrics.inputs(images_u8)
        except DigitsError as err:
            self._fail_soon(batch, err)
        except BaseException as err:
            # A defect: each caller's adapter logs it and answers "internal error".
            self._fail_soon(batch, RuntimeError("the upstream call failed").with_traceback(None), err)
            if not isinstance(err, Exception):
                raise
        finally:
            del self._calls[number]
            self._busy.had_work()
            now = time.monotonic()
            took_s = max(now - started, 1e-6)
            self._images_per_s = _smoothed(self._images_per_s, count / took_s)
            self._call_s = _smoothed(self._call_s, took_s)
            if alone and count <= self._few:
                # The quickest of late: what else the machine does is no reason for larger batches.
                self._few_s = took_s if took_s < self._few_s else _smoothed(self._few_s, took_s, FEW_RISE)
            elif count > 2 * self._few:
                self._many = _smoothed(self._many, count)
                self._many_s = _smoothed(self._many_s, now - max(started, self._last_back))
            self._last_back = now
            if self._queue:
                self._wake()

    def _fail_soon(self, batch: list[Place], err: Exception, cause: BaseException | None = None) -> None:
        """Not now: this may be within ``enter``, whose caller cannot hear of it before it returns."""
        self.loop.call_soon(_fail, batch, err, cause)

    def _answer(self, batch: list[Place], found: Predictions) -> None:
        rows = found.probabilities  # (N, C)
        class_count = rows.shape[1]
        digits = rows.argmax(axis=1)  # (N,)
        confidences = rows.max(axis=1)  # (N,)
        unsure_below = found.abstain_below if self._unsure_below is None else self._unsure_below
        unsure: list[int] = []
        if unsure_below and confidences.min() < unsure_below:  # else none is: certainty is never below confidence
            unsure = np.flatnonzero(certainty(rows) < unsure_below).tolist()
        if any(place.trial for place in batch):
            counted = np.repeat([not place.trial for place in batch], [place.count for place in batch])  # (N,)
            self._metrics.predictions(
                digits[counted], confidences[counted], found.model_version, class_count, int(counted[unsure].sum())
            )
        else:
            self._metrics.predictions(digits, confidences, found.model_version, class_count, len(unsure))
        version = found.model_version
        answers = [
            Answer(digit, confidence, row, version)
            for digit, confidence, row in zip(digits.tolist(), confidences.tolist(), rows.tolist(), strict=True)
        ]
        if found.names:
            answers = [answer._replace(label=found.names[answer.digit]) for answer in answers]
        for at in unsure:
            answers[at] = answers[at]._replace(unsure=True)
        start = 0
        for place in batch:
            stop = start + place.count
            if not place.over:
                place.over = True
                place.answered(answers[start:stop])
            start = stop

    def _tick(self) -> None:
        """Tell callers whose deadline has passed. One timer for all is cheaper than a timer for each."""
        now = time.monotonic()
        for place in [place for place in self._queue if place.deadline <= now]:
            self.leave(place)
            place.refused(_expired())
        for batch in self._calls.values():
            for place in batch:
                if place.deadline <= now:
                    _refuse(place, _expired())
        if self._queue:
            self._wake()
        self._ticking = bool(self._queue or self._calls)
        if self._ticking:
            self.loop.call_later(EXPIRY_TICK_S, self._tick)

    def _retry_after_s(self) -> float:
        """About how long it takes until the queue as it is now has been worked off."""
        rate = self._images_per_s * self._max_calls
        return min(60.0, max(1.0, math.ceil(self.queued_images / rate))) if rate else 1.0


def _smoothed(before: float, now: float, weight: float = 0.2) -> float:
    return before + weight * (now - before) if before else now


def _expired() -> UpstreamTimeout:
    return UpstreamTimeout("the model did not answer before the deadline; try again, or allow more time")


def _refuse(place: Place, err: Exception) -> None:
    if not place.over:
        place.over = True
        place.refused(err)


def _fail(batch: list[Place], err: Exception, cause: BaseException | None = None) -> None:
    for place in batch:
        own = copy.copy(err)  # an exception gathers the traceback of everyone who raises it
        own.__cause__ = cause or err
        _refuse(place, own)
