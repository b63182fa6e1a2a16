"""Ports for servers that must be told one before they start.

A port that the system hands out (bind to 0, close) may be taken again before the server binds it: by another test's
server, or as the near end of anybody's outgoing connection. So these lie outside the range that the system takes from,
each test process has a part of its own, and none is handed out twice in a row.
"""

import itertools
import os
import random
import socket
from pathlib import Path

_LOWEST, _HIGHEST = 10_000, 65_535
_WORKERS = 8


def _outside_the_systems_range() -> range:
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except OSError:
        first, last = 49_152, _HIGHEST  # what IANA calls dynamic
    return max(range(_LOWEST, first), range(last + 1, _HIGHEST + 1), range(_LOWEST, _LOWEST + 20_000), key=_room)


def _room(ports: range) -> int:
    """Ranges of some thousands are as good as larger ones; the first of those is taken."""
    return min(len(ports), 4_000)


def _mine() -> itertools.cycle:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    ports = list(_outside_the_systems_range()[worker::_WORKERS])
    start = random.SystemRandom().randrange(len(ports))  # two runs of the tests at once begin in different places
    return itertools.cycle(ports[start:] + ports[:start])


_ports = _mine()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def free_ports(count: int) -> list[int]:
    """Such ports, all different."""
    return [free_port() for _ in range(count)]
