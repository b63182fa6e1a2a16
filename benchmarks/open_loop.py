"""Load that does not wait for answers: calls leave at random times of a given rate, earlier ones back or not.

`python -m benchmarks.open_loop rest|grpc HOST:PORT PATH BODY_FILE CONTENT_TYPE RATE SECONDS` prints one JSON object. A
call's time counts from the moment at which it should have left. Sockets are polled and read by hand: this process
shares a core with the model server, and what it takes from that core it would measure as waiting.
"""

import contextlib
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONNECTIONS = 256
"""Over HTTP/1.1; each carries one call at a time."""

TICK_S = 0.0005
"""Calls that are due within this time leave together; answers are read as often, and what that takes is waiting too."""

MOST_AT_ONCE = 1 << 18
"""Bytes that are read or written in one system call."""

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
        # Lists: setting one element of a NumPy array takes three times as long.
        self.done_s = [-1.0] * count
        self.accepted, self.refused = bytearray(count), bytearray(count)
        self.back = 0
        self.cpu_share = 0.0
        """Of its core, while calls were being sent."""

    def ended(self, number: int, now_s: float, accepted: bool, refused: bool) -> None:
        """The answer to a call is there."""
        self.back += 1
        self.done_s[number] = now_s
        self.accepted[number], self.refused[number] = accepted, refused

    def summary(self) -> dict[str, float]:
        skip = int(len(self.due_s) * WARM_UP_SHARE)
        taken_ms = ((np.array(self.done_s) - self.due_s) * 1000)[skip:]
        accepted, refused = (np.frombuffer(one, bool)[skip:] for one in (self.accepted, self.refused))
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
            "generator_cpu_share": round(self.cpu_share, 3),
        }


def _percentile(values: np.ndarray, rank: float) -> float:
    return round(float(np.percentile(values, rank)), 3) if len(values) else 0.0


