"""What Prometheus sees. One registry an application, so that tests and several applications do not meet.

Labels are bounded: route patterns, codes, model versions; never what a user sent.
"""

import itertools
import operator
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from digits import contract
from serving.gateway.totals import Family, Totals, snapshot_of

VERSION: Final = "0.1.0"

DURATION_BUCKETS_S: Final = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""A small model answers in one or two milliseconds; alarms sit at tens and hundreds."""

BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

CONFIDENCE_BUCKETS: Final = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)

INK_SHARE_BUCKETS: Final = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Of MNIST's training images half lie between 0.10 and 0.16, one in fifty below 0.05 or above 0.25."""

BOX_BUCKETS: Final = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 28)
"""Pixels of a canonical image, whose digit fits 20 x 20."""

INPUT_SAMPLE_S: Final = 0.02
"""Of the calls in this time one is looked at: what people send does not change faster."""

INPUT_SAMPLE_IMAGES: Final = 16
"""And of its images at most so many."""

SHED_REASONS: Final = (
    "queue_full", "queue_slow", "decodes_full", "passed_calls_full", "rate_limited", "connections_full",
)  # fmt: skip
"""Why a request is refused for too much work."""

COUNT_EVERY: Final = 512
"""Images whose answers are counted together, or fewer when someone looks."""

MAX_VERSIONS: Final = 32
"""Model versions that get a label of their own in one process' life; later ones share ``other``."""


