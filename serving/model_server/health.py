"""grpc.health.v1 that follows the models: ``""`` is SERVING while every model has a version, a model's name its own.

The stock servicer keeps its Watch streams open for ever, which would make every drain last its whole grace period.
"""

import threading
from collections.abc import Callable, Mapping
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
        """The service, for a synchronous gRPC server."""

        def watch(request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext, send: SendResponse) -> None:
            watcher = (request.service, send)
            with self._lock:
                self._watchers.append(watcher)
                send(Response(status=self._status(request.service)))
            context.add_callback(lambda: self._forget(watcher))

        # grpcio's way to keep a stream open without holding one of the server's threads.
        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        return grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health",
            {
                "Check": grpc.unary_unary_rpc_method_handler(
                    self._check, health_pb2.HealthCheckRequest.FromString, Response.SerializeToString
                ),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    watch, health_pb2.HealthCheckRequest.FromString, Response.SerializeToString
                ),
            },
        )

    def _check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> Any:
        with self._lock:
            status = self._status(request.service)
        if status == Response.SERVICE_UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service: {request.service}")
        return Response(status=status)

    def _status(self, service: str) -> int:
        if service not in self._serving:
            return Response.SERVICE_UNKNOWN
        return Response.SERVING if self._serving[service] else Response.NOT_SERVING

    def _forget(self, watcher: tuple[str, SendResponse]) -> None:
        with self._lock:
            if watcher in self._watchers:
                self._watchers.remove(watcher)
