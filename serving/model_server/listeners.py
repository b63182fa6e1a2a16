"""The two ports. They are bound and answer before TensorFlow is imported, which takes seconds: a port in use shows at
once, and a probe that comes early hears "starting" rather than silence.
"""

import asyncio
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, cast

import grpc
import structlog
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.model_server.errors import UsageError
from serving.transport.grpc_server import GrpcServer

STARTING = "the server is starting: TensorFlow is being loaded"
MAX_MESSAGE_BYTES = 2**31 - 1
HANDSHAKE_S: Final = 20.0
MESSAGE_S: Final = 300.0
"""Time for one message to come."""

log = structlog.get_logger()


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A listening TCP socket.

    Raises:
        UsageError: one line that names the flag, the address and the reason.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as err:
        reason = os.strerror(err.errno) if err.errno and err.errno > 0 else str(err)
        raise UsageError(f"cannot listen on {host}:{port} (--{flag}): {reason}; choose a free port or address") from err


class GrpcListener:
    """A gRPC server on a thread of its own, whose services may come later: until then all calls get UNAVAILABLE."""

    def __init__(
        self, address: str, port: int, socket_path: str, arguments: str, tls: ssl.SSLContext | None = None
    ) -> None:
        """Bind and start; ``tls`` is for the port, the UNIX socket stays plain.

        Raises:
            UsageError: the address cannot be bound, or a channel argument is malformed.
        """
        self._arguments = _channel_arguments(arguments)
        self._sockets: list[tuple[socket.socket, ssl.SSLContext | None]] = []
        if port:
            self._sockets.append((bind(address, port, "port"), tls))
        if socket_path:
            self._sockets.append((_bind_unix(socket_path), None))
        self._loop = new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True).start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    async def _start(self) -> GrpcServer:
        server = GrpcServer(
            self._arguments.get("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            handshake_s=HANDSHAKE_S,
            message_s=MESSAGE_S,
            on_defect=lambda err: log.error("defect", exc_info=err),
        )
        server.answer_missing(grpc.StatusCode.UNAVAILABLE, STARTING)
        for listener, tls in self._sockets:
            await server.start(listener, tls)
        return server

    def add(self, add: Callable[[GrpcServer], None]) -> None:
        """Have services added, in the event loop; they answer when this returns."""

        async def run() -> None:
            add(self._server)

        asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def ready(self) -> None:
        """All services are there: others are UNIMPLEMENTED from now on."""
        self.add(lambda server: server.answer_missing(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"))

    def stop(self, grace_s: float) -> "Future[None]":
        """Refuse new calls, let those under way end within ``grace_s``; what comes back is done when all have."""
        return asyncio.run_coroutine_threadsafe(self._server.stop(grace_s), self._loop)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """One of uvloop where that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _bind_unix(path: str) -> socket.socket:
    """A listening UNIX socket. One that a process left behind gives way.

    Raises:
        UsageError: in one line.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_behind(path):
            Path(path).unlink()
        listener.bind(path)
        listener.listen(2048)
    except OSError as err:
        listener.close()
        raise UsageError(f"cannot listen on {path} (--grpc_socket_path): {err.strerror or err}") from err
    return listener


def _is_left_behind(path: str) -> bool:
    """Whether there is a socket on which nobody listens."""
    if not Path(path).is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def _channel_arguments(text: str) -> dict[str, int]:
    """Those that mean something here.

    Raises:
        UsageError: one is no ``key=value``, or its value no number.
    """
    arguments = {}
    for part in filter(None, text.split(",")):
        key, separator, value = part.partition("=")
        if not separator or not key:
            raise UsageError(f"--grpc_channel_arguments: key=value was expected, {part!r} came")
        if key != "grpc.max_receive_message_length":
            log.warning("channel_argument_without_effect", argument=part)
        elif not value.lstrip("-").isdigit():
            raise UsageError(f"--grpc_channel_arguments: {key}: a number of bytes was expected, {value!r} came")
        else:
            arguments[key] = int(value) if int(value) >= 0 else MAX_MESSAGE_BYTES
    return arguments


class RestListener:
    """uvicorn on a thread of its own, with an application that may come later."""

    def __init__(
        self, address: str, port: int, *, header_timeout_s: float = 10.0, idle_timeout_s: float = 60.0
    ) -> None:
        """Bind and start.

        Args:
            address: to listen on.
            port: to listen on.
            header_timeout_s: a connection whose call's header takes longer is closed.
            idle_timeout_s: and so is one without a call for so long.

        Raises:
            UsageError: the address cannot be bound.
        """
        self._socket = bind(address, port, "rest_api_port")
        self._app: Callable[[Scope, Receive, Send], Any] = _starting_app
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        self._config = uvicorn.Config(
            self._dispatch,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            interface="asgi3",
            http=_Connection,
            ws="none",
            timeout_keep_alive=cast(int, idle_timeout_s),  # which a fraction suits as well
        )
        self._config.header_timeout_s = header_timeout_s  # type: ignore[attr-defined]
        self._server = uvicorn.Server(self._config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="rest", daemon=True)
        self._thread.start()

    def serve(self, app: Callable[[Scope, Receive, Send], Any]) -> None:
        """Answer with ``app`` from now on."""
        self._app = app

    def stop(self, grace_s: float) -> None:
        """Refuse new connections, let calls under way end within ``grace_s``."""
        self._config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True

    def wait(self, timeout_s: float) -> None:
        """Until the last call has ended."""
        self._thread.join(timeout_s)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _Connection(HttpToolsProtocol):
    """uvicorn's, which waits for ever for the first call of a connection and for the end of a call's header."""

    _timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._close_after(self.timeout_keep_alive)

    def on_message_begin(self) -> None:
        self._close_after(self.config.header_timeout_s)  # type: ignore[attr-defined]
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._forget_timeout()  # the application has a limit for the rest
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timeout()
        super().connection_lost(exc)

    def _close_after(self, seconds: float) -> None:
        self._forget_timeout()
        self._timeout = self.loop.call_later(seconds, self.transport.close)

    def _forget_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None


async def _starting_app(_scope: Scope, _receive: Receive, send: Send) -> None:
    headers: Sequence[tuple[bytes, bytes]] = [(b"content-type", b"application/json"), (b"retry-after", b"2")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"error":"' + STARTING.encode() + b'"}'})
    await asyncio.sleep(0)
