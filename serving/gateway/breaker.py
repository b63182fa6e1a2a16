"""A circuit breaker: after failures in a row the model server is left alone for a moment and calls end at once.

Closed, all calls go. Open, none does. After a pause, or when the model server's status says it is back, it is half
open: one call goes to try, and its end closes or opens the breaker again (M. Nygard, Release It!, 2018, chapter 5).
"""

import random
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Final

IN_A_ROW: Final = 5
"""Failures one after another that open it."""

WINDOW: Final = 32
"""Or half of so many last calls."""

FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 1.0
"""Short: a server that is back is to be used within a second, and a call that tries costs a refused connection."""


class State(IntEnum):
    """As ``digits_breaker_state`` shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Counts how calls end and says whether the next may go. All of it in one event loop.

    Args:
        on_change: Called with each new state.
        clock: Seconds that only grow.
    """

    def __init__(self, on_change: Callable[[State], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.state = State.CLOSED
        self._on_change = on_change
        self._clock = clock
        self._failed = 0  # the last WINDOW calls, newest in bit 0, 1 for a failure
        self._pause_s = FIRST_PAUSE_S
        self._open_until = 0.0
        self._trying = False

    def admits(self) -> bool:
        """Whether a call may go now. In the half open state, the one that is told yes is the one that tries."""
        if self.state is State.CLOSED:
            return True
        if self.state is State.OPEN:
            if self._clock() < self._open_until:
                return False
            self._become(State.HALF_OPEN)
        if self._trying:
            return False
        self._trying = True
        return True

    def succeeded(self) -> None:
        """A call was answered, be it with an error of the caller's."""
        if self._failed:
            self._failed = self._failed << 1 & (1 << WINDOW) - 1
        if self.state is not State.CLOSED:
            self._failed = 0
            self._pause_s = FIRST_PAUSE_S
            self._become(State.CLOSED)

    def failed(self) -> None:
        """A call found no server, or lost it."""
        self._failed = (self._failed << 1 | 1) & (1 << WINDOW) - 1
        in_a_row = (1 << IN_A_ROW) - 1
        if self.state is State.HALF_OPEN:
            self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
            self._open()
        elif self.state is State.CLOSED and (
            self._failed & in_a_row == in_a_row or self._failed.bit_count() >= WINDOW // 2
        ):
            self._open()

    def gave_up(self) -> None:
        """A call ended without a word about the server: its caller left, or had no time. Another may try."""
        self._trying = False

    def server_is_back(self) -> None:
        """The model server's status says that it serves: the next call may try."""
        if self.state is State.OPEN:
            self._become(State.HALF_OPEN)

    def retry_after_s(self) -> float:
        """When the next call may try."""
        return max(0.05, self._open_until - self._clock())

    def _open(self) -> None:
        # Spread, so that several gateways do not come back as one.
        self._open_until = self._clock() + self._pause_s * random.uniform(0.75, 1.25)  # noqa: S311 - jitter, no secret
        self._become(State.OPEN)

    def _become(self, state: State) -> None:
        self._trying = False
        self.state = state
        self._on_change(state)
