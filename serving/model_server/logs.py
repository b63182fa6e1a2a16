"""Logging of the model server: one line an event, constant event names, no request data."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from serving.model_server.errors import ServingError


def configure() -> None:
    """Write readable lines to a terminal and JSON elsewhere, both to stderr."""
    on_terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not on_terminal),
            structlog.processors.StackInfoRenderer(),
            *(
                [structlog.dev.ConsoleRenderer()]
                if on_terminal
                else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # Its own descriptor, so that ``libraries_silenced`` leaves it alone.
        logger_factory=structlog.PrintLoggerFactory(os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)),
        cache_logger_on_first_use=True,
    )


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """Keep what C++ writes to stderr off it: TensorFlow greets in plain text before its log level is read.

    When the block fails for a reason that is not known, what was held back is written after all.
    """
    stderr = sys.stderr.fileno()
    original = os.dup(stderr)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), stderr)
        try:
            yield
        except ServingError:
            raise
        except BaseException:
            held_back.seek(0)
            os.write(original, held_back.read())
            raise
        finally:
            os.dup2(original, stderr)
            os.close(original)
