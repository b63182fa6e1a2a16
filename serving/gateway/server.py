"""uvicorn with what it lacks: time limits on headers and bodies, word of clients that leave; no signal handlers."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.gateway.rest import CORK, ON_DISCONNECT, RestApp
from serving.gateway.settings import Settings

BODY_GRACE_S = 2.0
"""The application answers 408 when a body is late; a client that goes on dripping is cut off this much later."""

SWEEP_S = 0.5


class RestServer(uvicorn.Server):
    """Serves the REST application on one bound socket.

    Args:
        app: The application.
        listener: A bound socket.
        settings: Time limits.
    """

    def __init__(self, app: RestApp, listener: socket.socket, settings: Settings) -> None:
        self.incomplete: dict[_Protocol, float] = {}
        self._listener = listener
        self._settings = settings
        config = uvicorn.Config(
            cast(Any, app),
            http=_Protocol,
            loop="none",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=cast(int, settings.keep_alive_s),
            timeout_graceful_shutdown=cast(int, settings.drain_timeout_s),
            backlog=2048,
        )
        super().__init__(config)
        config.digits_incomplete = self.incomplete  # type: ignore[attr-defined]
        config.digits_limits_s = settings.header_timeout_s, settings.body_timeout_s + BODY_GRACE_S  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the main program, which drains both protocols."""
        yield

    async def run_until_told(self) -> None:
        """Serve until ``should_exit`` is set; then finish requests under way."""
        sweeper = asyncio.create_task(self._sweep())
        try:
            await self.serve(sockets=[self._listener])
        finally:
            sweeper.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_S, self._settings.header_timeout_s / 4))
            now = time.monotonic()
            for protocol in [protocol for protocol, until in self.incomplete.items() if until <= now]:
                protocol.cut_off()


class Corked:
    """A transport that can hold what is written to it, so that head and body of an answer leave in one system call."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] | None = None
        self.is_closing = transport.is_closing

    def hold(self) -> None:
        """Keep what is written until ``release``."""
        self._held = []

    def release(self) -> None:
        """Write what was kept."""
        held, self._held = self._held, None
        if held:
            self._transport.write(b"".join(held))

    def write(self, data: bytes) -> None:
        """Write, or keep."""
        if self._held is None:
            self._transport.write(data)
        else:
            self._held.append(data)

    def close(self) -> None:
        """Write what was kept, then close."""
        self.release()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Protocol(HttpToolsProtocol):
    """One connection. From its start to its headers' end, and on to its body's end, it is on the server's list."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._incomplete: dict[_Protocol, float] = self.config.digits_incomplete  # type: ignore[attr-defined]
        self._header_s, self._body_s = self.config.digits_limits_s  # type: ignore[attr-defined]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = self._cork = Corked(transport)  # type: ignore[assignment]
        self._incomplete[self] = time.monotonic() + self._header_s

    def connection_lost(self, exc: Exception | None) -> None:
        self._incomplete.pop(self, None)
        cycle = self.cycle
        super().connection_lost(exc)
        if cycle is not None and not cycle.response_complete:
            leave = cast(dict[str, Any], cycle.scope).get(ON_DISCONNECT)
            if leave is not None:
                leave()

    def on_message_begin(self) -> None:
        self._incomplete[self] = time.monotonic() + self._header_s
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[CORK] = self._cork

    def on_headers_complete(self) -> None:
        self._incomplete[self] = time.monotonic() + self._body_s
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.cycle.response_complete:
            # Refused before its body had come. uvicorn starts no keep-alive time then, so this does.
            self._incomplete[self] = time.monotonic() + self.timeout_keep_alive
        else:
            self._incomplete.pop(self, None)
        super().on_message_complete()

    def cut_off(self) -> None:
        """Close the connection: its request has taken too long."""
        self._incomplete.pop(self, None)
        self.transport.close()
