"""A gRPC client for unary calls, in the event loop: connections, deadlines, status. The counterpart of grpc_server.py.

What it is asked for it does as grpcio's channels do: a name is resolved to all its addresses and calls take turns over
those that answer; a call waits while a connection is being made and fails at once between two attempts; what a server
has certainly not begun is sent again. Why it is our own: docs/decisions/0015-own-grpc-server.md.
"""

import asyncio
import itertools
import math
import random
import socket
import ssl
import struct
import time
from collections import deque
from ipaddress import ip_address
from typing import Any, Final, NamedTuple, cast
from urllib.parse import unquote

import grpc

from serving.gateway.settings import split_target
from serving.transport.http2 import (
    CANCEL,
    CONNECTION_WINDOW,
    DATA,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FRAME_SIZE_ERROR,
    GOAWAY,
    MAX_WINDOW,
    PREFACE,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    RST_STREAM,
    SETTING,
    SETTINGS,
    STREAM_WINDOW,
    WINDOW_UPDATE,
    Broken,
    Connection,
    Stream,
    frame,
    header,
    header_frame,
)

CONNECT_S: Final = 5.0
"""Time for a connection: its handshakes, and the server's first word."""

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 0.5
"""Between two attempts to connect: a server that comes back is found within this time."""

TICK_S: Final = 0.25
"""How often lost connections are made again, and time limits looked after."""

RESOLVE_S: Final = 30.0
"""How long the addresses of a name are believed; ``RESOLVE_AGAIN_S`` once a connection was lost."""

RESOLVE_AGAIN_S: Final = 1.0

UNSEEN_ATTEMPTS: Final = 3
"""How often a call is sent that servers say they have not begun."""

_MAX_TIMEOUT_MS: Final = 99_999_999
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_OF_HTTP: Final = {
    400: grpc.StatusCode.INTERNAL,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.UNAVAILABLE,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,
}
"""What an answer without a gRPC status means (gRPC's http-grpc-status-mapping.md); anything else is UNKNOWN."""

_OF_RESET: Final = {
    REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    CANCEL: grpc.StatusCode.CANCELLED,
    ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""What a reset of a stream means; anything else is INTERNAL."""


class CallFailed(Exception):
    """A call ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class _Unseen(CallFailed):
    """The server has not begun the call, and will not."""

    def __init__(self, details: str) -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, details)


class _Told(NamedTuple):
    """What a block of response headers or trailers says."""

    http: int
    status: int | None
    message: str


class _Answers:
    """What ``Connection`` wants to know of the protocol on top."""

    def is_full(self) -> bool:
        return False

    def accept(self, headers: list[tuple[bytes, bytes]]) -> _Told:
        values = dict(headers)
        status = values.get(b"grpc-status", b"")
        return _Told(
            int(values.get(b":status", b"200")),
            int(status) if status.isdigit() else None,
            unquote(values.get(b"grpc-message", b"").decode("latin-1")),
        )

    def refuse(self, _: Any) -> bytes | None:
        return None

    def open(self, connection: Connection, sid: int, accepted: Any) -> Stream:
        raise NotImplementedError("a client opens its streams itself")


