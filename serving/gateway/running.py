"""REST and gRPC together in one event loop: from bound ports to a drained end."""

import asyncio
import os
import socket
from typing import Self

from digits.errors import DigitsError
from serving.gateway.app import Gateway
from serving.gateway.logs import Logs
from serving.gateway.rest import RestApp
from serving.gateway.rpc import RpcServer
from serving.gateway.server import RestServer
from serving.gateway.settings import Settings, join_host_port


class CannotListen(DigitsError):
    """An address cannot be listened on."""

    code = "cannot_listen"


class Running:
    """A gateway that accepts requests. Get one from ``start``, end it with ``drain``."""

    def __init__(self, gateway: Gateway, rest: RestServer, rpc: RpcServer, rest_port: int) -> None:
        host = gateway.settings.host
        self.gateway = gateway
        self.rest_address = join_host_port(host, rest_port)
        self.grpc_address = join_host_port(host, rpc.port)
        self.rest_ended = asyncio.create_task(rest.run_until_told())
        self._rest = rest
        self._rpc = rpc

    @classmethod
    async def start(cls, settings: Settings, logs: Logs) -> Self:
        """Bind both ports and accept requests.

        Raises:
            CannotListen: A port is taken, or the address is not one of this machine's.
        """
        listener = _listen(settings.host, settings.rest_port, "DIGITS_REST_PORT")
        try:
            grpc_listener = _listen(settings.host, settings.grpc_port, "DIGITS_GRPC_PORT")
        except CannotListen:
            listener.close()
            raise
        gateway = Gateway(settings, logs)
        rpc = RpcServer(gateway, grpc_listener)
        running = cls(gateway, RestServer(RestApp(gateway), listener, settings), rpc, listener.getsockname()[1])
        await rpc.start()
        gateway.upstream.watch()
        logs.log.info(
            "listening",
            rest=f"http://{running.rest_address}",
            grpc=running.grpc_address,
            upstream=settings.upstream,
            pid=os.getpid(),
        )
        return running

    async def drain(self) -> None:
        """Readiness off; a pause in which balancers notice; no new connections; what is under way is finished."""
        settings, log = self.gateway.settings, self.gateway.log
        log.info("draining", delay_s=settings.drain_delay_s, timeout_s=settings.drain_timeout_s)
        self.gateway.draining = True
        await self._rpc.not_serving()
        await asyncio.sleep(settings.drain_delay_s)
        self._rest.should_exit = True
        await asyncio.gather(self._rpc.stop(settings.drain_timeout_s), self.rest_ended)
        await self.gateway.close()
        log.info("stopped")


def _listen(host: str, port: int, variable: str) -> socket.socket:
    """A bound socket, without SO_REUSEPORT: a port in use is to be an error."""
    address = join_host_port(host, port)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as err:
        raise _cannot_listen(address, variable) from err
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(2048)
    except OSError as err:
        listener.close()
        raise _cannot_listen(address, variable) from err
    return listener


def _cannot_listen(address: str, variable: str) -> CannotListen:
    return CannotListen(
        f"cannot listen on {address}: the port is in use, or the address is not this machine's; "
        f"stop what uses it, or set {variable}"
    )
