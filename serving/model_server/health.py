"""grpc.health.v1 that follows the models: ``""`` is SERVING while every model has a version, a model's name its own.

The stock servicer keeps its Watch streams open for ever, which would make every drain last its whole grace period.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

Response = health_pb2.HealthCheckResponse
SendResponse = Callable[[Any], None]


class Health:
    """States by service name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._serving: dict[str, bool] = {"": False}
        self._watchers: list[tuple[str, SendResponse]] = []
        self._draining = False

    def update(self, serving: Mapping[str, bool]) -> None:
        """Replace all states (service name to is-serving) and tell those who watch; without effect once draining."""
        with self._lock:
            if self._draining:
                return
            before, self._serving = self._serving, dict(serving)
            for service, send in self._watchers:
                if before.get(service) != self._serving.get(service):
                    send(Response(status=self._status(service)))

    def drain(self) -> None:
        """Say NOT_SERVING to everyone, for good."""
        self.update(dict.fromkeys(self._serving, False))
        with self._lock:
            self._draining = True

    def close(self) -> None:
        """End the Watch streams."""
        with self._lock:
            watchers, self._watchers = self._watchers, []
        for _, send in watchers:
            send(None)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, for a server in an event loop."""
        return grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health",
            {
                "Check": grpc.unary_unary_rpc_method_handler(
                    self._check, health_pb2.HealthCheckRequest.FromString, Response.SerializeToString
                ),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    self._watch, health_pb2.HealthCheckRequest.FromString, Response.SerializeToString
                ),
            },
        )

    async def _check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        with self._lock:
            status = self._status(request.service)
        if status == Response.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service: {request.service}")
        return Response(status=status)

    async def _watch(self, request: health_pb2.HealthCheckRequest, _context: Any) -> AsyncIterator[Any]:
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Any]()
        watcher = request.service, lambda state: _tell(loop, news, state)
        with self._lock:
            self._watchers.append(watcher)
            news.put_nowait(Response(status=self._status(request.service)))
        try:
            while (state := await news.get()) is not None:
                yield state
        finally:
            self._forget(watcher)

    def _status(self, service: str) -> int:
        if service not in self._serving:
            return Response.SERVICE_UNKNOWN
        return Response.SERVING if self._serving[service] else Response.NOT_SERVING

    def _forget(self, watcher: tuple[str, SendResponse]) -> None:
        with self._lock:
            if watcher in self._watchers:
                self._watchers.remove(watcher)


def _tell(loop: asyncio.AbstractEventLoop, news: asyncio.Queue[Any], state: Any) -> None:
    with suppress(RuntimeError):  # the loop has ended, and with it all who watch
        loop.call_soon_threadsafe(news.put_nowait, state)
