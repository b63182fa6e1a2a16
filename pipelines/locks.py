"""One at a time: a lock on a file, which the system lets go when its holder dies, however it dies."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from digits.errors import DigitsError

RELEASE_LOCK: Final = "release.lock"
"""In the run folder: held by a release, and by what must not go on beside one."""


class Busy(DigitsError):
    """Another process does this already."""

    code = "busy"


@contextlib.contextmanager
def only_one(path: Path, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock while the block runs.

    Args:
        path: the lock's file; its folder is made. The holder's process id is in ``<path>.pid``, for people.
        what: the work in words, for the message, such as "release".
        wait_s: how long to wait for the other one.

    Raises:
        Busy: another process holds it still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_name(path.name + ".pid")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait_s, poll_interval=0.1)
    except Timeout as err:
        with contextlib.suppress(OSError):
            what = f"{what} (process {holder.read_text().strip()})"
        raise Busy(f"another {what} is at work here; one at a time. Wait until it has finished, or stop it") from err
    try:
        holder.write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock.release()