class _Call(Stream):
    """One call under way."""

    __slots__ = ("_held", "_max_bytes", "deadline", "done", "reset_code", "unseen")

    connection: "_Connection"

    def __init__(self, connection: "_Connection", sid: int, deadline: float, max_bytes: int) -> None:
        super().__init__(connection, sid)
        self.deadline = deadline
        self.done: asyncio.Future[bytes] = connection.loop.create_future()
        self.reset_code: int | None = None
        self.unseen = False
        self._max_bytes = max_bytes
        self._held: bytes | bytearray = b""

    def head(self, told: _Told, end: bool) -> None:
        """The answer's headers, or its trailers if ``end``."""
        if end:
            self.half_closed = True
        if told.http != 200:
            self.fail(_OF_HTTP.get(told.http, grpc.StatusCode.UNKNOWN), f"the server answered HTTP status {told.http}")
        elif end and told.status:
            self.fail(_CODES.get(told.status, grpc.StatusCode.UNKNOWN), told.message)
        elif end and told.status is None:
            self.fail(grpc.StatusCode.UNKNOWN, "the server ended the call without a status")
        elif end:
            self._succeed()

    def data(self, chunk: bytes, end: bool) -> None:
        """A piece of the answer. One that comes whole is the common case."""
        if not self._held:
            self._held = chunk
        else:
            if isinstance(self._held, bytes):
                self._held = bytearray(self._held)
            self._held += chunk
        if len(self._held) > self._max_bytes + 5:
            self.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, f"an answer of more than {self._max_bytes:,} bytes")
        elif end:
            self.fail(grpc.StatusCode.UNKNOWN, "the server ended the call without a status")
        else:
            self.connection.grant(self)

    def ended(self) -> None:
        """The server has reset the stream, or the connection is gone."""
        if self.unseen or self.reset_code == REFUSED_STREAM:
            self._end(_Unseen("the server is shutting down"))
        elif self.reset_code is None:
            self._end(CallFailed(grpc.StatusCode.UNAVAILABLE, "the connection was lost"))
        elif self.reset_code == CANCEL and self.connection.loop.time() >= self.deadline:
            self._end(CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
        else:
            code = _OF_RESET.get(self.reset_code, grpc.StatusCode.INTERNAL)
            self._end(CallFailed(code, f"the server reset the stream with HTTP/2 error {self.reset_code}"))

    def expire(self) -> None:
        """Its time is over."""
        self.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def fail(self, code: grpc.StatusCode, details: str) -> None:
        self._end(CallFailed(code, details))

    def _succeed(self) -> None:
        held = self._held
        if len(held) < 5 or held[0] or int.from_bytes(held[1:5]) != len(held) - 5:
            self.fail(grpc.StatusCode.INTERNAL, "expected one message that is not compressed")
            return
        self.connection.over(self)
        if not self.done.done():
            self.done.set_result(bytes(held[5:]))

    def _end(self, err: CallFailed) -> None:
        self.connection.over(self)
        if not self.done.done():
            self.done.set_exception(err)


class _Connection(Connection):
    """One connection to one server."""

    keepalive_s = 20.0
    keepalive_grace_s = 5.0

    def __init__(self, connections: "set[Connection]") -> None:
        super().__init__(_Answers(), connections, CONNECT_S)
        self.greeted: asyncio.Future[None] = self.loop.create_future()
        """Done once the server has said its first word."""
        self._greeted = True  # no preface comes from a server
        self._max_streams = MAX_WINDOW
        self._next_sid = 1
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def usable(self) -> bool:
        """Whether calls may begin here."""
        return self._settled and not self._refusing and not self._closing and self._next_sid < MAX_WINDOW

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self.transport = cast(asyncio.Transport, transport)
        self.tls = transport.get_extra_info("ssl_object")
        self._connections.add(self)
        if self.tls is not None and self.tls.selected_alpn_protocol() != "h2":
            self.greeted.set_exception(ConnectionError("the server does not speak HTTP/2 over TLS (ALPN)"))
            self.abort()
            return
        settings = ((0x2, 0), (0x4, STREAM_WINDOW), (0x6, 16 * 1024))  # no pushes
        payload = b"".join([SETTING.pack(*setting) for setting in settings])
        update = struct.pack(">I", CONNECTION_WINDOW - 65_535)
        self.write(PREFACE + frame(SETTINGS, 0, 0, payload) + frame(WINDOW_UPDATE, 0, 0, update))

    def connection_lost(self, err: Exception | None) -> None:
        """Calls under way are lost, those that wait for room here look elsewhere."""
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionError(str(err or "the connection was closed by the server")))
            self.greeted.exception()  # it may be that nobody waits any more
        super().connection_lost(err)
        self._let_in()

    def pause_writing(self) -> None:
        """What waits is bounded by the calls under way; answers must come in all the same."""

    def resume_writing(self) -> None:
        """See ``pause_writing``."""

    async def call(self, head: bytes, request: bytes, deadline: float, max_bytes: int) -> bytes:
        """One call: packed headers and a message out, a message back. ``deadline`` in the loop's time.

        Raises:
            CallFailed: With the call's status.
        """
        while len(self.streams) >= self._max_streams:
            await self._room(deadline)
        if not self.usable:
            raise _Unseen("the connection was closed")
        sid = self._next_sid
        self._next_sid += 2
        self._last_sid = sid
        call = _Call(self, sid, deadline, max_bytes)
        self.streams[sid] = call
        message = b"\0" + len(request).to_bytes(4) + request
        self.send(call, header_frame(sid, head, end=False), message, frame(DATA, END_STREAM, sid, b""))
        timer = self.loop.call_at(deadline, call.expire)
        try:
            return await call.done
        finally:
            timer.cancel()
            self.over(call)  # if this was cancelled

    def over(self, call: _Call) -> None:
        """A call has ended. The server is told unless it said so itself and had heard everything."""
        if call.is_over:
            return
        call.is_over = True
        heard = call.half_closed and call.parked is None
        if self.streams.pop(call.sid, None) is not None and not (heard or call.unseen):
            self.reset(call.sid, CANCEL)
        call.parked = None
        self._parked.pop(call, None)
        if self._waiting:
            self._let_in()
        if self._refusing:
            self._close_if_done()

    async def _room(self, deadline: float) -> None:
        place = self.loop.create_future()
        self._waiting.append(place)
        try:
            await asyncio.wait((place,), timeout=max(0.0, deadline - self.loop.time()))
        finally:
            late = not place.done()
            place.cancel()
        if late:
            raise CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _let_in(self) -> None:
        while self._waiting and (self._closing or len(self.streams) < self._max_streams):
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                if not self._closing:
                    return

    def _request(self, sid: int, end: int, block: bytes) -> None:
        told = self._known.get(block)
        if told is None:
            told = self._accept(block)
        stream = self.streams.get(sid)
        if stream is None:
            self._stray(sid)
            return
        if stream.half_closed:
            raise Broken(PROTOCOL_ERROR, "headers after the end of a stream")
        cast(_Call, stream).head(told, bool(end))

    def _settings(self, flags: int, sid: int, payload: bytes) -> None:
        super()._settings(flags, sid, payload)
        for name, value in SETTING.iter_unpack(payload):
            if name == 0x3:
                self._max_streams = value
        self._let_in()
        if self._settled and not self.greeted.done():
            self.greeted.set_result(None)

    def _control(self, kind: int, flags: int, sid: int, payload: bytes) -> None:
        if kind == RST_STREAM and (stream := self.streams.get(sid)) is not None:
            cast(_Call, stream).reset_code = int.from_bytes(payload)
            self._parked.pop(stream, None)
        elif kind == GOAWAY:
            if len(payload) < 8 or sid:
                raise Broken(FRAME_SIZE_ERROR if not sid else PROTOCOL_ERROR, "a goaway that is none")
            self._refusing = True
            last = int.from_bytes(payload[:4]) & MAX_WINDOW
            for one in [one for one in self.streams.values() if one.sid > last]:
                cast(_Call, one).unseen = True
                one.ended()
        super()._control(kind, flags, sid, payload)

    def _close(self) -> None:
        super()._close()
        self._let_in()


