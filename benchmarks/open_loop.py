"""Load that does not wait for answers: calls leave at random times of a given rate, earlier ones back or not.

`python -m benchmarks.open_loop rest|grpc HOST:PORT PATH BODY_FILE CONTENT_TYPE RATE SECONDS` prints one JSON object. A
call's time counts from the moment at which it should have left. gRPC calls share a few connections, written to and read
by hand, so that this process can offer more than what it loads can take.
"""

import asyncio
import contextlib
import json
import os
import struct
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

CONNECTIONS = 256
TICK_S = 0.001
PATIENCE_S = 5.0
"""How long answers are waited for after the last call has left."""

WARM_UP_SHARE = 0.1
"""The first calls, which are not counted."""


class Results:
    """What became of each call. ``-1`` in ``done_s``: no answer."""

    def __init__(self, rate: float, seconds: float) -> None:
        count = int(rate * seconds)
        self.due_s = np.cumsum(np.random.default_rng(1).exponential(1 / rate, count))
        self.sent_s = np.full(count, np.inf)
        self.done_s = np.full(count, -1.0)
        self.accepted = np.zeros(count, bool)
        self.refused = np.zeros(count, bool)

    def summary(self) -> dict[str, float]:
        skip = int(len(self.due_s) * WARM_UP_SHARE)
        taken_ms = ((self.done_s - self.due_s) * 1000)[skip:]
        accepted, refused = self.accepted[skip:], self.refused[skip:]
        seconds = self.due_s[-1] - self.due_s[skip]
        sent = np.searchsorted(np.sort(self.sent_s), self.due_s[[skip, -1]], "right")
        return {
            "offered_per_s": float((sent[1] - sent[0]) / seconds),  # what left in that time, not what should have
            "accepted_per_s": float(accepted.sum() / seconds),
            "refused_share": float(refused.mean()),
            "lost": int((~accepted & ~refused).sum()),
            "p50_ms": _percentile(taken_ms[accepted], 50),
            "p99_ms": _percentile(taken_ms[accepted], 99),
            "refused_p99_ms": _percentile(taken_ms[refused], 99),
        }


def _percentile(values: np.ndarray, rank: float) -> float:
    return round(float(np.percentile(values, rank)), 3) if len(values) else 0.0


class Rest(asyncio.Protocol):
    """One keep-alive connection with one call at a time."""

    def __init__(self, pool: "Pool") -> None:
        self.pool = pool
        self.number = -1
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def send(self, number: int) -> None:
        self.number = number
        self.pool.results.sent_s[number] = time.perf_counter() - self.pool.start
        self.transport.write(self.pool.request)

    def data_received(self, data: bytes) -> None:
        self.data += data
        head = self.data.find(b"\r\n\r\n")
        if head < 0:
            return
        fields = self.data[:head].lower()
        at = fields.find(b"content-length:")
        if at < 0 and b"transfer-encoding: chunked" in fields:
            if not self.data.endswith(b"0\r\n\r\n"):
                return
        elif at < 0 or len(self.data) < head + 4 + int(fields[at + 15 :].partition(b"\r\n")[0]):
            return
        status, self.data = self.data[9:12], b""
        self.pool.ended(self.number, status == b"200", status in (b"429", b"503"))
        self.pool.free(self)

    def connection_lost(self, _: Exception | None) -> None:
        self.pool.idle = deque(one for one in self.pool.idle if one is not self)


