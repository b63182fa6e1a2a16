"""Clients that do not let up: calls over REST and gRPC, each answer checked, each failure kept with its time."""

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
import grpc
import numpy as np

from serving.protos import digits_pb2 as pb
from serving.protos import digits_pb2_grpc
from tests.serving.gateway.conftest import LoopThread, random_images

CALL_S = 10.0


@dataclass
class Outcome:
    """One call that was not answered with a digit: when it ended, how, how long it took."""

    at: float
    how: str
    took_s: float


@dataclass
class Load:
    """Calls from ``rest`` connections that stay open and ``rpc`` channels, until the block ends.

    Strict: nothing is sent again by the clients, and no gRPC retries are configured.
    """

    thread: LoopThread
    url: str
    address: str
    rest: int = 4
    rpc: int = 4
    digit: int | None = None  # what every image is, if not its first pixel modulo ten
    digit_is_version: bool = False  # or the version that answers
    good: int = 0
    last_good: float = 0.0
    goods: list[float] = field(default_factory=list)  # when they ended
    wrong: int = 0
    late: int = 0
    bad: list[Outcome] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    _stop: bool = False

    def __enter__(self) -> Self:
        self._images = random_images(256, 5)
        self._done = asyncio.run_coroutine_threadsafe(self._run(), self.thread.loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._done.result(60)

    async def _run(self) -> None:
        clients = [self._rest(at) for at in range(self.rest)] + [self._rpc(at) for at in range(self.rpc)]
        await asyncio.gather(*clients)

    async def _rest(self, start: int) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
            at = start
            while not self._stop:
                at += 1
                image = self._images[at % len(self._images)]
                began = time.monotonic()
                try:
                    async with session.post(
                        self.url + "/classify",
                        data=image.tobytes(),
                        headers={"content-type": "application/octet-stream"},
                        timeout=aiohttp.ClientTimeout(CALL_S),
                    ) as answer:
                        found = await answer.json()
                        if answer.status == 200:
                            self._ended(began, image, found)
                        else:
                            self._failed(began, f"{answer.status} {found['error']['code']}")
                except (aiohttp.ClientError, TimeoutError) as err:
                    self._failed(began, f"{type(err).__name__}: {err}")
                    await asyncio.sleep(0.01)

    async def _rpc(self, start: int) -> None:
        # Channels to the same address share a connection unless they are told not to.
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100))
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            stub = digits_pb2_grpc.DigitsStub(channel)
            at = start
            while not self._stop:
                at += 1
                image = self._images[at % len(self._images)]
                began = time.monotonic()
                try:
                    found = await stub.Classify(pb.ClassifyRequest(image=image.tobytes()), timeout=CALL_S)
                except grpc.aio.AioRpcError as err:
                    name = dict(err.trailing_metadata() or ()).get("x-error-code", err.details())
                    self._failed(began, f"{err.code().name} {name}")
                    await asyncio.sleep(0.01)
                else:
                    self._ended(began, image, {"digit": found.digit, "model_version": found.model_version})

    def _ended(self, began: float, image: np.ndarray, found: dict[str, Any]) -> None:
        self.last_good = time.monotonic()
        self.late += self.last_good - began > CALL_S
        self.good += 1
        self.versions[found["model_version"]] += 1
        self.goods.append(self.last_good)
        expected = image[0] % 10 if self.digit is None else self.digit
        if self.digit_is_version:
            expected = int(found["model_version"])
        self.wrong += found["digit"] != expected

    def _failed(self, began: float, how: str) -> None:
        now = time.monotonic()
        self.late += now - began > CALL_S + 0.5
        self.bad.append(Outcome(now, how, now - began))

    def first_good_after(self, moment: float) -> float:
        """When the first good answer after that came."""
        return self.goods[bisect_left(self.goods, moment)]

    def how_it_went(self) -> dict[str, int]:
        """The kinds of failures with their numbers."""
        return dict(Counter(one.how for one in self.bad))
