"""An event loop that looks for more instead of sleeping, for a while after it has had work.

A core that sleeps has to be woken, which on a virtual machine takes tens of microseconds and more, and a call's way
through the gateway does that twice. Who has a core to spare may pay with it for shorter waiting.
"""

import asyncio
import time


class BusyWait:
    """Keeps an event loop awake.

    Args:
        loop: The loop; all methods are to be called in it.
        seconds: For how long after ``had_work``; 0: the loop sleeps as ever.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._until = 0.0
        self._looks = False

    def had_work(self) -> None:
        """More may come any moment."""
        if self._seconds:
            self._until = time.monotonic() + self._seconds
            if not self._looks:
                self._looks = True
                self._loop.call_soon(self._look)

    def _look(self) -> None:
        """While something is to be called soon, the loop asks the kernel what has come and does not wait for it."""
        self._looks = time.monotonic() < self._until
        if self._looks:
            self._loop.call_soon(self._look)
