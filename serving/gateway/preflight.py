"""Before anything listens: wait for the model server to, where the operator wants a start without one to fail."""

import signal
import socket
import sys
import time
from typing import Final

from digits.errors import DigitsError
from serving.gateway.settings import Settings, split_target

PAUSE_S: Final = 0.2


class UpstreamUnreachable(DigitsError):
    """Nothing listens at the model server's address."""

    code = "upstream_unreachable"


def await_upstream(settings: Settings) -> None:
    """Return when the model server's port accepts a connection, or at once where ``upstream_wait_s`` is not set.

    Raises:
        UpstreamUnreachable: It does not in that time, and why not.
    """
    if settings.upstream_wait_s is None:
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    deadline = time.monotonic() + settings.upstream_wait_s
    while True:
        try:
            _connect(settings.upstream, max(PAUSE_S, deadline - time.monotonic()))
        except OSError as err:
            if time.monotonic() + PAUSE_S >= deadline:
                raise UpstreamUnreachable(
                    f"DIGITS_UPSTREAM={settings.upstream!r}: expected a model server there within "
                    f"{settings.upstream_wait_s:g} s ({err.strerror or err}); start one, or correct the address"
                ) from err
        else:
            return
        time.sleep(PAUSE_S)


def _connect(target: str, timeout_s: float) -> None:
    """One connection, closed again."""
    host, port, path = split_target(target)
    if path:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(path)
    else:
        socket.create_connection((host, port), timeout_s).close()