class _Address:
    """One address, and the connection to it if there is one.

    Args:
        channel: Whose it is.
        where: Host and port, or the path of a Unix socket.
    """

    def __init__(self, channel: "Channel", where: tuple[str, int] | str) -> None:
        self.connection: _Connection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.fault = "not connected yet"
        self.where = where
        self._channel = channel
        self._pause_s = FIRST_PAUSE_S
        self._not_before = 0.0

    @property
    def usable(self) -> bool:
        return self.connection is not None and self.connection.usable

    def connect(self) -> None:
        """Begin to, unless that is done, under way, or failed a moment ago."""
        if self.usable:
            return
        if self.connection is not None:
            self.connection, self._channel.lost_one = None, True
        if self.connecting is None and time.monotonic() >= self._not_before:
            self.connecting = self._channel.loop.create_task(self._connect(), name="connect upstream")

    async def _connect(self) -> None:
        connection = _Connection(self._channel.connections)
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._open(connection)
                await connection.greeted
        except (OSError, ssl.SSLError) as err:  # TimeoutError is an OSError
            self.fault = f"{type(err).__name__}: {err}"
            self._not_before = time.monotonic() + self._pause_s * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
            self._pause_s = min(LONGEST_PAUSE_S, 1.6 * self._pause_s)
            self._channel.lost_one = True
            if connection.transport is not None:
                connection.abort()
        else:
            self.connection, self._pause_s = connection, FIRST_PAUSE_S
        finally:
            self.connecting = None

    async def _open(self, connection: _Connection) -> None:
        channel = self._channel
        tls = {"ssl": channel.tls, "server_hostname": channel.host} if channel.tls is not None else {}
        if isinstance(self.where, str):
            await channel.loop.create_unix_connection(lambda: connection, self.where, **cast(Any, tls))
        else:
            await channel.loop.create_connection(lambda: connection, *self.where, **cast(Any, tls))