class Sender:
    """Calls over some connections, and their answers."""

    def __init__(self, results: Results, host: str, port: int, connections: int) -> None:
        self.results = results
        self.start = 0.0
        self.poll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        for _ in range(connections):
            connection = socket.create_connection((host, port), timeout=PATIENCE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            self.sockets[connection.fileno()] = connection
            self.poll.register(connection, select.EPOLLIN)

    def now(self) -> float:
        """Seconds since the first call could leave."""
        return time.perf_counter() - self.start

    def send(self, first: int, last: int) -> None:
        """Send the calls from ``first`` to before ``last``."""
        raise NotImplementedError

    def received(self, fd: int, data: bytes) -> None:
        """Bytes have come."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send what did not fit before."""

    def wait(self, wait_s: float) -> None:
        """Take what has come after ``wait_s``. Waking up for every answer would take half as much again of the core."""
        time.sleep(wait_s)
        for fd, _ in self.poll.poll(0):
            try:
                data = self.sockets[fd].recv(MOST_AT_ONCE)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if data:
                self.received(fd, data)
            else:
                self.lost(fd)

    def lost(self, fd: int) -> None:
        """A connection has ended; what it had under way counts as lost."""
        self.poll.unregister(fd)
        self.sockets.pop(fd).close()


class Rest(Sender):
    """Calls over many HTTP/1.1 connections."""

    def __init__(self, results: Results, host: str, port: int, request: bytes) -> None:
        super().__init__(results, host, port, CONNECTIONS)
        self.request = request
        self.idle = deque(self.sockets)
        self.waiting: deque[int] = deque()
        self.under_way: dict[int, int] = {}
        self.parts: dict[int, bytes] = {}

    def send(self, first: int, last: int) -> None:
        self.waiting.extend(range(first, last))
        while self.waiting and self.idle:
            fd = self.idle.popleft()
            number = self.under_way[fd] = self.waiting.popleft()
            self.results.sent_s[number] = self.now()
            self.sockets[fd].send(self.request)  # on an idle connection there is room for it

    def received(self, fd: int, data: bytes) -> None:
        data = self.parts.pop(fd, b"") + data
        if not _is_whole(data):
            self.parts[fd] = data
            return
        status = data[9:12]
        self.results.ended(self.under_way.pop(fd), self.now(), status == b"200", status in (b"429", b"503"))
        self.idle.append(fd)
        if self.waiting:
            self.send(0, 0)

    def lost(self, fd: int) -> None:
        super().lost(fd)
        with contextlib.suppress(ValueError):
            self.idle.remove(fd)


def _is_whole(answer: bytes) -> bool:
    """Whether an HTTP answer is there to its end."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    fields = answer[:end].lower()
    at = fields.find(b"content-length:")
    if at < 0:
        return b"transfer-encoding: chunked" not in fields or answer.endswith(b"0\r\n\r\n")
    return len(answer) >= end + 4 + int(fields[at + 15 :].partition(b"\r\n")[0])


class Grpc(Sender):
    """Calls as streams of a few HTTP/2 connections, in turns: call n is stream ``2 * (n // CONNECTIONS) + 1``."""

    CONNECTIONS = 4
    HEAD = struct.Struct(">BHBBI")

    def __init__(self, results: Results, host: str, port: int, path: str, message: bytes) -> None:
        from serving.transport.http2 import header

        super().__init__(results, host, port, self.CONNECTIONS)
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "bench")]
        fields += [("te", "trailers"), ("content-type", "application/grpc")]
        block = b"".join([header(name.encode(), value.encode()) for name, value in fields])
        body = b"\0" + len(message).to_bytes(4) + message
        self.call = struct.Struct(f">BHBBI{len(block)}sBHBBI{len(body)}s")
        self.parts = (0, len(block), 1, 4), (block, 0, len(body), 0, 1), body
        self.places = {fd: at for at, fd in enumerate(self.sockets)}
        self.unsent = {fd: bytearray() for fd in self.sockets}
        self.rest = dict.fromkeys(self.sockets, b"")
        settings = self.frame(4, 0, 0, struct.pack(">HI", 4, 2**30))
        window = self.frame(8, 0, 0, struct.pack(">I", 2**30))
        for fd in self.sockets:
            self.write(fd, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + window)

    def frame(self, kind: int, flags: int, sid: int, payload: bytes) -> bytes:
        return self.HEAD.pack(0, len(payload), kind, flags, sid) + payload

    def write(self, fd: int, data: bytes) -> None:
        unsent = self.unsent[fd]
        unsent += data
        try:
            with memoryview(unsent) as view:
                sent = self.sockets[fd].send(view[:MOST_AT_ONCE])
        except BlockingIOError:
            return
        except OSError:
            self.lost(fd)
            return
        del unsent[:sent]

    def flush(self) -> None:
        for fd in [fd for fd, data in self.unsent.items() if data]:
            self.write(fd, b"")

    def send(self, first: int, last: int) -> None:
        self.results.sent_s[first:last] = self.now()
        pack, (head, middle, body) = self.call.pack, self.parts
        for fd in list(self.sockets):
            numbers = range(first + (self.places[fd] - first) % self.CONNECTIONS, last, self.CONNECTIONS)
            sids = [2 * (number // self.CONNECTIONS) + 1 for number in numbers]
            if sids:
                self.write(fd, b"".join([pack(*head, sid, *middle, sid, body) for sid in sids]))

    def received(self, fd: int, data: bytes) -> None:
        data = self.rest[fd] + data
        place, now = self.places[fd], self.now()
        at, size, unpack = 0, len(data), self.HEAD.unpack_from
        while size - at >= 9:
            high, length, kind, flags, sid = unpack(data, at)
            end = at + 9 + (high << 16 | length)
            if end > size:
                break
            if kind == 1 and flags & 1:
                block = data[at + 9 : end]
                refused = b"grpc-status\x018" in block or b"grpc-status\x0214" in block
                self.results.ended(self._number(sid, place), now, b"grpc-status\x010" in block, refused)
            elif kind == 3:
                self.results.ended(self._number(sid, place), now, False, True)
            elif kind == 6 and not flags & 1:
                self.write(fd, self.frame(6, 1, 0, data[at + 9 : end]))
            at = end
        self.rest[fd] = data[at:]

    def _number(self, sid: int, place: int) -> int:
        return (sid >> 1) * self.CONNECTIONS + place

    def lost(self, fd: int) -> None:
        super().lost(fd)
        self.unsent.pop(fd)


def offer(sender: Sender, results: Results) -> None:
    """Send each call when it is due, and take the answers."""
    due: Sequence[float] = results.due_s.tolist()
    first, count = 0, len(due)
    sender.start = time.perf_counter()
    cpu_before = _cpu_s()
    while first < count:
        last = bisect_right(due, sender.now(), first)
        if last > first:
            sender.send(first, last)
            first = last
        sender.flush()
        sender.wait(TICK_S)
    results.cpu_share = (_cpu_s() - cpu_before) / sender.now()
    until = time.perf_counter() + PATIENCE_S
    while results.back < count and time.perf_counter() < until:
        sender.flush()
        sender.wait(0.01)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(kind: str, address: str, path: str, body_file: str, content_type: str, rate: str, seconds: str) -> None:
    """Offer the load and print what came of it."""
    # It shares a core with the model server, and has to send on time all the same to measure waiting and not itself.
    for first in (lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)), lambda: os.nice(-10)):
        with contextlib.suppress(PermissionError):
            first()
            break
    host, _, port = address.partition(":")
    body = Path(body_file).read_bytes()
    results = Results(float(rate), float(seconds))
    sender: Any
    if kind == "rest":
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        sender = Rest(results, host, int(port), head.encode() + body)
    else:
        sender = Grpc(results, host, int(port), path, body)
    offer(sender, results)
    print(json.dumps(results.summary()))


if __name__ == "__main__":
    main(*sys.argv[1:])
