"""See that a request to stop is heard.

A signal's handler that raises runs wherever the main thread is just then. In a destructor or in a weak reference's
callback the exception goes no further: Python prints it, drops it, and the work goes on as if nobody had asked.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final

_AGAIN_AFTER_S: Final = 0.05
"""Long enough for the main thread to be out of where the first exception was dropped."""


@contextlib.contextmanager
def never_lost(*kinds: type[BaseException]) -> Iterator[None]:
    """While the block runs, the signal is sent again whose exception was dropped. For the main thread.

    Args:
        kinds: what the handlers raise: ``KeyboardInterrupt`` for SIGINT, others for SIGTERM.
    """
    before = sys.unraisablehook
    dropped: queue.SimpleQueue[signal.Signals | None] = queue.SimpleQueue()  # its put may interrupt anything
    over = threading.Event()

    def notice(what: Any) -> None:
        if issubclass(what.exc_type, kinds):
            dropped.put(signal.SIGINT if issubclass(what.exc_type, KeyboardInterrupt) else signal.SIGTERM)
        else:
            before(what)

    def send_again() -> None:
        while (number := dropped.get()) is not None:
            if not over.wait(_AGAIN_AFTER_S):
                os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_again, daemon=True)
    sender.start()
    sys.unraisablehook = notice
    try:
        yield
    finally:
        sys.unraisablehook = before
        over.set()
        dropped.put(None)
