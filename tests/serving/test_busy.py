"""An event loop that stays awake after it has had work."""

import asyncio
import time

from serving.transport.busy import BusyWait

AWAKE_S = 0.05


class CountingLoop(asyncio.SelectorEventLoop):
    """How often it has asked the kernel what has come."""

    turns = 0

    def _run_once(self) -> None:
        self.turns += 1
        super()._run_once()  # type: ignore[misc]


def turns(seconds: float, *, again: bool = False) -> tuple[int, int]:
    """The loop's turns in the first ``AWAKE_S`` after work, and in as long a time when twice that has passed."""
    loop = CountingLoop()

    async def count() -> tuple[int, int]:
        busy = BusyWait(loop, seconds)
        busy.had_work()
        if again:
            busy.had_work()
        first, until = loop.turns, time.monotonic() + AWAKE_S
        await asyncio.sleep(AWAKE_S)
        first = loop.turns - first
        while time.monotonic() < until + AWAKE_S:  # noqa: ASYNC110
            await asyncio.sleep(AWAKE_S)
        later = loop.turns
        await asyncio.sleep(AWAKE_S)
        return first, loop.turns - later

    try:
        return loop.run_until_complete(count())
    finally:
        loop.close()


def test_it_looks_again_and_again_after_work_and_then_sleeps() -> None:
    """Awake it takes a turn every few microseconds; asleep one for the timer that is waited for, or two."""
    first, later = turns(AWAKE_S)
    assert first > 50
    assert later <= 5


def test_without_a_time_it_sleeps_as_ever() -> None:
    first, later = turns(0.0)
    assert first <= 5
    assert later <= 5


def test_work_while_it_is_awake_makes_no_second_round() -> None:
    """Told twice it ends as soon, and the loop sleeps."""
    first, later = turns(AWAKE_S, again=True)
    assert first > 50
    assert later <= 5
