"""REST and gRPC together in one event loop: from bound ports to a drained end."""

import asyncio
import contextlib
import os
import socket
from typing import Final, Self

from serving.gateway.app import Gateway
from serving.gateway.listening import listen
from serving.gateway.logs import Logs
from serving.gateway.rest import RestApp
from serving.gateway.rpc import RpcServer
from serving.gateway.server import RestServer
from serving.gateway.settings import Settings, join_host_port
from serving.gateway.tls import server_context
from serving.gateway.worker import Control

LEAVE_S: Final = 0.5
"""Time in which connections in use are told to go with their next answer; then idle ones are closed."""


class Running:
    """A gateway that accepts requests. Get one from ``start``, end it with ``drain`` or ``retire``."""

    def __init__(self, gateway: Gateway, rest: RestServer, rpc: RpcServer, rest_port: int) -> None:
        host = gateway.settings.host
        self.gateway = gateway
        self.rest_address = join_host_port(host, rest_port)
        self.grpc_address = join_host_port(host, rpc.port)
        self.rest_ended = asyncio.create_task(rest.run_until_told())
        self._rest = rest
        self._rpc = rpc

    @classmethod
    async def start(
        cls,
        settings: Settings,
        logs: Logs,
        inherited: tuple[socket.socket, socket.socket] | None = None,
        control: Control | None = None,
    ) -> Self:
        """Bind both ports and accept requests.

        Args:
            settings: What the operator set.
            logs: Where lines go.
            inherited: The listening sockets of REST and gRPC, if this is one of several workers.
            control: The line to the supervisor then.

        Raises:
            BadSettings: A file that the settings name cannot be used.
            CannotListen: A port is taken, or the address is not one of this machine's.
        """
        context = server_context(settings, "http/1.1")
        with contextlib.ExitStack() as undo:
            rest_listener, grpc_listener = inherited or _listen(settings, undo)
            gateway = Gateway(settings, logs)
            if control is not None:
                gateway.control = control
                control.tells(gateway.metrics.snapshot)
            rpc = RpcServer(gateway, grpc_listener)
            undo.pop_all()
        rest = RestServer(RestApp(gateway), rest_listener, settings, context)
        running = cls(gateway, rest, rpc, rest_listener.getsockname()[1])
        await rpc.start()
        gateway.upstream.watch()
        if inherited is None:
            running.say_listening()
        return running

    def say_listening(self) -> None:
        """One line with the addresses, and one if anybody at all may use them."""
        settings, log = self.gateway.settings, self.gateway.log
        scheme = "https" if settings.tls_cert_file else "http"
        log.info(
            "listening",
            rest=f"{scheme}://{self.rest_address}",
            grpc=self.grpc_address,
            upstream=settings.upstream,
            pid=os.getpid(),
        )
        if settings.is_open_to_all:
            log.warning("open_to_all", host=settings.host, hint="DIGITS_API_KEYS_FILE or DIGITS_TLS_CLIENT_CA_FILE")

    async def retire(self) -> None:
        """Leave the work to another worker on the same sockets, which accepts already: balancers see nothing of it."""
        self.gateway.draining = self.gateway.replaced = True
        await self._finish()

    async def drain(self) -> None:
        """Readiness off; a pause in which balancers notice; no new connections; what is under way is finished."""
        settings, log = self.gateway.settings, self.gateway.log
        log.info("draining", delay_s=settings.drain_delay_s, timeout_s=settings.drain_timeout_s)
        self.gateway.draining = True
        await self._rpc.not_serving()
        await asyncio.sleep(settings.drain_delay_s)
        await self._finish()
        log.info("stopped")

    async def _finish(self) -> None:
        """No new connections; what is under way ends."""
        self._rest.stop_accepting()
        ending = asyncio.create_task(self._rpc.stop(self.gateway.settings.drain_timeout_s))
        await self._rest.until_left(LEAVE_S)
        self._rest.should_exit = True
        await asyncio.gather(ending, self.rest_ended)
        await self.gateway.close()


def _listen(settings: Settings, undo: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    rest = undo.enter_context(listen(settings.host, settings.rest_port, "DIGITS_REST_PORT"))
    return rest, undo.enter_context(listen(settings.host, settings.grpc_port, "DIGITS_GRPC_PORT"))
