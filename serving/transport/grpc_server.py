"""gRPC over HTTP/2: calls, messages, deadlines, status (github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md).

Takes the handlers that grpcio's own servers take (``grpc.RpcMethodHandler``), so services made for those run on it, and
beside them *direct* methods, which are called in the loop without a task. Why there is a server of our own:
docs/decisions/0015-own-grpc-server.md.
"""

import asyncio
import base64
import functools
import re
import socket
import ssl
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

import grpc

from serving.transport.http2 import Connection, Stream, header, header_frame

MAX_METADATA_BYTES: Final = 16 * 1024
"""Bytes of a call's headers as HTTP/2 counts them (name, value and 32)."""

SWEEP_S: Final = 1.0

IDLE_GRACE_S: Final = 1.0
"""How long a drain waits for connections without calls to close by themselves."""

Metadata = tuple[tuple[str, str | bytes], ...]

_CONTENT_TYPE: Final = header(b"content-type", b"application/grpc")
_OPENING: Final = b"\x88" + _CONTENT_TYPE + header(b"grpc-accept-encoding", b"identity, deflate, gzip")
_STATUS: Final = {code.value[0]: header(b"grpc-status", b"%d" % code.value[0]) for code in grpc.StatusCode}
_OK: Final = _STATUS[0]
_UNITS_S: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT: Final = re.compile(r"(\d{1,8})([HMSmun])")
_ENCODINGS: Final = {b"identity": 0, b"gzip": 31, b"deflate": 15}
"""What a compressed message is packed with, by zlib's window bits."""

_RESERVED: Final = frozenset(
    {
        b"te",
        b"content-type",
        b"content-length",
        b"grpc-timeout",
        b"grpc-encoding",
        b"grpc-accept-encoding",
        b"accept-encoding",
        b"host",
    }
)

Direct = Callable[["Call", bytes], None]
"""Called in the loop with a call and its one message; ends the call with ``answer`` or ``fail``, then or later."""

Shed = Callable[["Asked"], bytes | None]
"""Asked when a call's headers are there: None, or packed headers (``only_status``) to refuse it with at once.

Empty headers are RESOURCE_EXHAUSTED without a word.
"""


class Asked:
    """What a header block asks for. One is shared by all calls that were sent with the same block."""

    __slots__ = ("direct", "handler", "metadata", "path", "shed", "timeout_s", "window_bits", "wrong")

    def __init__(self) -> None:
        self.path = ""
        self.metadata: Metadata = ()
        self.timeout_s: float | None = None
        self.window_bits = 0
        self.handler: Any = None
        self.direct: Direct | None = None
        self.shed: Shed | None = None
        self.wrong: tuple[grpc.StatusCode, str] | bytes | None = None
        """Why the call is refused: a gRPC status, or an HTTP status for what is no gRPC."""


