"""A running gateway before a model server one can check by hand, both in this process, on free ports."""

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import grpc
import httpx
import numpy as np
import pytest
import uvloop

from serving.gateway.logs import Logs
from serving.gateway.running import Running
from serving.gateway.settings import Settings
from serving.protos import digits_pb2_grpc
from tests.serving.gateway.upstream_server import Behaviour, TestUpstream

T = TypeVar("T")

HANG_S = 30  # a hang's limit, not a claim about speed


class LoopThread:
    """An event loop in a thread of its own, so that tests can be plain functions with plain clients."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, work: Coroutine[Any, Any, T], limit_s: float = HANG_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(limit_s)

    def call(self, function: Callable[[], T]) -> T:
        async def inside() -> T:
            return function()

        return self.run(inside())


class Here:
    """One gateway, its model server and clients of it."""

    def __init__(self, thread: LoopThread, upstream: TestUpstream, running: Running, log: io.StringIO) -> None:
        self.thread = thread
        self.upstream = upstream
        self.running = running
        self.gateway = running.gateway
        self.url = f"http://{running.rest_address}"
        self.rest_port = int(running.rest_address.rpartition(":")[2])
        self.grpc_address = running.grpc_address
        self.http = httpx.Client(base_url=self.url, timeout=HANG_S)
        self.channel = grpc.insecure_channel(self.grpc_address)
        self.stub = digits_pb2_grpc.DigitsStub(self.channel)
        self._log = log

    @property
    def behaviour(self) -> Behaviour:
        return self.upstream.behaviour

    def classify(
        self, body: bytes, content_type: str | None = "application/octet-stream", **more: Any
    ) -> httpx.Response:
        headers = {"content-type": content_type} if content_type else {}
        return self.http.post("/classify", content=body, headers={**headers, **more})

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value as ``/metrics`` shows it, 0 if it is not there."""
        return self.gateway.metrics.registry.get_sample_value(name, labels) or 0.0

    def log_text(self) -> str:
        self.gateway.logs.flush()
        return self._log.getvalue()

    def forget_log(self) -> None:
        self.gateway.logs.flush()
        self._log.seek(0)
        self._log.truncate()

    def log_lines(self, event: str = "request") -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def wait_ready(self) -> None:
        eventually(lambda: self.http.get("/readyz").status_code == 200)


def eventually(condition: Callable[[], object], limit_s: float = HANG_S) -> None:
    """Wait until it holds; fail only if it never does."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.01)


def random_images(count: int, seed: int = 0) -> np.ndarray:
    """uint8 (N, 784)."""
    return np.random.default_rng(seed).integers(0, 256, (count, 784), np.uint8)


@pytest.fixture(scope="session")
def thread() -> LoopThread:
    return LoopThread()


def start_gateway(thread: LoopThread, *, ready: bool = True, **settings: Any) -> Here:
    """A gateway with these settings before a model server of its own; ready unless told otherwise."""
    log = io.StringIO()
    upstream = TestUpstream()
    thread.run(upstream.start())
    chosen = {"rest_port": 0, "grpc_port": 0, "status_poll_s": 0.05, "drain_delay_s": 0.0, "drain_timeout_s": 5.0}
    chosen |= {"upstream": upstream.target, "log_level": "debug", **settings}
    running = thread.run(Running.start(Settings(**chosen), Logs("debug", "json", log)))
    here = Here(thread, upstream, running, log)
    if ready:
        here.wait_ready()
    return here


def stop_gateway(here: Here) -> None:
    here.http.close()
    here.channel.close()
    if here.behaviour.hold is not None:
        here.thread.call(here.behaviour.hold.set)
    if not here.running.rest_ended.done():
        here.thread.run(here.running.drain())
    here.thread.run(here.upstream.stop())


@pytest.fixture
def start(thread: LoopThread) -> Iterator[Callable[..., Here]]:
    """Start a gateway of the test's own."""
    started: list[Here] = []

    def begin(**settings: Any) -> Here:
        started.append(start_gateway(thread, **settings))
        return started[-1]

    yield begin
    for here in started:
        stop_gateway(here)


@pytest.fixture(scope="session")
def _shared(thread: LoopThread) -> Iterator[Here]:
    here = start_gateway(thread)
    yield here
    stop_gateway(here)


@pytest.fixture
def here(_shared: Here) -> Here:
    """A gateway shared by tests, with default settings: its model server behaves as new, its counters are not."""
    if _shared.behaviour.hold is not None:
        _shared.thread.call(_shared.behaviour.hold.set)
    _shared.upstream.behaviour = Behaviour()
    _shared.thread.call(_shared.gateway.upstream.breaker.succeeded)  # whatever the test before did to it
    _shared.forget_log()
    _shared.wait_ready()
    return _shared


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("DIGITS_")]:
        monkeypatch.delenv(name)
