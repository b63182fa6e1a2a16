"""Where calls are computed: short ones in the event loop that reads them, one after another; others on threads.

Handing a call to a thread and its answer back costs more than a small model does, and threads that share a processor
make each call take as long as all of them. In the loop an answer leaves before the next call is begun. What long calls
would do there, hold up everything, is ruled out by measuring: a kind of call goes to the loop once a thread has shown
that it is short, and leaves it when one is long.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc
import structlog

from serving.model_server.errors import ServingError
from serving.transport.grpc_server import Call

log = structlog.get_logger()

LONG_ALONE_S: Final = 0.02
"""A call that takes longer is long, where there is one processor: what else came would wait for it anyway, mostly."""

LONG_S: Final = 0.002
"""And where there are more, which could do something else meanwhile."""

LONG_FOR_S: Final = 1.0
"""A kind of call of which one was long stays on threads for so long."""

MOST_READ_BYTES: Final = 256 * 1024
"""A larger message is not even read in the loop."""

Work = Callable[[], bytes]
"""Computes a serialized answer, or raises ``ServingError``."""

_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_Outcome = tuple[grpc.StatusCode, str] | bytes


class Workers:
    """Computes calls and answers them. All methods are the loop's.

    Args:
        threads: calls that threads work on at a time.
        processors: how many there are; with several only one call at a time is computed in the loop.
        in_loop: whether any may be. Not where calls wait for each other, as in batches.
    """

    def __init__(self, threads: int, processors: int, *, in_loop: bool = True) -> None:
        self._pool = ThreadPoolExecutor(threads, "inference")
        self._several = processors > 1
        self._long_s = LONG_S if self._several else LONG_ALONE_S
        self._in_loop = in_loop
        self._turn: deque[tuple[Call, Hashable, Work]] = deque()
        self._on_threads = 0
        self._short_from: dict[Hashable, float] = {}
        """By kind of call: the time from which it may be computed in the loop."""
        self._learning = threading.Lock()

    def run(self, call: Call, kind: Hashable, work: Work) -> None:
        """Compute ``work`` in its turn and answer with it.

        ``kind``: calls of one kind take about as long as each other; None: nothing is known of it.
        """
        if self._may_join(kind):
            self._turn.append((call, kind, work))
            if len(self._turn) == 1:
                call.connection.loop.call_soon(self._next)
        else:
            self._on_threads += 1
            self._pool.submit(self._on_thread, call, kind, work)

    def _may_join(self, kind: Hashable) -> bool:
        if kind is None or not self._in_loop or (self._turn and self._several):
            return False
        # A thread may hold what the loop would then wait for: the only interpreter, the interpreter lock.
        return not self._on_threads and time.monotonic() >= self._short_from.get(kind, float("inf"))

    def _next(self) -> None:
        call, kind, work = self._turn[0]
        try:
            if is_wanted(call):
                end(call, self._timed(kind, work))
                call.connection.flush()
        finally:  # whatever became of this one, the others have their turn
            self._turn.popleft()
            if self._turn:  # what has come and what is to go goes before
                call.connection.loop.call_soon(self._next)

    def _on_thread(self, call: Call, kind: Hashable, work: Work) -> None:
        outcome = self._timed(kind, work) if is_wanted(call, may_end=False) else b""
        call.connection.loop.call_soon_threadsafe(self._back, call, outcome)

    def _back(self, call: Call, outcome: _Outcome) -> None:
        self._on_threads -= 1
        if is_wanted(call):
            end(call, outcome)

    def _timed(self, kind: Hashable, work: Work) -> _Outcome:
        started = time.monotonic()
        outcome = outcome_of(work)
        now = time.monotonic()
        if kind is not None and isinstance(outcome, bytes):  # names in calls that fail are anybody's invention
            with self._learning:
                if now - started > self._long_s:
                    self._short_from[kind] = now + LONG_FOR_S
                else:
                    self._short_from.setdefault(kind, now)
        return outcome


def outcome_of(work: Work) -> _Outcome:
    """The answer, or the status that stands for what was raised; anything but a ServingError is logged."""
    try:
        return work()
    except ServingError as err:
        return _CODES[int(err.status)], err.message
    except Exception:
        log.exception("internal_error")
        return grpc.StatusCode.INTERNAL, "internal error"


def end(call: Call, outcome: _Outcome) -> None:
    """Answer a call that has not ended."""
    if isinstance(outcome, bytes):
        call.answer(outcome)
    else:
        call.fail(*outcome)


def is_wanted(call: Call, *, may_end: bool = True) -> bool:
    """Whether anybody waits for the answer; a call that is late ends here, in the loop."""
    if call.is_over:
        return False
    limit_s = call.asked.timeout_s
    if limit_s is None or time.monotonic() - call.started < limit_s:
        return True
    if may_end:
        call.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    return False
