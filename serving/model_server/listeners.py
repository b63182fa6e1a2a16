"""The two ports. They are bound and answer before TensorFlow is imported, which takes seconds: a port in use shows at
once, and a probe that comes early hears "starting" rather than silence.
"""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.model_server.config import Tls
from serving.model_server.errors import UsageError

STARTING = "the server is starting: TensorFlow is being loaded"
MAX_MESSAGE_BYTES = 2**31 - 1
_DEFAULT_ARGUMENTS: dict[str, int | str] = {
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    "grpc.so_reuseport": 0,  # otherwise a second server shares the port in silence
}


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
    """A gRPC server whose services may come later. Every call gets UNAVAILABLE until they are there."""

    def __init__(
        self, address: str, port: int, socket_path: str, threads: int, arguments: str, tls: Tls | None = None
    ) -> None:
        """Bind and start; ``tls`` is for the port, the UNIX socket stays plain.

        Raises:
            UsageError: the address cannot be bound, or a channel argument is malformed.
        """
        self._router = _Router()
        self._server = grpc.server(
            ThreadPoolExecutor(threads, "grpc"),
            handlers=[self._router],
            options=list(
                {**_DEFAULT_ARGUMENTS, **_channel_arguments(arguments)}.items()
            ),  # of two, grpc takes the first
        )
        try:
            if port:
                bind(address, port, "port").close()  # grpc reports a failure in several lines and without the reason
                target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
                if tls:
                    self._server.add_secure_port(target, _credentials(tls))
                else:
                    self._server.add_insecure_port(target)
            if socket_path:
                self._server.add_insecure_port(f"unix:{socket_path}")
        except RuntimeError as err:
            raise UsageError(f"cannot listen for gRPC on {socket_path or f'{address}:{port}'}: {err}") from err
        self._server.start()

    def add(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Add services; they answer from now on."""
        self._router.handlers += list(handlers)

    def ready(self) -> None:
        """All services are there: others are UNIMPLEMENTED from now on."""
        self._router.starting = False

    def stop(self, grace_s: float) -> threading.Event:
        """Refuse new calls, let those under way end within ``grace_s``; the event is set when all have."""
        return self._server.stop(grace_s)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(tls.key, tls.certificate)],
        root_certificates=tls.authority or None,
        require_client_auth=tls.clients_need_certificates,
    )


class _Router(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self.handlers: list[grpc.GenericRpcHandler] = []
        self.starting = True

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        for handler in self.handlers:
            found = handler.service(details)
            if found is not None:
                return found
        return grpc.unary_unary_rpc_method_handler(_refuse) if self.starting else None


def _refuse(_request: bytes, context: grpc.ServicerContext) -> bytes:
    context.set_code(grpc.StatusCode.UNAVAILABLE)
    context.set_details(STARTING)
    return b""


def _channel_arguments(text: str) -> dict[str, int | str]:
    arguments: dict[str, int | str] = {}
    for part in filter(None, text.split(",")):
        key, separator, value = part.partition("=")
        if not separator or not key:
            raise UsageError(f"--grpc_channel_arguments: key=value was expected, {part!r} came")
        arguments[key] = int(value) if value.lstrip("-").isdigit() else value
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
