"""Bound sockets, and one plain line when there is none to be had."""

import contextlib
import socket

from digits.errors import DigitsError
from serving.gateway.settings import join_host_port

BACKLOG = 2048


class CannotListen(DigitsError):
    """An address cannot be listened on."""

    code = "cannot_listen"

    def __init__(self, address: str, variable: str) -> None:
        super().__init__(
            f"cannot listen on {address}: the port is in use, or the address is not this machine's; "
            f"stop what uses it, or set {variable}"
        )


def listen(host: str, port: int, variable: str, *, shared: bool = False) -> socket.socket:
    """A listening TCP socket.

    Args:
        host: Address or name.
        port: 0 takes a free one.
        variable: The setting that moves it, for the error.
        shared: Others of this user may listen there too (SO_REUSEPORT). Else a port in use is an error.

    Raises:
        CannotListen: It is in use, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as err:
        raise CannotListen(join_host_port(host, port), variable) from err
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as err:
        listener.close()
        raise CannotListen(join_host_port(host, port), variable) from err
    return listener


def accept_waiting(listener: socket.socket) -> list[socket.socket]:
    """The connections that the kernel has made and nobody has accepted: closing the listener would reset them."""
    listener.setblocking(False)
    accepted = []
    with contextlib.suppress(OSError):  # there are no more
        while True:
            accepted.append(listener.accept()[0])
    return accepted


def require_free(host: str, port: int, variable: str) -> int:
    """The port's number, once it is sure that nobody listens there; errors as ``listen``.

    Sockets that share a port do not notice another program that shares it too.
    """
    with listen(host, port, variable) as probe:
        number: int = probe.getsockname()[1]
    return number