class Channel:
    """Calls to whoever answers at a target. Create it inside a running event loop; ``close`` it at the end.

    Args:
        target: ``host:port``, ``dns:///name:port`` or ``unix:path``.
        max_bytes: Largest answer.
        tls: For TLS, with ``h2`` among its ALPN protocols; None for plain text.
    """

    def __init__(self, target: str, max_bytes: int, tls: ssl.SSLContext | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.tls = tls
        self.connections: set[Connection] = set()
        self.lost_one = False
        """An address did not answer: perhaps the name has others by now."""
        self.fault = "its name has no address"
        self.host, self._port, self._path = split_target(target)
        self._max_bytes = max_bytes
        self._addresses: list[_Address] = [_Address(self, self._path)] if self._path else []
        self._turns = itertools.count()
        self._resolved = -math.inf
        self._resolving: asyncio.Task[None] | None = None
        self._heads: dict[str, bytes] = {}
        self._closed = False
        self._ticker = self.loop.call_later(TICK_S, self._tick)
        self._swept = 0.0

    async def call(
        self, path: str, request: bytes, timeout_s: float, metadata: tuple[tuple[str, str], ...] = ()
    ) -> bytes:
        """One unary call: serialised request → serialised answer.

        Raises:
            CallFailed: With the call's status; UNAVAILABLE if there is no server.
        """
        deadline = self.loop.time() + timeout_s
        head = self._head(path) + _timeout_header(timeout_s)
        if metadata:
            head += b"".join([header(name.encode(), value.encode()) for name, value in metadata])
        for attempt in range(1, UNSEEN_ATTEMPTS + 1):
            connection = self._pick() or await self._connected(deadline)
            try:
                return await connection.call(head, request, deadline, self._max_bytes)
            except _Unseen:
                if attempt == UNSEEN_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def close(self) -> None:
        """Drop all connections; calls under way fail."""
        self._closed = True
        self._ticker.cancel()
        tasks = [task for task in (self._resolving, *(one.connecting for one in self._addresses)) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)  # in which they hear of it

    def _head(self, path: str) -> bytes:
        head = self._heads.get(path)
        if head is None:
            authority = f"{self.host}:{self._port}" if self._port else self.host
            fields = (
                (":method", "POST"), (":scheme", "https" if self.tls else "http"), (":path", path),
                (":authority", authority), ("te", "trailers"), ("content-type", "application/grpc"),
                ("user-agent", "digits-gateway"),
            )  # fmt: skip
            head = self._heads[path] = b"".join([header(name.encode(), value.encode()) for name, value in fields])
        return head

    def _pick(self) -> _Connection | None:
        """The next connection in turn."""
        addresses = self._addresses
        if len(addresses) == 1:
            connection = addresses[0].connection
            return connection if connection is not None and connection.usable else None
        usable = [one.connection for one in addresses if one.usable]
        return usable[next(self._turns) % len(usable)] if usable else None

    async def _connected(self, deadline: float) -> _Connection:
        """Wait for a connection, as long as one is being made."""
        while True:
            pending = self._attempts()
            if self._closed or not pending:
                faults = "; ".join(sorted({one.fault for one in self._addresses})) or self.fault
                raise CallFailed(grpc.StatusCode.UNAVAILABLE, f"no server answers at {self.host}: {faults}")
            await asyncio.wait(
                pending, timeout=max(0.0, deadline - self.loop.time()), return_when=asyncio.FIRST_COMPLETED
            )
            connection = self._pick()
            if connection is not None:
                return connection
            if self.loop.time() >= deadline:
                raise CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _attempts(self) -> "list[asyncio.Task[None]]":
        """Begin what may be begun; what is under way."""
        self._look_up()
        for address in self._addresses:
            address.connect()
        pending = [one.connecting for one in self._addresses if one.connecting is not None]
        if not self._addresses and self._resolving is not None:
            pending.append(self._resolving)
        return pending

    def _look_up(self) -> None:
        """Resolve the name, if that is due."""
        old = RESOLVE_AGAIN_S if self.lost_one or not self._addresses else RESOLVE_S
        if self._path or self._resolving is not None or time.monotonic() - self._resolved < old:
            return
        if _is_ip(self.host):
            if not self._addresses:
                self._addresses = [_Address(self, (self.host, self._port))]
        else:
            self._resolving = self.loop.create_task(self._resolve(), name="resolve upstream")

    async def _resolve(self) -> None:
        try:
            places = await self._look_up_name()
        except OSError as err:
            self.fault = f"its name cannot be resolved ({err})"  # what was known goes on
        else:
            self._replace(dict.fromkeys(places))
        finally:
            self._resolved = time.monotonic()
            self.lost_one = False
            self._resolving = None

    async def _look_up_name(self) -> list[tuple[str, int]]:
        found = await self.loop.getaddrinfo(self.host, self._port, type=socket.SOCK_STREAM)
        return [(str(one[4][0]), int(one[4][1])) for one in found]

    def _replace(self, places: dict[tuple[str, int], None]) -> None:
        """Keep the addresses that are still there; one that is not loses its calls only by ending."""
        known = {one.where: one for one in self._addresses}
        for where in known.keys() - places.keys():
            gone = known[where]
            if gone.connecting is not None:
                gone.connecting.cancel()
            if gone.connection is not None:
                gone.connection.leave()
        self._addresses = [known.get(where) or _Address(self, where) for where in places]

    def _tick(self) -> None:
        self._ticker = self.loop.call_later(TICK_S, self._tick)
        self._attempts()
        now = time.monotonic()
        if now - self._swept >= 1.0:
            self._swept = now
            for connection in list(self.connections):
                connection.sweep(now)


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _timeout_header(timeout_s: float) -> bytes:
    return header(b"grpc-timeout", b"%dm" % min(_MAX_TIMEOUT_MS, max(1, math.ceil(timeout_s * 1000))))