class Metrics:
    """All metrics of one gateway, and the few calls that change them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = _Requests()
        self._predictions = _Predictions()
        self._inputs = _Inputs()
        self._upstream_s = _Histogram(
            "digits_upstream_duration_seconds", "Time of one model server call that succeeded.", DURATION_BUCKETS_S
        )
        self._batch_images = _Histogram("digits_batch_images", "Images in one model server call.", BATCH_BUCKETS)
        self._queue_wait_s = _Histogram(
            "digits_queue_wait_seconds", "Wait of the oldest image of each model server call.", DURATION_BUCKETS_S
        )
        own = (self._requests, self._predictions, self._upstream_s, self._batch_images, self._queue_wait_s)
        for collector in (*own, *self._inputs.histograms):
            self.registry.register(collector)
        self._versions: set[str] = set()

        self._in_flight = self._gauge("digits_requests_in_flight", "Requests under way, by protocol.", ["protocol"])
        self._queued = self._gauge("digits_queue_images", "Images that wait to go upstream.")
        self._calls = self._gauge("digits_upstream_calls_in_flight", "Calls under way at the model server.")
        self._ready = self._gauge("digits_upstream_ready", "1 when the model server has a version to serve, else 0.")
        self._breaker = self._gauge(
            "digits_breaker_state", "Breaker before the model server: 0 closed, 1 half open, 2 open."
        )
        self._version_changed = self._gauge(
            "digits_model_version_changed_timestamp_seconds",
            "When the version first answered that now answers requests which name none.",
            ["model_version"],
        )
        self._decodes = self._gauge("digits_decodes_in_flight", "Large pictures being decoded or waiting for a thread.")
        build = self._gauge("digits_build_info", "Always 1; its labels say what runs.", ["version", "python"])
        build.labels(VERSION, platform.python_version()).set(1)

        shed = self._counter("digits_shed", "Requests refused because of too much work.", ["reason"])
        self._upstream_calls = self._counter("digits_upstream_calls", "Calls to the model server, by code.", ["code"])
        self._upstream_errors = self._counter("digits_upstream_errors", "Failed model server calls, by code.", ["code"])
        self._retries = self._counter("digits_upstream_retries", "Calls to the model server that were sent again.")
        self._refusals = self._counter("digits_breaker_refusals", "Calls that the breaker did not let go upstream.")
        # The supervisor's to count, and added to this: there with one process too, or the alert would be about nothing.
        self._counter("digits_worker_crashes", "Worker processes that ended without being told to.")
        self._shed_by = {reason: shed.labels(reason) for reason in SHED_REASONS}

    def request(self, protocol: str, route: str, code: str, model_version: str, duration_s: float) -> None:
        """One request has ended. ``code``: HTTP status or gRPC code; ``model_version``: empty if none answered."""
        self._requests.add((protocol, route, code, self._bounded(model_version)), duration_s)

    def predictions(
        self,
        digits: NDArray[np.int64],
        confidences: NDArray[np.float32],
        model_version: str,
        class_count: int,
        unsure: int = 0,
    ) -> None:
        """The model has answered: digits int (N,), confidences float32 (N,), of so many classes, so many unsure."""
        self._predictions.add(self._bounded(model_version), digits, confidences, class_count, unsure)

    def batch(self, images: int, oldest_wait_s: float) -> None:
        """A call with ``images`` images goes upstream; its oldest one has waited ``oldest_wait_s``."""
        self._batch_images.add(images)
        self._queue_wait_s.add(oldest_wait_s)

    def upstream_call(self, code: str, duration_s: float) -> None:
        """A call to the model server has ended with this gRPC code."""
        self._upstream_calls.labels(code).inc()
        if code == "OK":
            self._upstream_s.add(duration_s)
        else:
            self._upstream_errors.labels(code).inc()

    def upstream_retry(self) -> None:
        """A call that found no server is sent again."""
        self._retries.inc()

    def breaker_state(self, state: int) -> None:
        """The breaker has changed: 0 closed, 1 half open, 2 open."""
        self._breaker.set(state)

    def breaker_refusal(self) -> None:
        """The breaker did not let a call go upstream."""
        self._refusals.inc()

    def version_changed(self, model_version: str) -> None:
        """Another version than before has answered a request that names none."""
        self._version_changed.clear()
        self._version_changed.labels(self._bounded(model_version)).set(time.time())

    def inputs(self, images_u8: bytes) -> None:
        """Images went to the model: uint8, ``N * 784`` bytes. A sample of them is measured."""
        self._inputs.add(images_u8)

    def upstream_ready(self, ready: bool) -> None:
        """The model server's availability has changed."""
        self._ready.set(ready)

    def shed(self, reason: str) -> None:
        """A request was refused for too much work, for one of ``SHED_REASONS``."""
        self._shed_by[reason].inc()

    def watch_requests(self, protocol: str, in_flight: Callable[[], float]) -> None:
        """Have the number of requests under way read at each scrape."""
        self._in_flight.labels(protocol).set_function(in_flight)

    def watch_predictor(self, queued_images: Callable[[], float], calls: Callable[[], float]) -> None:
        """Have the queue's length and the calls under way read at each scrape."""
        self._queued.set_function(queued_images)
        self._calls.set_function(calls)

    def watch_decodes(self, in_flight: Callable[[], float]) -> None:
        """Have the number of pictures being decoded read at each scrape."""
        self._decodes.set_function(in_flight)

    def snapshot(self) -> list[Family]:
        """All metrics as plain lists, to be added to those of other workers."""
        return snapshot_of(self.registry.collect())

    def exposition(self, accept: str, totals: list[Family] | None = None) -> tuple[bytes, str]:
        """Body and content type of ``/metrics``: Prometheus' text, or OpenMetrics where ``accept`` asks for it.

        ``totals`` are shown in place of this process' own.
        """
        registry = self.registry
        if totals is not None:
            registry = CollectorRegistry()
            registry.register(Totals(totals))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def _bounded(self, version: str) -> str:
        if version in self._versions or not version:
            return version
        if len(self._versions) < MAX_VERSIONS:
            self._versions.add(version)
            return version
        return "other"

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(name, text, labels or [], registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(name, text, labels or [], registry=self.registry)


class _Buckets:
    """Counts of a histogram. The library's observe() takes a lock and walks all buckets; only one loop adds here."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        total = 0
        rows = []
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class _Histogram(_Buckets):
    """A histogram without labels."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        super().__init__(bounds)
        self._name, self._text = name, text

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric((), self.cumulative(), self.sum)
        yield family


class _Requests:
    """Requests and their durations by protocol, route, code and model version."""

    LABELS: Final = ("protocol", "route", "code", "model_version")

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, str, str], _Buckets] = {}

    def add(self, labels: tuple[str, str, str, str], duration_s: float) -> None:
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Buckets(DURATION_BUCKETS_S)
        series.add(duration_s)

    def collect(self) -> Iterator[Metric]:
        total = CounterMetricFamily("digits_requests", "Requests answered, by code.", labels=self.LABELS)
        duration = HistogramMetricFamily(
            "digits_request_duration_seconds", "Time from a request's headers to its answer.", labels=self.LABELS
        )
        for labels, series in self._series.items():
            buckets = series.cumulative()
            total.add_metric(labels, buckets[-1][1])
            duration.add_metric(labels, buckets, series.sum)
        yield total
        yield duration


