"""Prometheus metrics under TensorFlow Serving's names, so that its dashboards and alerts fit; times in microseconds.

Labels are bounded: models that are configured, methods, canonical codes; never what a caller sent.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from serving.model_server import batching
from serving.model_server.errors import Code, ServingError

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
LATENCY_BUCKETS_US: Final = tuple(10 * 1.8**power for power in range(32))
"""Ten microseconds to a quarter of an hour, as in the original."""

SIZE_BUCKETS: Final = tuple(2**power for power in range(15))
OTHER_MODEL: Final = "other"

_SERVING: Final = ":tensorflow:serving:"
# prometheus-client ends every counter's name with _total; the original has these two without.
_WITHOUT_TOTAL: Final = re.compile(
    rb"(:tensorflow:serving:request_count|:tensorflow:cc:saved_model:load_attempt_count)_total"
)


class Metrics:
    """All metrics of one server, and the few calls that change them.

    Args:
        known: whether a model of that name is configured.
        versions: gives, for each configured model, its versions and the name of each one's state.
    """

    def __init__(self, known: Callable[[str], bool], versions: Callable[[], Mapping[str, Mapping[int, str]]]) -> None:
        prometheus_client.disable_created_metrics()
        self.registry = CollectorRegistry()
        self._known = known
        ProcessCollector(registry=self.registry)
        self.registry.register(_Versions(versions))
        self._requests = self._counter("serving:request_count", "Requests by their status.", "model_name", "status")
        self._latency = self._histogram(
            "serving:request_latency", "Microseconds of a request.", "model_name", "API", "entrypoint"
        )
        self._runtime = self._histogram(
            "serving:runtime_latency", "Microseconds of a request inside the model.", "model_name", "API", "runtime"
        )
        self._in_progress = Gauge(
            f"{_SERVING}requests_in_progress", "Requests being worked on.", ["entrypoint"], registry=self.registry
        )
        self._examples = self._histogram(
            "serving:request_example_counts", "Examples of a request.", "model", buckets=SIZE_BUCKETS
        )
        self._examples_total = self._counter("serving:request_example_count", "Examples of all requests.", "model")
        self._loads = self._counter("cc:saved_model:load_attempt_count", "Loads of a version.", "model_path", "status")
        self._load_time = self._histogram("cc:saved_model:load_latency", "Microseconds of a load.", "model_path")
        self._warmup = self._histogram(
            "serving:model_warmup_latency", "Microseconds of a warm-up.", "model_path", "status"
        )
        self._batch = self._histogram(
            "serving:batching_session:processed_batch_size", "Rows of a batch, with filling.", buckets=SIZE_BUCKETS
        )
        self._padding = self._histogram(
            "serving:batching_session:padding_size", "Rows of filling in a batch.", buckets=(0, *SIZE_BUCKETS)
        )
        self._queuing = self._histogram(
            "serving:batching_session:queuing_latency", "Microseconds that a call waited for its batch."
        )

    @contextmanager
    def request(self, entrypoint: str, api: str, model: str) -> Iterator[None]:
        """Around the answering of a request that came to ``GRPC`` or ``REST``."""
        status, started_s = Code.OK, time.perf_counter()
        self._in_progress.labels(entrypoint).inc()
        model = model if self._known(model) else OTHER_MODEL
        try:
            yield
        except ServingError as err:
            status = err.status
            raise
        except BaseException:
            status = Code.INTERNAL
            raise
        finally:
            self._in_progress.labels(entrypoint).dec()
            self._requests.labels(model, status.name).inc()
            if status is Code.OK:
                self._latency.labels(model, api, entrypoint).observe((time.perf_counter() - started_s) * 1e6)

    @contextmanager
    def run(self, api: str, model: str) -> Iterator[None]:
        """Around the run of a model that is there."""
        started_s = time.perf_counter()
        yield
        self._runtime.labels(model, api, "TF1").observe((time.perf_counter() - started_s) * 1e6)

    def read_examples(self, model: str, count: int) -> None:
        """A request to a model that is there held ``count`` examples."""
        self._examples.labels(model).observe(count)
        self._examples_total.labels(model).inc(count)

    def loaded(self, path: str, succeeded: bool, seconds: float) -> None:
        """A version was loaded, or was not."""
        self._loads.labels(path, "success" if succeeded else "fail").inc()
        self._load_time.labels(path).observe(seconds * 1e6)

    def warmed(self, path: str, status: Code, seconds: float) -> None:
        """A version's warm-up requests were run."""
        self._warmup.labels(path, status.name).observe(seconds * 1e6)

    def batches(self) -> batching.Observer:
        """What the batcher tells of its batches."""

        def batch(size: int, filling: int) -> None:
            self._batch.observe(size + filling)
            self._padding.observe(filling)

        return batching.Observer(batch, lambda seconds: self._queuing.observe(seconds * 1e6))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return _WITHOUT_TOTAL.sub(rb"\1", generate_latest(self.registry))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f":tensorflow:{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = LATENCY_BUCKETS_US
    ) -> Histogram:
        return Histogram(f":tensorflow:{name}", text, labels, registry=self.registry, buckets=buckets)


class _Versions:
    """One sample a version that the server tells of, 1 for the state it is in."""

    def __init__(self, versions: Callable[[], Mapping[str, Mapping[int, str]]]) -> None:
        self._versions = versions

    def collect(self) -> list[Metric]:
        family = GaugeMetricFamily(
            f"{_SERVING}version_state",
            "1 for the state that a version is in.",
            labels=["model_name", "version", "state"],
        )
        for model, versions in self._versions().items():
            for number, state in versions.items():
                family.add_metric([model, str(number), state], 1)
        return [family]
