"""The gateway's parts, put together once and handed to both adapters, and what every request leaves behind."""

import asyncio
import random
import re
import time
from typing import Final

from serving.gateway.auth import Guard
from serving.gateway.logs import Logs
from serving.gateway.metrics import Metrics
from serving.gateway.pictures import Pictures
from serving.gateway.predictor import Answer, Predictor
from serving.gateway.settings import Settings
from serving.gateway.tls import upstream_context
from serving.gateway.upstream import Availability, Upstream
from serving.gateway.worker import Control

WORDS_A_SECOND: Final = 1000
"""Refusals for lasting overload that are told why and logged, each second. The others are counted."""

_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/=@-]{0,127}")


class Gateway:
    """Everything behind REST and gRPC. Create it inside a running event loop.

    Args:
        settings: What the operator set.
        logs: Where lines go.

    Raises:
        BadSettings: A file that the settings name cannot be used.
    """

    def __init__(self, settings: Settings, logs: Logs) -> None:
        self.settings = settings
        self.logs = logs
        self.log = logs.log
        self.draining = False
        """Connections are asked to leave with their next answer."""
        self.replaced = False
        """Another worker has taken over: balancers need not know that this one goes."""
        self.control: Control | None = None
        """The line to the supervisor, if this is one of several workers."""
        self.metrics = Metrics()
        self._words_since, self._words, self._wordless = 0.0, 0, 0
        self.guard = Guard.of(settings, self.metrics)
        self.upstream = Upstream(
            settings.upstream,
            self.metrics,
            settings.status_poll_s,
            settings.model_label,
            upstream_context(settings),
        )
        self.upstream.on_change(self._say_availability)
        self._was_ready: bool | None = None
        self.pictures = Pictures(self.metrics, settings.decode_threads, settings.max_waiting_decodes)
        self.predictor = Predictor(
            self.upstream.predict,
            self.metrics,
            max_batch=settings.max_batch_images,
            max_calls=settings.max_upstream_calls,
            max_queue=settings.max_queue_images,
            max_wait_s=settings.max_wait_s,
            max_burst_s=settings.max_burst_s,
            busy_wait_s=settings.busy_wait_ms / 1000,
            unsure_below=settings.unsure_below,
        )

    def _say_availability(self, now: Availability) -> None:
        """A change to ready or away. What a worker finds as it starts goes without saying when all is well."""
        was, self._was_ready = self._was_ready, now.ready
        if now.ready and (was is False or (was is None and self.control is None)):
            self.log.info("model_server_ready", versions=list(now.versions))
        elif was is not False and not now.ready:
            self.log.warning("model_server_away", reason=now.reason)

    async def classify(self, data: bytes, deadline: float) -> Answer:
        """Read the digit in a picture or 784 raw bytes. The adapters' own way in; REST unrolls it on its lean path.

        Args:
            data: Encoded picture, or a canonical image's bytes.
            deadline: ``time.monotonic()`` seconds.

        Raises:
            DigitsError: Any of them.
        """
        image_u8 = self.pictures.read_at_once(data)
        if image_u8 is None:
            image_u8 = await self.pictures.read(data)
        return (await self.predictor.submit(image_u8, 1, deadline))[0]

    def why_not_ready(self) -> str:
        """Empty when requests can be answered."""
        if self.draining and not self.replaced:
            return "this gateway is shutting down"
        return "" if self.upstream.availability.ready else self.upstream.availability.reason

    def finished(
        self,
        protocol: str,
        route: str,
        code: str,
        started: float,
        request_id: str,
        *,
        failed: bool = False,
        model_version: str = "",
        **fields: object,
    ) -> None:
        """Count a request that has ended and write its line.

        Args:
            protocol: rest or grpc.
            route: The route's pattern, not the path that was sent.
            code: HTTP status or gRPC code.
            started: ``time.monotonic()`` seconds of its beginning.
            request_id: The one that the client was told.
            failed: The fault was on our side.
            model_version: The version that answered, if one did.
            fields: More for the line.
        """
        duration_s = time.monotonic() - started
        self.metrics.request(protocol, route, code, model_version, duration_s)
        line: dict[str, object] = {
            "protocol": protocol,
            "route": route,
            "code": code,
            "ms": round(duration_s * 1000, 3),
            "request_id": request_id,
        }
        if model_version:
            line["model_version"] = model_version
        if fields:
            line.update(fields)
        self.logs.request(line, failed=failed)

    def shed(self, protocol: str, route: str, code: str, started: float, request_id: str) -> None:
        """As ``finished``, for a request that was refused for lasting overload."""
        duration_s = time.monotonic() - started
        self.metrics.request(protocol, route, code, "", duration_s)
        self.logs.shed(protocol, route, code, duration_s, request_id)

    def has_words(self, now: float) -> bool:
        """Whether one more of this second's refusals for lasting overload is told why, and logged."""
        if now - self._words_since >= 1.0:
            self._words_since, self._words = now, 0
        self._words += 1
        return self._words <= WORDS_A_SECOND

    def shed_without_words(self, protocol: str, route: str, code: str) -> None:
        """Count a request that was refused for lasting overload; the log has the number of these each second."""
        self.metrics.request(protocol, route, code, "", 0.0)
        if not self._wordless:
            asyncio.get_running_loop().call_later(1.0, self._say_how_many)
        self._wordless += 1

    def _say_how_many(self) -> None:
        count, self._wordless = self._wordless, 0
        self.log.warning("requests_shed", count=count, hint="refused for overload in a second, besides those logged")

    async def close(self) -> None:
        """Finish what is under way and let go of the model server."""
        await self.predictor.close()
        self.pictures.close()
        await self.upstream.close()


def request_id_from(sent: str | None) -> str:
    """The client's own request id if it is sane (letters, digits and ``._:+/=@-``, at most 128), else a new one."""
    if sent is not None and _SANE_REQUEST_ID.fullmatch(sent):
        return sent
    return f"{random.getrandbits(80):020x}"
