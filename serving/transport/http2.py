"""HTTP/2 (RFC 9113) as far as a gRPC server needs it: frames, header blocks, flow control, limits, keepalive, drain.

It is in Python because the loop is: a call costs a few dictionary look-ups here, and neither a thread's hand-over nor a
task. Clients send the same header block again and again once their compression table holds it, so a block is decoded
once (by ``hpack``) and known from then on. What a connection may ask of us is bounded everywhere: streams, frames,
header bytes, bytes held, control frames, time.
"""

import asyncio
import struct
import time
from collections import deque
from typing import Any, Final, Protocol, cast

from hpack import Decoder
from hpack.table import HeaderTable

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0x0, 0x1, 0x2, 0x3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 0x5, 0x6, 0x7, 0x8, 0x9
ENHANCE_YOUR_CALM: Final = 0xB

MAX_FRAME: Final = 16_384
"""Payload bytes of a frame, both ways: the protocol's own default."""

TURN_BYTES: Final = 32 * 1024
"""About so much of a connection's bytes is taken in one turn of the loop. A call with a picture's bytes has 900."""

MAX_STREAMS: Final = 1024
"""Calls under way on one connection."""

MAX_HEADER_BYTES: Final = 64 * 1024
"""A header block of more, packed or unpacked, ends the connection."""

STREAM_WINDOW: Final = 1024 * 1024
CONNECTION_WINDOW: Final = 16 * 1024 * 1024
"""Bytes that a client may send before it hears that they were taken."""

MAX_WINDOW: Final = 2**31 - 1

SETTING: Final = struct.Struct(">HI")
"""Name and value, as SETTINGS frames hold them."""

MAX_STRIKES: Final = 2000
"""Resets, pings, settings and empty frames that a connection may send in a second."""

KEEPALIVE_S: Final = 60.0
"""A connection that is silent for so long is asked whether anyone is there, and closed ``KEEPALIVE_GRACE_S`` later."""

KEEPALIVE_GRACE_S: Final = 20.0

LAST_WORDS_S: Final = 5.0
"""What was written to a connection that is being closed has to be taken within this time."""

_MAX_KNOWN: Final = 256
_HEAD: Final = struct.Struct(">BHBBI")
_DRAIN_PING: Final = b"draining"
_KEEPALIVE_PING: Final = b"there?\0\0"


class Broken(Exception):
    """The peer broke the protocol or a limit: the connection ends with this error code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Service(Protocol):
    """What is spoken on top."""

    def is_full(self) -> bool:
        """Whether the newest connection is one too many. It is closed then."""

    def accept(self, headers: list[tuple[bytes, bytes]]) -> Any:
        """Headers of a request → whatever ``open`` needs to know of them. May be used for many requests alike."""

    def refuse(self, accepted: Any) -> bytes | None:
        """A header block that answers a request at once, which then never begins; None to let it begin.

        An empty one resets it with ENHANCE_YOUR_CALM: the cheapest way to say RESOURCE_EXHAUSTED in gRPC.
        """

    def open(self, connection: "Connection", sid: int, accepted: Any) -> "Stream":
        """A request begins."""


class Stream:
    """One request and its answer."""

    __slots__ = ("connection", "half_closed", "is_over", "parked", "ready", "sid", "window_in", "window_out")

    def __init__(self, connection: "Connection", sid: int) -> None:
        self.connection = connection
        self.sid = sid
        self.window_in = STREAM_WINDOW
        self.window_out = connection.initial_window_out
        self.half_closed = False
        """The peer has sent all it will."""
        self.is_over = False
        """All that will be sent to the peer has been, or waits for its window."""
        self.parked: deque[tuple[bytes | memoryview, bytes]] | None = None
        """Payloads, each with the frames that follow it, for which the peer's window has no room yet."""
        self.ready: asyncio.Future[None] | None = None

    def begin(self) -> None:
        """Its headers are there."""
        raise NotImplementedError

    def data(self, chunk: bytes, end: bool) -> None:
        """A piece of the request's body; the last one if ``end``."""
        raise NotImplementedError

    def ended(self) -> None:
        """The connection or the peer has dropped the request."""
        raise NotImplementedError