class Pool:
    """Calls over many HTTP/1.1 connections."""

    def __init__(self, results: Results, request: bytes) -> None:
        self.results = results
        self.request = request
        self.idle: deque[Rest] = deque()
        self.waiting: deque[int] = deque()
        self.start = 0.0

    async def open(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(CONNECTIONS):
            self.idle.append((await loop.create_connection(lambda: Rest(self), host, port))[1])

    def send(self, first: int, last: int) -> None:
        for number in range(first, last):
            if self.idle:
                self.idle.popleft().send(number)
            else:
                self.waiting.append(number)

    def free(self, connection: Rest) -> None:
        if self.waiting:
            connection.send(self.waiting.popleft())
        else:
            self.idle.append(connection)

    def ended(self, number: int, accepted: bool, refused: bool) -> None:
        self.results.done_s[number] = time.perf_counter() - self.start
        self.results.accepted[number], self.results.refused[number] = accepted, refused


class Streams:
    """Calls as streams of a few HTTP/2 connections, in turns."""

    CONNECTIONS = 4

    def __init__(self, results: Results, path: str, message: bytes) -> None:
        from serving.gateway.http2 import header

        fields = ((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "bench"))
        fields += (("te", "trailers"), ("content-type", "application/grpc"))
        self.block = b"".join([header(name.encode(), value.encode()) for name, value in fields])
        self.body = b"\0" + len(message).to_bytes(4) + message
        self.results = results
        self.connections: list[Grpc] = []
        self.start = 0.0

    async def open(self, host: str, port: int) -> None:
        for at in range(self.CONNECTIONS):
            connection = (await asyncio.get_running_loop().create_connection(lambda at=at: Grpc(self, at), host, port))[
                1
            ]
            self.connections.append(connection)

    def send(self, first: int, last: int) -> None:
        self.results.sent_s[first:last] = time.perf_counter() - self.start
        for at, connection in enumerate(self.connections):
            connection.send(range(first + (at - first) % self.CONNECTIONS, last, self.CONNECTIONS))


class Grpc(asyncio.Protocol):
    """One connection. Call n is its stream ``2 * (n // CONNECTIONS) + 1`` if it is number ``n % CONNECTIONS``."""

    HEAD = struct.Struct(">BHBBI")

    def __init__(self, streams: Streams, at: int) -> None:
        self.streams = streams
        self.at = at
        self.rest = b""
        self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        settings = self.frame(4, 0, 0, struct.pack(">HI", 4, 2**30))
        window = self.frame(8, 0, 0, struct.pack(">I", 2**30))
        self.transport.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + window)

    def connection_lost(self, _: Exception | None) -> None:
        self.gone = True  # what it had under way counts as lost

    def frame(self, kind: int, flags: int, sid: int, payload: bytes) -> bytes:
        return self.HEAD.pack(0, len(payload), kind, flags, sid) + payload

    def send(self, numbers: range) -> None:
        if not numbers or self.gone:
            return
        block, body, frame = self.streams.block, self.streams.body, self.frame
        sids = [2 * (number // Streams.CONNECTIONS) + 1 for number in numbers]
        self.transport.write(b"".join([frame(1, 4, sid, block) + frame(0, 1, sid, body) for sid in sids]))

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        results = self.streams.results
        at = 0
        now = time.perf_counter() - self.streams.start
        while len(data) - at >= 9:
            _, length, kind, flags, sid = self.HEAD.unpack_from(data, at)
            end = at + 9 + length
            if end > len(data):
                break
            number = (sid >> 1) * Streams.CONNECTIONS + self.at
            if kind == 1 and flags & 1:
                block = data[at + 9 : end]
                results.done_s[number] = now
                results.accepted[number] = b"grpc-status\x010" in block
                results.refused[number] = b"grpc-status\x018" in block or b"grpc-status\x0214" in block
            elif kind == 3:
                results.refused[number] = True
                results.done_s[number] = now
            elif kind == 6 and not flags & 1:
                self.transport.write(self.frame(6, 1, 0, data[at + 9 : end]))
            at = end
        self.rest = data[at:]


async def offer(sender: Any, results: Results) -> None:
    """Send each call when it is due."""
    start = sender.start = time.perf_counter()
    due, first = results.due_s, 0
    while first < len(due):
        now = time.perf_counter() - start
        last = int(np.searchsorted(due, now))
        if last > first:
            sender.send(first, last)
            first = last
        await asyncio.sleep(TICK_S)
    until = time.perf_counter() + PATIENCE_S
    while (results.done_s < 0).any() and time.perf_counter() < until:  # noqa: ASYNC110 - until the last is back
        await asyncio.sleep(0.01)


async def main(kind: str, address: str, path: str, body_file: str, content_type: str, rate: str, seconds: str) -> None:
    """Offer the load and print what came of it."""
    # It shares a core with the model server, and has to send on time all the same to measure waiting and not itself.
    with contextlib.suppress(PermissionError):
        os.nice(-10)
    host, _, port = address.partition(":")
    body = Path(body_file).read_bytes()  # noqa: ASYNC240 - nothing runs yet
    results = Results(float(rate), float(seconds))
    sender: Any
    if kind == "rest":
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        sender = Pool(results, head.encode() + body)
    else:
        sender = Streams(results, path, body)
    await sender.open(host, int(port))
    await offer(sender, results)
    print(json.dumps(results.summary()))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
