"""uvicorn with what it lacks: time limits on headers and bodies, word of clients that leave; no signal handlers."""

import asyncio
import contextlib
import math
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.gateway import lean
from serving.gateway.listening import accept_waiting
from serving.gateway.rest import CORK, ON_DISCONNECT, RestApp
from serving.gateway.settings import Settings

BODY_GRACE_S = 2.0
"""The application answers 408 when a body is late; a client that goes on dripping is cut off this much later."""

FIRST_REQUEST_S = 2.0
"""A drain waits this long for the first request on a connection that was accepted just before."""

SWEEP_S = 0.5


class RestServer(uvicorn.Server):
    """Serves the REST application on one bound socket.

    Args:
        app: The application.
        listener: A bound socket.
        settings: Time limits.
        context: For TLS; None for plain HTTP.
    """

    def __init__(
        self, app: RestApp, listener: socket.socket, settings: Settings, context: ssl.SSLContext | None = None
    ) -> None:
        self.incomplete: dict[_Protocol, float] = {}
        self._listener = listener
        self._adopting: list[asyncio.Task[None]] = []
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
            ssl_context_factory=(lambda *_: context) if context is not None else None,
        )
        super().__init__(config)
        config.digits_max_connections = settings.max_connections  # type: ignore[attr-defined]
        config.digits_rest = app  # type: ignore[attr-defined]
        config.digits_lines = _DefaultLines()  # type: ignore[attr-defined]
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, but with TLS a connection has as long for its handshake as others have for their headers."""
        if self.config.ssl is None:
            await super().startup(sockets)
            return
        await super().startup([])
        for listener in sockets or ():
            server = await asyncio.get_running_loop().create_server(
                self._new_protocol,
                sock=listener,
                ssl=self.config.ssl,
                ssl_handshake_timeout=self._settings.header_timeout_s,
                backlog=self.config.backlog,
            )
            self.servers.append(server)

    def _new_protocol(self) -> asyncio.Protocol:
        return _Protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def stop_accepting(self) -> None:
        """Leave new connections to others that listen, if there are any; go on with those there are."""
        waiting = accept_waiting(self._listener)
        for server in self.servers:
            server.close()
        self._adopting = [asyncio.create_task(self._adopt(connection)) for connection in waiting]

    async def _adopt(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has left, or cannot agree on TLS
            await asyncio.get_running_loop().connect_accepted_socket(
                self._new_protocol,
                connection,
                ssl=self.config.ssl,
                ssl_handshake_timeout=self._settings.header_timeout_s if self.config.ssl is not None else None,
            )

    async def until_left(self, limit_s: float) -> None:
        """Wait until no connection is open, at most ``limit_s``."""
        until = time.monotonic() + limit_s
        while self._is_in_use() and time.monotonic() < until:  # noqa: ASYNC110 - uvicorn keeps a set, and tells nobody
            await asyncio.sleep(0.01)

    def _is_in_use(self) -> bool:
        return bool(self.server_state.connections) or not all(task.done() for task in self._adopting)

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


class _DefaultLines:
    """uvicorn's default headers (the date) as they are written. It makes a new list each second."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] | None = None
        self.lines = b""


class _Protocol(HttpToolsProtocol):
    """One connection. From its start to its headers' end, and on to its body's end, it is on the server's list.

    A request that ``lean`` may answer is held back from ASGI until it has come whole.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lean: lean.LeanRequest | None = None
        self._rest: RestApp = self.config.digits_rest  # type: ignore[attr-defined]
        self._lines: _DefaultLines = self.config.digits_lines  # type: ignore[attr-defined]
        self._incomplete: dict[_Protocol, float] = self.config.digits_incomplete  # type: ignore[attr-defined]
        self._header_s, self._body_s = self.config.digits_limits_s  # type: ignore[attr-defined]
        self._max_connections: int = self.config.digits_max_connections  # type: ignore[attr-defined]
        self._held: list[bytes] | None = None
        self._begun = self._head_coming = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = self._cork = Corked(transport)  # type: ignore[assignment]
        if len(self.connections) > self._max_connections:
            self._rest.gateway.metrics.shed("connections_full")
            transport.abort()
            return
        self._incomplete[self] = time.monotonic() + self._header_s

    def connection_lost(self, exc: Exception | None) -> None:
        self._incomplete.pop(self, None)
        cycle: Any = self.cycle
        if self.lean is not None and not self.lean.response_complete:
            self.lean.left()
        if isinstance(cycle, lean.LeanRequest):
            self.cycle = cycle = None  # type: ignore[assignment]
        super().connection_lost(exc)
        if cycle is not None and not cycle.response_complete:
            leave = cycle.scope.get(ON_DISCONNECT)
            if leave is not None:
                leave()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._held is not None:
            self._to_asgi()  # which knows what to do about the rest of the body

    def on_message_begin(self) -> None:
        self._begun = self._head_coming = True
        self._incomplete[self] = time.monotonic() + self._header_s
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        self._head_coming = False
        if self.url == lean.PATH and self._may_be_lean():
            self._held = []
        else:
            self._to_asgi()

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
            return
        self._held.append(body)
        if sum(map(len, self._held)) > lean.MAX_BODY_BYTES:
            self._to_asgi()

    def on_message_complete(self) -> None:
        parts = self._held
        if parts is not None:
            self._incomplete.pop(self, None)
            if lean.start(self._rest, self, self.headers, parts[0] if len(parts) == 1 else b"".join(parts)):
                self._held = None
                return
            self._to_asgi()
        if self.cycle.response_complete:
            # Refused before its body had come. uvicorn starts no keep-alive time then, so this does.
            self._incomplete[self] = time.monotonic() + self.timeout_keep_alive
        else:
            self._incomplete.pop(self, None)
        super().on_message_complete()

    def lean_complete(self, stays: bool) -> None:
        """A lean request has been answered. The sweep ends idle connections for less than uvicorn's timers cost."""
        self.server_state.total_requests += 1
        if not stays:
            self.transport.close()
        elif self.pipeline:
            self.on_response_complete()
        elif not self.transport.is_closing():
            self._incomplete[self] = time.monotonic() + self.timeout_keep_alive

    def default_lines(self) -> bytes:
        """The lines that go with every answer."""
        if self._lines.headers is not self.server_state.default_headers:
            self._lines.headers = self.server_state.default_headers
            self._lines.lines = b"".join([b"%b: %b\r\n" % header for header in self._lines.headers])
        return self._lines.lines

    def shutdown(self) -> None:
        """Close the connection if it is idle, else after its answer.

        uvicorn takes one whose first request is still on its way for idle, and would cut it.
        """
        if not self._begun:
            self._incomplete[self] = min(self._incomplete.get(self, math.inf), time.monotonic() + FIRST_REQUEST_S)
        elif not self._head_coming:
            super().shutdown()

    def cut_off(self) -> None:
        """Close the connection: its request has taken too long."""
        self._incomplete.pop(self, None)
        self.transport.close()

    def _may_be_lean(self) -> bool:
        parser = self.parser
        return (
            self._rest.lean
            and (self.cycle is None or self.cycle.response_complete)
            and not self.expect_100_continue
            and not self.flow.write_paused
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
        )

    def _to_asgi(self) -> None:
        """Give the request whose headers have come to ASGI, with what there is of its body."""
        parts, self._held = self._held, None
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        scope = cast(dict[str, Any], self.scope)
        scope["headers"] = headers
        scope[CORK] = self._cork
        self._incomplete[self] = time.monotonic() + self._body_s
        super().on_headers_complete()
        for part in parts or ():
            super().on_body(part)
