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
from typing import Any

import grpc
import uvicorn
from starlette.types import Receive, Scope, Send

from serving.model_server.errors import UsageError

STARTING = "the server is starting: TensorFlow is being loaded"
MAX_MESSAGE_BYTES = 2**31 - 1


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

    def __init__(self, address: str, port: int, socket_path: str, threads: int, arguments: str) -> None:
        """Bind and start.

        Raises:
            UsageError: the address cannot be bound, or a channel argument is malformed.
        """
        self._router = _Router()
        self._server = grpc.server(
            ThreadPoolExecutor(threads, "grpc"),
            handlers=[self._router],
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                # Otherwise a second server shares the port in silence.
                ("grpc.so_reuseport", 0),
                *_channel_arguments(arguments),
            ],
        )
        try:
            if port:
                bind(address, port, "port").close()  # grpc reports a failure in several lines and without the reason
                self._server.add_insecure_port(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")
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


def _channel_arguments(text: str) -> list[tuple[str, int | str]]:
    arguments: list[tuple[str, int | str]] = []
    for part in filter(None, text.split(",")):
        key, separator, value = part.partition("=")
        if not separator or not key:
            raise UsageError(f"--grpc_channel_arguments: key=value was expected, {part!r} came")
        arguments.append((key, int(value) if value.lstrip("-").isdigit() else value))
    return arguments


class RestListener:
    """uvicorn on a thread of its own, with an application that may come later."""

    def __init__(self, address: str, port: int) -> None:
        """Bind and start.

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
            timeout_keep_alive=60,
        )
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


async def _starting_app(_scope: Scope, _receive: Receive, send: Send) -> None:
    headers: Sequence[tuple[bytes, bytes]] = [(b"content-type", b"application/json"), (b"retry-after", b"2")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"error":"' + STARTING.encode() + b'"}'})
    await asyncio.sleep(0)