class _Table(HeaderTable):
    """Tells whether a block changed it: then what is known of other blocks no longer holds."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)

    @property
    def maxsize(self) -> int:
        return self._maxsize

    @maxsize.setter
    def maxsize(self, newmax: int) -> None:
        self.changes += 1
        HeaderTable.maxsize.fset(self, newmax)  # type: ignore[attr-defined]


class Connection(asyncio.Protocol):
    """One client. (``grpc_client.py`` turns it round: one server.)

    Args:
        service: What answers its requests.
        connections: The set of open connections, which this one enters and leaves.
        handshake_s: Time for its preface, and for any header block it has begun.
    """

    keepalive_s = KEEPALIVE_S
    keepalive_grace_s = KEEPALIVE_GRACE_S

    def __init__(self, service: Service, connections: "set[Connection]", handshake_s: float) -> None:
        self.streams: dict[int, Stream] = {}
        self.initial_window_out = 65_535
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.peer: Any = None
        self.tls: Any = None
        self.held_bytes = 0
        self.loop = asyncio.get_running_loop()
        self._service = service
        self._connections = connections
        self._handshake_s = handshake_s
        self._until = time.monotonic() + handshake_s
        """When the preface, or a header block in pieces, has to be there."""
        self._heard = time.monotonic()
        self._rest = b""
        self._greeted = False
        self._settled = False
        self._known: dict[bytes, Any] = {}
        self._decoder = Decoder(MAX_HEADER_BYTES)
        self._table = self._decoder.header_table = _Table()
        self._block: bytearray | None = None
        self._block_sid = self._block_end = 0
        self._last_sid = 0
        self._window_in = CONNECTION_WINDOW
        self._window_out = 65_535
        self._max_frame_out = MAX_FRAME
        self._parked: dict[Stream, None] = {}
        self._out: list[bytes] = []
        self._paused = self._waits_its_turn = False
        self._strikes = 0
        self._refusing = self._closing = self._active = self._asked = False

    # --- the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self.transport = cast(asyncio.Transport, transport)
        self.peer = transport.get_extra_info("peername")
        self.tls = transport.get_extra_info("ssl_object")
        self._connections.add(self)
        if self._service.is_full():
            self.abort()
            return
        settings = ((0x3, MAX_STREAMS), (0x4, STREAM_WINDOW), (0x6, 16 * 1024))
        payload = b"".join([SETTING.pack(*setting) for setting in settings])
        update = struct.pack(">I", CONNECTION_WINDOW - 65_535)
        self.write(frame(SETTINGS, 0, 0, payload) + frame(WINDOW_UPDATE, 0, 0, update))

    def connection_lost(self, _: Exception | None) -> None:
        """Nobody is there to answer."""
        self._connections.discard(self)
        self._closing = True
        self._parked.clear()
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            self._drop(stream)

    def pause_writing(self) -> None:
        """The peer does not read: it is not read from either, so that nothing piles up."""
        self._paused = True
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._paused = False
        if not self._waits_its_turn and not self.transport.is_closing():
            self.transport.resume_reading()
        for stream in list(self.streams.values()):
            if stream.parked is None:
                _wake(stream)

    def data_received(self, data: bytes) -> None:
        """Frames, or pieces of them."""
        if self._rest:
            data = self._rest + data
        self._active = True
        if self._waits_its_turn:
            self._rest = data
        else:
            self._read(data)

    def _read(self, data: bytes) -> None:
        try:
            start = 0 if self._greeted else self._greet(data)
            start = self._frames(data, start, TURN_BYTES) if self._greeted else 0
            self._rest = b"" if self._closing else data[start:]
            if start >= TURN_BYTES and not self._closing:
                self._wait_a_turn()
        except Broken as err:
            self._break(err)
        except Exception:  # the edge: a defect here must not leave a connection half alive
            self._break(Broken(INTERNAL_ERROR, "internal error"))
            raise

    def _wait_a_turn(self) -> None:
        """A lot has come: others have their turn, the model server's answers first of all, before it is read on."""
        self._waits_its_turn = True
        self.transport.pause_reading()
        self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._waits_its_turn = False
        if self._closing:
            return
        self._read(self._rest)
        if not self._waits_its_turn and not self._paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def _greet(self, data: bytes) -> int:
        if not PREFACE.startswith(data[: len(PREFACE)]):
            raise Broken(PROTOCOL_ERROR, "expected HTTP/2's preface")
        self._greeted = len(data) >= len(PREFACE)
        return len(PREFACE)

    def _frames(self, data: bytes, start: int, enough: int) -> int:
        """Take whole frames up to about there; where it stopped."""
        size = len(data)
        streams = self.streams
        while size - start >= 9 and start < enough and not self._closing:
            high, low, kind, flags, sid = _HEAD.unpack_from(data, start)
            length = high << 16 | low
            if length > MAX_FRAME:
                raise Broken(FRAME_SIZE_ERROR, f"a frame of {length:,} bytes; at most {MAX_FRAME:,}")
            end = start + 9 + length
            if end > size:
                break
            payload = data[start + 9 : end]
            start = end
            sid &= MAX_WINDOW
            if self._block is not None and (kind != CONTINUATION or sid != self._block_sid):
                raise Broken(PROTOCOL_ERROR, "a header block was not finished")
            if kind == DATA:
                stream = streams.get(sid)
                self._window_in -= length
                if self._window_in < CONNECTION_WINDOW // 2:
                    self._take()
                if stream is None:
                    self._stray(sid)
                    continue
                if flags & PADDED:
                    payload = _unpadded(payload)
                self._data(stream, payload, length, flags & END_STREAM)
            elif kind == HEADERS:
                self._headers(flags, sid, payload)
            else:
                self._control(kind, flags, sid, payload)
        return start

    # --- what comes ---

    def _data(self, stream: Stream, chunk: bytes, length: int, end: int) -> None:
        if stream.half_closed:
            raise Broken(STREAM_CLOSED, "data after the end of a stream")
        if end:
            stream.half_closed = True
        else:
            if not chunk:
                self._strike()
            stream.window_in -= length
            if stream.window_in < 0:
                raise Broken(FLOW_CONTROL_ERROR, "more data than the stream's window")
        stream.data(chunk, bool(end))

    def grant(self, stream: Stream) -> None:
        """Let the peer send more of a stream, if it has used up half of its window."""
        if stream.window_in < STREAM_WINDOW // 2 and not stream.half_closed:
            self.write(frame(WINDOW_UPDATE, 0, stream.sid, struct.pack(">I", STREAM_WINDOW - stream.window_in)))
            stream.window_in = STREAM_WINDOW

    def _take(self) -> None:
        if self._window_in < 0:
            raise Broken(FLOW_CONTROL_ERROR, "more data than the connection's window")
        self.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", CONNECTION_WINDOW - self._window_in)))
        self._window_in = CONNECTION_WINDOW

    def _headers(self, flags: int, sid: int, payload: bytes) -> None:
        if flags & PADDED:
            payload = _unpadded(payload)
        if flags & HAS_PRIORITY:
            if len(payload) < 5:
                raise Broken(FRAME_SIZE_ERROR, "headers shorter than their priority")
            payload = payload[5:]
        if flags & END_HEADERS:
            self._request(sid, flags & END_STREAM, payload)
        else:
            self._block, self._block_sid, self._block_end = bytearray(payload), sid, flags & END_STREAM
            self._until = time.monotonic() + self._handshake_s

    def _continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Broken(PROTOCOL_ERROR, "a continuation of nothing")
        if not payload:
            self._strike()
        self._block += payload
        if len(self._block) > MAX_HEADER_BYTES:
            raise Broken(ENHANCE_YOUR_CALM, "too many header bytes")
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._request(self._block_sid, self._block_end, block)

    def _request(self, sid: int, end: int, block: bytes) -> None:
        accepted = self._known.get(block)
        if accepted is None:
            accepted = self._accept(block)
        if sid <= self._last_sid or not sid & 1:
            stream = self.streams.get(sid)
            if stream is None or stream.half_closed or not end:
                raise Broken(PROTOCOL_ERROR, "a stream's number was used before, or is even")
            self._data(stream, b"", 0, end)  # trailers, which gRPC's clients do not send, say no more than "end"
            return
        self._last_sid = sid
        if len(self.streams) >= MAX_STREAMS or self._refusing:
            self._strike()
            self.reset(sid, REFUSED_STREAM)
            return
        refusal = self._service.refuse(accepted)
        if refusal is not None:  # what else comes of it is late for a stream that is over
            if refusal:
                self.write(header_frame(sid, refusal, end=True))
            else:
                self.reset(sid, ENHANCE_YOUR_CALM)
            return
        stream = self.streams[sid] = self._service.open(self, sid, accepted)
        stream.half_closed = bool(end)
        stream.begin()
        if end and not stream.is_over:
            stream.data(b"", True)

    def forget(self) -> None:
        """Have the service read again what header blocks ask for."""
        self._known.clear()

    def _accept(self, block: bytes) -> Any:
        before = self._table.changes
        try:
            headers = self._decoder.decode(block, raw=True)
        except Exception as err:
            raise Broken(COMPRESSION_ERROR, "a header block that cannot be unpacked, or of too many bytes") from err
        accepted = self._service.accept(list(headers))
        if self._table.changes != before or len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        if self._table.changes == before:
            self._known[block] = accepted
        return accepted

    def _control(self, kind: int, flags: int, sid: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self._window_update(sid, payload)
        elif kind == SETTINGS:
            self._settings(flags, sid, payload)
        elif kind == PING:
            if sid or len(payload) != 8:
                raise Broken(FRAME_SIZE_ERROR if not sid else PROTOCOL_ERROR, "a ping has 8 bytes and no stream")
            self._ping(flags, payload)
        elif kind == RST_STREAM:
            if len(payload) != 4:
                raise Broken(FRAME_SIZE_ERROR, "a reset has 4 bytes")
            self._strike()
            stream = self.streams.pop(sid, None)
            if stream is not None:
                self._drop(stream)
            else:
                self._stray(sid)
        elif kind == CONTINUATION:
            self._continuation(flags, payload)
        elif kind == PUSH_PROMISE:
            raise Broken(PROTOCOL_ERROR, "clients cannot push")
        elif kind == GOAWAY:
            self.leave()
        else:  # PRIORITY, and what is not known, say nothing to us
            self._strike()

    def _window_update(self, sid: int, payload: bytes) -> None:
        more = int.from_bytes(payload) & MAX_WINDOW
        if len(payload) != 4:
            raise Broken(FRAME_SIZE_ERROR, "a window update has 4 bytes")
        helped: list[Stream] = []
        if not sid:
            # Only what this update can help: a peer may park a thousand answers and send updates all day.
            helped = list(self._parked) if self._window_out <= 0 else []
            self._window_out += more
            if not more or self._window_out > MAX_WINDOW:
                raise Broken(PROTOCOL_ERROR if not more else FLOW_CONTROL_ERROR, "a window update out of range")
        elif (stream := self.streams.get(sid)) is None:
            self._stray(sid)
            return
        else:
            helped = [stream]
            stream.window_out += more
            if not more or stream.window_out > MAX_WINDOW:
                raise Broken(PROTOCOL_ERROR if not more else FLOW_CONTROL_ERROR, "a window update out of range")
        self._pump(helped)

    def _settings(self, flags: int, sid: int, payload: bytes) -> None:
        if sid:
            raise Broken(PROTOCOL_ERROR, "settings belong to no stream")
        if flags & ACK:
            if payload:
                raise Broken(FRAME_SIZE_ERROR, "an acknowledgement is empty")
            return
        if len(payload) % 6:
            raise Broken(FRAME_SIZE_ERROR, "a setting has 6 bytes")
        self._strike()
        for name, value in SETTING.iter_unpack(payload):
            if name == 0x4:
                if value > MAX_WINDOW:
                    raise Broken(FLOW_CONTROL_ERROR, "a window out of range")
                more, self.initial_window_out = value - self.initial_window_out, value
                for stream in self.streams.values():
                    stream.window_out += more
            elif name == 0x5 and not MAX_FRAME <= value < 2**24:
                raise Broken(PROTOCOL_ERROR, "a frame size out of range")
        self._settled = True
        self.write(frame(SETTINGS, ACK, 0, b""))
        if self._parked:
            self._pump(list(self._parked))

    def _ping(self, flags: int, payload: bytes) -> None:
        if not flags & ACK:
            self._strike()
            self.write(frame(PING, ACK, 0, payload))
        elif payload == _DRAIN_PING and not self._refusing:
            # What the peer sent before it heard of the drain has come by now.
            self.write(_goaway(self._last_sid, NO_ERROR))
            self.leave()

    def _strike(self) -> None:
        self._strikes += 1
        if self._strikes > MAX_STRIKES:
            raise Broken(ENHANCE_YOUR_CALM, "too many frames that bring nothing")

    def _stray(self, sid: int) -> None:
        """A frame for a stream that is over is late; for one that never was, an error."""
        if sid > self._last_sid or not sid:
            raise Broken(PROTOCOL_ERROR, "a frame for a stream that was not opened")

    # --- what goes ---

    def write(self, data: bytes) -> None:
        """Write at the end of this turn of the loop, together with what else there is."""
        if not self._out:
            self.loop.call_soon(self.flush)
        self._out.append(data)

    def send(self, stream: Stream, before: bytes, payload: bytes, after: bytes) -> None:
        """``before`` (frames), then ``payload`` as data within the peer's windows, then ``after`` (frames)."""
        length = len(payload)
        if stream.parked is None and length <= MAX_FRAME and length <= stream.window_out and length <= self._window_out:
            stream.window_out -= length
            self._window_out -= length
            self.write(before + _HEAD.pack(0, length, DATA, 0, stream.sid) + payload + after)
            return
        if before:
            self.write(before)
        if stream.parked is None:
            stream.parked = deque()
        stream.parked.append((memoryview(payload), after))
        self._parked[stream] = None
        self._pump([stream])

    async def drained(self, stream: Stream) -> None:
        """Wait until the peer takes more of this stream."""
        while (stream.parked is not None or self._paused) and self.streams.get(stream.sid) is stream:
            stream.ready = self.loop.create_future()
            await stream.ready

    def finished(self, stream: Stream) -> None:
        """The answer is complete, or waits only for the peer's window."""
        stream.is_over = True
        if stream.parked is not None:
            return
        if self.streams.pop(stream.sid, None) is not None and not stream.half_closed:
            self.reset(stream.sid, NO_ERROR)  # the rest of the request is of no interest
        if self._refusing:
            self._close_if_done()

    def reset(self, sid: int, code: int) -> None:
        """End a stream without an answer."""
        self.write(frame(RST_STREAM, 0, sid, struct.pack(">I", code)))

    def _pump(self, streams: "list[Stream]") -> None:
        for stream in streams:
            parked = stream.parked
            while parked:
                payload, after = parked[0]
                room = min(self._window_out, stream.window_out, MAX_FRAME)
                if len(payload) > room:
                    if room <= 0:
                        break
                    payload, parked[0] = payload[:room], (payload[room:], after)
                    after = b""
                else:
                    parked.popleft()
                stream.window_out -= len(payload)
                self._window_out -= len(payload)
                self.write(_HEAD.pack(0, len(payload), DATA, 0, stream.sid) + payload + after)
            if parked is not None and not parked:
                stream.parked = None
                self._parked.pop(stream, None)
                _wake(stream)
                if stream.is_over:
                    self.finished(stream)

    def flush(self) -> None:
        """Write at once what there is: for who goes on to something long."""
        out, self._out = self._out, []
        if out and not self.transport.is_closing():
            self.transport.write(b"".join(out))

    def _drop(self, stream: Stream) -> None:
        self._parked.pop(stream, None)
        stream.parked = None
        _wake(stream)
        stream.ended()
        if self._refusing:
            self._close_if_done()

    # --- endings ---

    def _break(self, err: Broken) -> None:
        if self._closing:
            return
        reason = str(err).encode()[:200]
        self.write(_goaway(self._last_sid, err.code, reason))
        self._close()

    def _close(self) -> None:
        if not self._closing:
            self._closing = True
            self._until = time.monotonic() + LAST_WORDS_S
            self.flush()
            self.transport.close()

    def _close_if_done(self) -> None:
        if not self.streams:
            self._close()

    def drain(self) -> None:
        """Tell the peer to open no more streams here; close when those that are open have ended."""
        if not self._refusing:
            self.write(_goaway(MAX_WINDOW, NO_ERROR) + frame(PING, 0, 0, _DRAIN_PING))

    def leave(self) -> None:
        """Begin nothing more here; close when what is under way has ended."""
        self._refusing = True
        self._close_if_done()

    def abort(self) -> None:
        """Close now."""
        self._closing = True
        self.transport.abort()

    def sweep(self, now: float) -> None:
        """Once a second: time limits, keepalive, and a new allowance of frames that bring nothing."""
        self._strikes = 0
        if self._closing:
            if now > self._until:
                self.transport.abort()
        elif (not self._settled or self._block is not None) and now > self._until:
            self._break(Broken(PROTOCOL_ERROR, "too slow"))
        elif self._active:
            self._active = self._asked = False
            self._heard = now
        elif now - self._heard > self.keepalive_s + self.keepalive_grace_s:
            self.abort()
        elif now - self._heard > self.keepalive_s and not self._asked:
            self._asked = True
            self.write(frame(PING, 0, 0, _KEEPALIVE_PING))


def frame(kind: int, flags: int, sid: int, payload: bytes) -> bytes:
    """One frame of at most ``MAX_FRAME`` bytes of payload."""
    return _HEAD.pack(0, len(payload), kind, flags, sid) + payload


def header_frame(sid: int, block: bytes, *, end: bool) -> bytes:
    """A header block in as many frames as it takes."""
    if len(block) <= MAX_FRAME:
        return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), sid, block)
    pieces = [block[start : start + MAX_FRAME] for start in range(0, len(block), MAX_FRAME)]
    kinds = [HEADERS] + [CONTINUATION] * (len(pieces) - 1)
    flags = [END_STREAM if end else 0] + [0] * (len(pieces) - 2) + [END_HEADERS]
    return b"".join([frame(*one[:2], sid, one[2]) for one in zip(kinds, flags, pieces, strict=True)])


def header(name: bytes, value: bytes) -> bytes:
    """One header, packed so that neither side has to remember it (RFC 7541, 6.2.2)."""
    return b"\0" + packed_string(name) + packed_string(value)


def packed_string(text: bytes) -> bytes:
    """A name or value, its length before it."""
    length = len(text)
    if length < 127:
        return bytes((length,)) + text
    prefix, length = bytearray((127,)), length - 127
    while length >= 128:
        prefix.append(length & 127 | 128)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + text


def _goaway(last_sid: int, code: int, reason: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", last_sid, code) + reason)


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise Broken(PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]


def _wake(stream: Stream) -> None:
    if stream.ready is not None and not stream.ready.done():
        stream.ready.set_result(None)
