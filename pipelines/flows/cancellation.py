"""Heed a cancellation asked for in Prefect's UI or API. A worker does that for its runs; for ours there is none."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Final
from uuid import UUID

from prefect import get_client
from prefect.runtime import flow_run

_LOOK_EVERY_S: Final = 2.0


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """While the block runs, a cancellation of this flow run is a SIGTERM to this process, as from a worker."""
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(UUID(str(flow_run.get_id())), done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()


def _watch(run: UUID, done: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not done.wait(_LOOK_EVERY_S):
            with contextlib.suppress(Exception):  # the server may be away; the flow goes on
                state = client.read_flow_run(run).state
                if state is not None and state.is_cancelling() and not done.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
