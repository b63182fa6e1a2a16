"""Encoded or raw bytes → one canonical image, without holding up the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from digits import contract
from digits.errors import Overloaded
from digits.image import from_raw, read_digit, read_small_png
from digits.number import Proposal, propose
from serving.gateway.metrics import Metrics

T = TypeVar("T")

AT_ONCE_SIZE: Final = (contract.IMAGE_WIDTH, contract.IMAGE_HEIGHT)
"""PNGs of this size are decoded in the loop, in some 30 µs: less than a thread's handshake costs. Others take 20 times
that, since their digit has to be found first."""

AT_ONCE_BYTES: Final = 8 * 1024

_PNG: Final = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_MAGIC: Final = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF87a",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
)


def looks_like_a_picture(data: bytes) -> bool:
    """Whether the first bytes are those of a picture format."""
    return data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


class Pictures:
    """Reads pictures: the smallest at once, others in a thread, and no more than a bounded number of those.

    One thread by default: a large picture takes tens of megabytes while it is decoded, and two at once twice that.

    Args:
        metrics: Where refusals and the number under way are counted.
        threads: Decoding threads.
        max_waiting: Most pictures decoded or waiting for a thread.
    """

    def __init__(self, metrics: Metrics, threads: int = 1, max_waiting: int = 64) -> None:
        self.in_flight = 0
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        metrics.watch_decodes(lambda: self.in_flight)

    def read_at_once(self, data: bytes) -> bytes | None:
        """Canonical 784 bytes of a raw image or a small PNG; None if decoding would take long.

        Raises:
            BadImage, TooLarge: As ``digits.image``.
        """
        if len(data) == contract.IMAGE_BYTES and not looks_like_a_picture(data):
            from_raw(data)
            return data
        if data.startswith(_PNG) and len(data) <= AT_ONCE_BYTES:
            if (pixels := read_small_png(data)) is not None:
                return pixels
            if (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == AT_ONCE_SIZE:
                return read_digit(data).tobytes()
        elif not looks_like_a_picture(data):
            return read_digit(data).tobytes()  # says at once what is wrong with it
        return None

    async def read(self, data: bytes) -> bytes:
        """Canonical 784 bytes of a picture, decoded in a thread.

        Raises:
            BadImage, TooLarge: As ``digits.image``.
            Overloaded: Too many pictures wait to be decoded.
        """
        return await self._in_thread(_decode, data)

    async def read_number(self, data: bytes) -> Proposal:
        """Where the digits of a number may be in a picture, looked for in a thread. Raises as ``read``."""
        return await self._in_thread(propose, data)

    async def _in_thread(self, work: Callable[[bytes], T], data: bytes) -> T:
        if self.in_flight >= self._max_waiting:
            self._metrics.shed("decodes_full")
            raise Overloaded(f"{self.in_flight} pictures are waiting to be decoded already; try again later")
        self.in_flight += 1
        working = asyncio.get_running_loop().run_in_executor(self._pool, work, data)
        # Counted until the thread is free, not until the caller has lost patience.
        working.add_done_callback(self._decoded)
        return await asyncio.shield(working)

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decoded(self, work: asyncio.Future[Any]) -> None:
        self.in_flight -= 1
        if not work.cancelled():
            work.exception()  # looked at, so that nobody's leaving is reported as an unhandled error


def _decode(data: bytes) -> bytes:
    return read_digit(data).tobytes()
