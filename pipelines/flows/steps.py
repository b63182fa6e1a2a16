"""What a person sees of a flow: its steps in the log, and on the terminal when someone looks on."""

import sys
from typing import TextIO

from prefect import get_run_logger


class _Watched:
    """Whether someone looks on, in this process."""

    on = False


def watch(on: bool) -> None:
    """Whether steps, the stages' output and progress bars are shown on stderr, besides the log."""
    _Watched.on = on


def terminal() -> TextIO | None:
    """Where a person watches; None when nobody does, since the log shows every line already."""
    return sys.stderr if _Watched.on else None


def say(text: str) -> None:
    """One step, done or begun."""
    stream = terminal()
    if stream is not None:
        stream.write(text + "\n")
        stream.flush()
    get_run_logger().info(text)