class _Predictions:
    """Digits read and how sure the model was, by model version."""

    BOUNDS: Final = np.array(CONFIDENCE_BUCKETS, np.float32)

    def __init__(self) -> None:
        self._unsure: dict[str, int] = {}
        self._digits: dict[str, NDArray[Any]] = {}  # (C,) counts
        self._confidences: dict[str, tuple[NDArray[Any], list[float]]] = {}  # (buckets + 1,) counts, [sum]
        self._uncounted: list[tuple[str, NDArray[np.int64], NDArray[np.float32], int, int]] = []
        self._uncounted_images = 0

    def add(
        self,
        version: str,
        digits: NDArray[np.int64],
        confidences: NDArray[np.float32],
        class_count: int,
        unsure: int,
    ) -> None:
        """As ``Metrics.predictions``. Counted later, with others: to count six takes as long as to count a hundred."""
        self._uncounted.append((version, digits, confidences, class_count, unsure))
        self._uncounted_images += len(digits)
        if self._uncounted_images >= COUNT_EVERY:
            self._count()

    def _count(self) -> None:
        calls, self._uncounted, self._uncounted_images = self._uncounted, [], 0
        for version, group in itertools.groupby(calls, key=operator.itemgetter(0)):
            _, digits, confidences, class_counts, unsure = zip(*group, strict=True)
            class_count, sure = max(class_counts), np.concatenate(confidences)
            if version not in self._digits:
                self._digits[version] = np.zeros(class_count, np.int64)
                self._confidences[version] = np.zeros(len(self.BOUNDS) + 1, np.int64), [0.0]
                self._unsure[version] = 0
            read = self._digits[version]
            if len(read) < class_count:  # the versions that share ``other`` may differ in this
                read = self._digits[version] = np.pad(read, (0, class_count - len(read)))
            read += np.bincount(np.concatenate(digits), minlength=len(read))
            counts, total = self._confidences[version]
            counts += np.bincount(np.searchsorted(self.BOUNDS, sure), minlength=len(counts))
            total[0] += float(sure.sum(dtype=np.float64))
            self._unsure[version] += sum(unsure)

    def collect(self) -> Iterator[Metric]:
        self._count()
        read = CounterMetricFamily(
            "digits_predictions", "Images by the digit that was read.", labels=("digit", "model_version")
        )
        confidence = HistogramMetricFamily(
            "digits_prediction_confidence", "Probability of the digit that was read.", labels=("model_version",)
        )
        unsure = CounterMetricFamily(
            "digits_unsure",
            "Images whose answer had better not be used: less certain than the threshold.",
            labels=("model_version",),
        )
        names = [*map(str, CONFIDENCE_BUCKETS), "+Inf"]
        for version, digits in self._digits.items():
            for digit, count in enumerate(digits.tolist()):
                read.add_metric((str(digit), version), count)
            unsure.add_metric((version,), self._unsure[version])
            counts, total = self._confidences[version]
            confidence.add_metric((version,), list(zip(names, np.cumsum(counts).tolist(), strict=True)), total[0])
        yield read
        yield confidence
        yield unsure


class _Inputs:
    """How much ink the images have and how large the digit in them is: the first sign that people send other things."""

    def __init__(self) -> None:
        self._next = 0.0
        self.histograms = (
            _Histogram("digits_input_ink_share", "Mean ink of an image, 0 to 1.", INK_SHARE_BUCKETS),
            _Histogram("digits_input_box_width_pixels", "Width of what is inked, of 28.", BOX_BUCKETS),
            _Histogram("digits_input_box_height_pixels", "Height of what is inked, of 28.", BOX_BUCKETS),
        )

    def add(self, images_u8: bytes) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + INPUT_SAMPLE_S
        images = np.frombuffer(images_u8, np.uint8).reshape(-1, contract.IMAGE_HEIGHT, contract.IMAGE_WIDTH)
        images = images[:INPUT_SAMPLE_IMAGES]  # (N, 28, 28)
        inked = np.greater(images, 127)
        measured = (images.mean(axis=(1, 2)) / 255, _extent(inked.any(axis=1)), _extent(inked.any(axis=2)))
        for histogram, values in zip(self.histograms, measured, strict=True):
            for value in values.tolist():
                histogram.add(value)


def _extent(inked: Any) -> NDArray[np.int64]:
    """From the first True to the last of each row: bool (N, 28) → int (N,), 0 where there is none."""
    size = inked.shape[1]
    extent: NDArray[np.int64] = (size - inked.argmax(axis=1) - inked[:, ::-1].argmax(axis=1)) * inked.any(axis=1)
    return extent