class Call(Stream):
    """One call.

    Args:
        server: Whose it is.
        connection: Where it came from.
        sid: Its stream.
        asked: What its headers say.
    """

    __slots__ = (
        "_abandon", "_deadline", "_held", "_messages", "_opened", "_server", "_task", "_waiter", "asked", "started",
    )  # fmt: skip

    def __init__(self, server: "GrpcServer", connection: Connection, sid: int, asked: Asked) -> None:
        super().__init__(connection, sid)
        self.asked = asked
        self.started = time.monotonic()
        self._server = server
        self._held: bytearray | None = None
        self._messages: deque[bytes] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._abandon: Callable[[], None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._opened = False

    # --- what comes ---

    def data(self, chunk: bytes, end: bool) -> None:
        """A piece of the request. A message that comes whole and alone is the common case."""
        if self.is_over:
            return
        direct = self.asked.direct
        alone = end and self._held is None and chunk[:1] == b"\0"
        if direct is not None and alone and int.from_bytes(chunk[1:5]) == len(chunk) - 5:
            direct(self, chunk[5:])
        else:
            self._gather(chunk, end)

    def _gather(self, chunk: bytes, end: bool) -> None:
        if self._held is None:
            self._held = bytearray()
            self._messages = deque()
        assert self._messages is not None
        self._held += chunk
        self.connection.held_bytes += len(chunk)
        try:
            while (message := self._next_message()) is not None:
                self._messages.append(message)
        except _Refused as err:
            self._refuse(err.status, str(err))
            return
        streaming = self.asked.handler is not None and self.asked.handler.request_streaming
        if self.connection.held_bytes > self._server.max_held_bytes:
            self._refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many bytes of unfinished messages on this connection")
        elif streaming:
            self._wake_reader()
        elif len(self._messages) > 1 or (end and (self._held or not self._messages)):
            self._refuse(grpc.StatusCode.UNIMPLEMENTED, "expected exactly one message in this call")
        elif end:
            message = self._messages.popleft()
            self._release(len(message) + 5)
            if self.asked.direct is not None:
                self.asked.direct(self, message)
            else:
                self.start(message)
        else:
            self.connection.grant(self)

    def _next_message(self) -> bytes | None:
        """The next whole message among the bytes that are held."""
        held = self._held
        if held is None or len(held) < 5:
            return None
        packed, length = held[0], int.from_bytes(held[1:5])
        if length > self._server.max_message_bytes:
            raise _Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"Received message larger than max ({length} vs. {self._server.max_message_bytes})",
            )
        if packed > 1:
            raise _Refused(grpc.StatusCode.INTERNAL, "a message's first byte is neither 0 nor 1")
        if len(held) < 5 + length:
            return None
        message = bytes(held[5 : 5 + length])
        del held[: 5 + length]
        return self._unpack(message) if packed else message

    def _unpack(self, message: bytes) -> bytes:
        if not self.asked.window_bits:
            raise _Refused(grpc.StatusCode.INTERNAL, "a compressed message without grpc-encoding")
        unpacker = zlib.decompressobj(self.asked.window_bits)
        try:
            unpacked = unpacker.decompress(message, self._server.max_message_bytes + 1)
        except zlib.error as err:
            raise _Refused(grpc.StatusCode.INTERNAL, "a compressed message cannot be unpacked") from err
        if len(unpacked) > self._server.max_message_bytes:
            raise _Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"Received message larger than max (over {self._server.max_message_bytes} unpacked)",
            )
        self.connection.held_bytes += len(unpacked) - len(message)
        return unpacked

    def _release(self, count: int) -> None:
        self.connection.held_bytes -= count

    def _refuse(self, status: grpc.StatusCode, text: str) -> None:
        """Before any handler has seen the call, or while one reads."""
        if self._task is not None:
            self._task.cancel()
        self.fail(status, text)

    # --- handlers ---

    def begin(self) -> None:
        """The headers are there: a call that cannot be answered is refused, one that streams starts."""
        if self.asked.direct is not None:
            return
        wrong = self.asked.wrong
        if isinstance(wrong, bytes):
            self._last(header_frame(self.sid, wrong, end=True))
        elif wrong is not None:
            self.fail(*wrong)
        elif self.asked.handler is not None and self.asked.handler.request_streaming:
            self._held, self._messages = bytearray(), deque()
            self.start(None)

    def start(self, message: bytes | None) -> None:
        """Run the method's handler in a task; a direct method may turn to this. None: the request is a stream."""
        self._task = self._server.loop.create_task(self._run(message))
        if self.asked.timeout_s is not None:
            self._deadline = self._server.loop.call_later(self.asked.timeout_s, self._expire)

    def _expire(self) -> None:
        if not self.is_over and self._task is not None:
            self._task.cancel()
            self.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    async def _run(self, message: bytes | None) -> None:
        context = Context(self)
        try:
            result = await self._serve(context, message)
            if context.code is not grpc.StatusCode.OK:
                self.fail(context.code, context.details, context.trailers)
            elif not self.is_over:
                self._succeed(result, pack_metadata(context.trailers))
        except _Refused as err:
            self.fail(err.status, str(err), err.trailers)
        except asyncio.CancelledError:
            self.fail(grpc.StatusCode.CANCELLED, "the call was cancelled")
        except Exception as err:  # noqa: BLE001 - the edge: nothing of it reaches the client
            self._server.on_defect(err)
            self.fail(grpc.StatusCode.INTERNAL, "internal error")
        finally:
            if self._deadline is not None:
                self._deadline.cancel()

    def _succeed(self, result: bytes | None, trailers: bytes) -> None:
        if result is not None:
            self.answer(result, trailers)
            return
        opening = b"" if self._opened else _OPENING
        self._last(header_frame(self.sid, opening + _OK + trailers, end=True))

    async def _serve(self, context: "Context", message: bytes | None) -> bytes | None:
        """The handler's one answer; None if it has written several."""
        handler = self.asked.handler
        load = handler.request_deserializer or _same
        dump = handler.response_serializer or _same
        context.dump = dump
        request: Any = self._requests(load) if message is None else _loaded(load, message)
        if not handler.response_streaming:
            method = handler.stream_unary if handler.request_streaming else handler.unary_unary
            result: bytes = dump(await method(request, context))
            return result
        method = handler.stream_stream if handler.request_streaming else handler.unary_stream
        answers = method(request, context)
        if hasattr(answers, "__aiter__"):
            async for answer in answers:
                await self.write(dump(answer))
        else:
            await answers  # writes through its context
        return None

    async def _requests(self, load: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        while True:
            while self._messages:
                message = self._messages.popleft()
                self._release(len(message) + 5)
                self.connection.grant(self)
                yield _loaded(load, message)
            if self.half_closed:
                if self._held:
                    raise _Refused(grpc.StatusCode.INTERNAL, "the last message is cut off")
                return
            self.connection.grant(self)
            self._waiter = self._server.loop.create_future()
            await self._waiter

    def _wake_reader(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- what goes ---

    def on_leave(self, abandon: Callable[[], None]) -> None:
        """Have this called if the client goes before a direct call has been answered."""
        self._abandon = abandon

    def answer(self, message: bytes, trailers: bytes = b"") -> None:
        """The one answer of a call, and its good end. ``trailers``: packed headers."""
        sid = self.sid
        payload = b"\0" + len(message).to_bytes(4) + message
        before = b"" if self._opened else header_frame(sid, _OPENING, end=False)
        self.connection.send(self, before, payload, header_frame(sid, _OK + trailers, end=True))
        self._over()

    async def write(self, message: bytes) -> None:
        """One of several answers; waits while the client does not read."""
        before = b""
        if not self._opened:
            self._opened = True
            before = header_frame(self.sid, _OPENING, end=False)
        self.connection.send(self, before, b"\0" + len(message).to_bytes(4) + message, b"")
        await self.connection.drained(self)

    def fail(self, status: grpc.StatusCode, text: str, trailers: Metadata = ()) -> None:
        """End the call with a status."""
        self.fail_packed(packed_status(status, text) + pack_metadata(trailers))

    def fail_packed(self, status: bytes) -> None:
        """As ``fail``, with the end of ``packed_status`` and packed headers after it."""
        if self.is_over:
            return
        block = status if self._opened else only_status(status)
        self._last(header_frame(self.sid, block, end=True))

    def _last(self, frames: bytes) -> None:
        if self.parked is not None:
            self.parked.append((b"", frames))
        else:
            self.connection.write(frames)
        self._over()

    def _over(self) -> None:
        self._let_go()
        self.connection.finished(self)

    def _let_go(self) -> None:
        """Count what is held of the request no more."""
        if self._held is not None:
            assert self._messages is not None
            self._release(len(self._held) + sum([len(message) + 5 for message in self._messages]))
            self._held, self._messages = bytearray(), deque()

    def ended(self) -> None:
        """The client has gone."""
        self.is_over = True
        self._let_go()
        if self._task is not None:
            self._task.cancel()
        if self._abandon is not None:
            self._abandon()

    def late(self, now: float, limit_s: float) -> bool:
        """Whether the one message of a call has taken longer than this to come."""
        streams = self.asked.handler is not None and self.asked.handler.request_streaming
        return not self.half_closed and not streams and now - self.started > limit_s


class Context:
    """What a handler may ask and say of its call: as much of ``grpc.aio.ServicerContext`` as ours and grpcio's use."""

    def __init__(self, call: Call) -> None:
        self.code = grpc.StatusCode.OK
        self.details = ""
        self.trailers: Metadata = ()
        self.dump: Callable[[Any], bytes] = _same
        self._call = call

    def invocation_metadata(self) -> Metadata:
        """The caller's metadata, names in lower case; values of ``-bin`` names as bytes."""
        return self._call.asked.metadata

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        timeout_s = self._call.asked.timeout_s
        return None if timeout_s is None else self._call.started + timeout_s - time.monotonic()

    def peer(self) -> str:
        """Where the call came from, as gRPC writes it."""
        address = self._call.connection.peer
        if not isinstance(address, tuple):
            return f"unix:{address or ''}"
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"ipv{6 if ':' in address[0] else 4}:{host}:{address[1]}"

    def set_trailing_metadata(self, trailers: Metadata) -> None:
        """Sent with the status."""
        self.trailers = tuple(trailers)

    def set_code(self, code: grpc.StatusCode) -> None:
        """The status to end with."""
        self.code = code

    def set_details(self, details: str) -> None:
        """The status' text."""
        self.details = details

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """End the call with a status; raises."""
        raise _Refused(code, details, tuple(trailing_metadata) or self.trailers)

    async def write(self, answer: Any) -> None:
        """One of several answers."""
        await self._call.write(self.dump(answer))


class GrpcServer:
    """A gRPC server. Create it in the event loop it runs in.

    Args:
        max_message_bytes: Largest message, unpacked.
        handshake_s: Time for a connection's preface, and for any header block it has begun.
        message_s: Time for the one message of a call that does not stream.
        on_defect: Told of exceptions that a handler did not translate.
        max_connections: Most connections at once; further ones are closed.
        on_full: Told of each of those.
    """

    def __init__(
        self,
        max_message_bytes: int,
        handshake_s: float,
        message_s: float,
        on_defect: Callable[[Exception], None],
        max_connections: int = 8192,
        on_full: Callable[[], None] = lambda: None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.max_message_bytes = max_message_bytes
        self.max_held_bytes = 2 * max_message_bytes + 16 * 1024 * 1024
        self.on_defect = on_defect
        self._max_connections = max_connections
        self._on_full = on_full
        self.connections: set[Connection] = set()
        self._handshake_s = handshake_s
        self._message_s = message_s
        self._generic: list[grpc.GenericRpcHandler] = []
        self._direct: dict[str, tuple[Direct, frozenset[str] | None, Shed | None]] = {}
        self._found: dict[str, Any] = {}
        self._listeners: list[asyncio.Server] = []
        self._missing = grpc.StatusCode.UNIMPLEMENTED, "Method not found!"
        self._sweeper: asyncio.Task[None] | None = None

    # --- what grpcio's servers are called with, too ---

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Services, as generated code and ``grpc.method_handlers_generic_handler`` describe them."""
        self._generic += handlers
        self._forget()

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Generated code calls this besides; it says nothing new."""

    # --- ours ---

    def add_direct(
        self, path: str, direct: Direct, metadata: frozenset[str] | None = None, shed: Shed | None = None
    ) -> None:
        """Have a unary method called in the loop, without a task.

        ``metadata``: only if a call brings none but of these names; else its handler is. None: whatever it brings.
        ``shed``: may refuse such a call before its message is there.
        """
        self._direct[path] = direct, metadata, shed
        self._forget()

    def answer_missing(self, status: grpc.StatusCode, text: str) -> None:
        """What calls of methods that are not there get from now on."""
        self._missing = status, text
        self._forget()

    def _forget(self) -> None:
        """What connections know of header blocks was true before."""
        for connection in self.connections:
            connection.forget()

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections on a bound socket, or on one more. With ``tls``, which offers ``h2``, only over it."""
        is_unix = hasattr(socket, "AF_UNIX") and listener.family == socket.AF_UNIX
        create = self.loop.create_unix_server if is_unix else self.loop.create_server
        server = await create(
            lambda: Connection(self, self.connections, self._handshake_s),
            sock=listener,
            ssl=tls,
            ssl_handshake_timeout=self._handshake_s if tls is not None else None,
            backlog=2048,
        )
        self._listeners.append(server)
        if self._sweeper is None:
            self._sweeper = self.loop.create_task(self._sweep())

    async def stop(self, grace_s: float) -> None:
        """Accept no more, let calls under way finish within ``grace_s``, then cut off what is left."""
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.drain()
        now = time.monotonic()
        until, idle_until = now + grace_s, now + min(grace_s, IDLE_GRACE_S)
        while self.connections and now < until:
            if now > idle_until and not any(connection.streams for connection in self.connections):
                break  # what is left has nothing under way and does not answer
            await asyncio.sleep(0.005)
            now = time.monotonic()
        for connection in list(self.connections):
            for call in list(connection.streams.values()):
                call.fail(grpc.StatusCode.UNAVAILABLE, "this server is shutting down")  # type: ignore[attr-defined]
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper

    def is_full(self) -> bool:
        """Whether there are more connections than there may be; the newest is closed then."""
        if len(self.connections) <= self._max_connections:
            return False
        self._on_full()
        return True

    def accept(self, headers: list[tuple[bytes, bytes]]) -> Asked:
        """Read a call's headers."""
        asked = Asked()
        values = dict(headers)
        asked.wrong = self._why_not(headers, values)
        if asked.wrong is not None:
            return asked
        asked.path = values[b":path"].decode("latin-1")
        asked.metadata = _metadata(headers)
        asked.timeout_s = _timeout(values.get(b"grpc-timeout"))
        asked.window_bits = _ENCODINGS[values.get(b"grpc-encoding", b"identity")]
        asked.handler = self._find(asked.path)
        if asked.handler is None:
            asked.wrong = self._missing
        direct, names, shed = self._direct.get(asked.path, (None, None, None))
        if direct is not None and (names is None or {name for name, _ in asked.metadata} <= names):
            asked.direct, asked.shed = direct, shed
        return asked

    def refuse(self, accepted: Asked) -> bytes | None:
        """As ``http2.Service`` has it: the whole answer of a call that is not to begin."""
        return accepted.shed(accepted) if accepted.shed is not None else None

    def open(self, connection: Connection, sid: int, accepted: Asked) -> Call:
        """A call begins."""
        return Call(self, connection, sid, accepted)

    def _why_not(
        self, headers: list[tuple[bytes, bytes]], values: dict[bytes, bytes]
    ) -> tuple[grpc.StatusCode, str] | bytes | None:
        if not values.get(b"content-type", b"").startswith(b"application/grpc"):
            return header(b":status", b"415")
        if values.get(b":method") != b"POST" or not values.get(b":path", b"").startswith(b"/"):
            return header(b":status", b"405")
        if sum(len(name) + len(value) + 32 for name, value in headers) > MAX_METADATA_BYTES:
            return grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {MAX_METADATA_BYTES:,} bytes of metadata"
        timeout = values.get(b"grpc-timeout")
        if timeout is not None and _TIMEOUT.fullmatch(timeout.decode("latin-1")) is None:
            return grpc.StatusCode.INTERNAL, "grpc-timeout is not one"
        if values.get(b"grpc-encoding", b"identity") not in _ENCODINGS:
            return grpc.StatusCode.UNIMPLEMENTED, "messages may be packed with gzip or deflate"
        return None

    def _find(self, path: str) -> Any:
        if path not in self._found:
            details = _Details(path)
            found = (generic.service(details) for generic in self._generic)
            handler = next((one for one in found if one is not None), None)
            if handler is None:
                return None  # not remembered: paths are the clients' to invent
            self._found[path] = handler
        return self._found[path]

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_S, self._handshake_s / 4, self._message_s / 4))
            now = time.monotonic()
            for connection in list(self.connections):
                connection.sweep(now)
                for call in list(connection.streams.values()):
                    assert isinstance(call, Call)
                    if not call.is_over and call.late(now, self._message_s):
                        call.fail(grpc.StatusCode.DEADLINE_EXCEEDED, f"no message came within {self._message_s:g} s")


class _Details(grpc.HandlerCallDetails):
    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


class _Refused(Exception):
    def __init__(self, status: grpc.StatusCode, text: str, trailers: Metadata = ()) -> None:
        super().__init__(text)
        self.status = status
        self.trailers = trailers


_READABLE: Final = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


@functools.lru_cache(256)
def packed_status(status: grpc.StatusCode, text: str, trailers: Metadata = ()) -> bytes:
    """A call's end as headers. Under overload one end is that of thousands of calls a second."""
    message = header(b"grpc-message", quote(text, safe=_READABLE).encode()) if text else b""
    return _STATUS[status.value[0]] + message + pack_metadata(trailers)


def only_status(status: bytes) -> bytes:
    """The one header block of a call that ends with ``packed_status`` and without a message."""
    return b"\x88" + _CONTENT_TYPE + status


def pack_metadata(metadata: Metadata) -> bytes:
    """Metadata as headers; values of ``-bin`` names in base64, as gRPC has them."""
    return b"".join([header(name.encode(), _packed_value(value)) for name, value in metadata])


def _packed_value(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else base64.b64encode(value).rstrip(b"=")


def _metadata(headers: list[tuple[bytes, bytes]]) -> Metadata:
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name in _RESERVED or name[:1] == b":":
            continue
        text = name.decode("latin-1")
        if not text.endswith("-bin"):
            found.append((text, value.decode("latin-1")))
            continue
        for part in value.split(b","):
            with suppress(ValueError):
                found.append((text, base64.b64decode(part + b"=" * (-len(part) % 4))))
    return tuple(found)


def _timeout(value: bytes | None) -> float | None:
    if value is None:
        return None
    return int(value[:-1]) * _UNITS_S[chr(value[-1])]


def _loaded(load: Callable[[bytes], Any], message: bytes) -> Any:
    try:
        return load(message)
    except Exception as err:
        raise _Refused(grpc.StatusCode.INTERNAL, "the message cannot be read as this method's request") from err


def _same(message: Any) -> Any:
    return message
