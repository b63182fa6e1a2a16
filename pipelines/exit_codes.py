"""Exit codes of ``python -m pipelines``, for scripts."""

from enum import IntEnum


class Exit(IntEnum):
    """How a command ended. Any other failure is 1, with one line on stderr that says why."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    """Wrong usage, or a setting (``DIGITS_*``) that cannot be used; one line on stderr says what."""
    REJECTED = 3
    """The gate rejected the candidate: nothing is broken, and nothing was published."""
    DIFFERS = 4
    """A version was built again and is not the same: nothing is broken, and nothing was changed."""
    BUSY = 5
    """Another one is at work here: nothing was done."""
    STOPPED = 130
    """Stopped on request (Ctrl-C, SIGTERM, cancelled in Prefect): nothing is half-done."""
