"""How releases go, for Prometheus: ``python -m pipelines metrics`` asks the ledger, Prefect and the disks.

It runs beside the pipelines, not in them, since a release is a process that is gone when Prometheus comes by. At each
scrape it asks, and changes nothing. What it cannot reach shows as ``digits_ledger_up 0`` or ``digits_prefect_up 0``.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from digits.errors import DigitsError
from pipelines import ledger, serving_config
from pipelines.settings import Settings

FLOWS: Final = ("release", "maintenance")
RUNS: Final = 200
"""So many of each flow's last runs are looked at."""

ENDED: Final = ("completed", "rejected", "failed", "crashed", "cancelled")
"""States a run ends in, as labels; another name counts as its type."""

_TIMEOUT_S: Final = 5.0


class MetricsUnavailable(DigitsError):
    """The port cannot be used."""

    code = "metrics_unavailable"


def serve(settings: Settings, host: str, port: int) -> None:
    """Answer ``/metrics`` until SIGTERM or Ctrl-C.

    Raises:
        MetricsUnavailable: the port is taken, or not to be had.
    """
    registry = CollectorRegistry()
    registry.register(Releases(settings))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as err:
        raise MetricsUnavailable(
            f"cannot listen on {host}:{port} ({err.strerror}); choose another with --port"
        ) from err
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    stop.wait()
    server.shutdown()
    thread.join()


class Releases:
    """What the ledger, models.config, Prefect and the disks say at this moment, as metric families."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def describe(self) -> list[Metric]:
        """Nothing is asked before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families; each source on its own, so that one that is away hides no other."""
        yield from self._decisions()
        yield from self._runs()
        yield from self._disks()

    def _decisions(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("digits_ledger_up", "1 when the ledger can be read, else 0.")
        try:
            entries = ledger.read(self._settings)
            promoted = serving_config.promoted(self._settings)
        except DigitsError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        counts = CounterMetricFamily("digits_ledger_decisions", "Decisions in the ledger, by kind.", labels=["kind"])
        last = GaugeMetricFamily(
            "digits_last_decision_timestamp_seconds", "When a decision of that kind was last made.", labels=["kind"]
        )
        by_kind: dict[str, list[ledger.Decision]] = {str(kind): [] for kind in ledger.Kind}
        for entry in entries:
            by_kind[str(entry.decision.kind)].append(entry.decision)
        for kind, decisions in by_kind.items():
            counts.add_metric([kind], len(decisions))
            if decisions:
                last.add_metric([kind], decisions[-1].at.timestamp())
        yield counts
        yield last
        yield from _candidate([entry.decision for entry in entries])
        if promoted is not None:
            version = GaugeMetricFamily("digits_promoted_version", "The version that is served by default.")
            version.add_metric([], promoted)
            yield version
            released = [d.at for d in by_kind[str(ledger.Kind.RELEASE)] if d.version == promoted]
            if released:
                age = GaugeMetricFamily(
                    "digits_promoted_version_released_timestamp_seconds",
                    "When the version that is served by default was published.",
                )
                age.add_metric([], released[-1].timestamp())
                yield age

    def _runs(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("digits_prefect_up", "1 when Prefect's API answers, else 0.")
        try:
            families = list(_flow_runs(os.environ.get("PREFECT_API_URL", "")))
        except _NoAnswer:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from families

    def _disks(self) -> Iterator[Metric]:
        free = GaugeMetricFamily("digits_disk_free_bytes", "Left on the disk of that folder.", labels=["folder"])
        size = GaugeMetricFamily("digits_disk_size_bytes", "Size of the disk of that folder.", labels=["folder"])
        for name, folder in (("project", self._settings.project), ("models", self._settings.versions_dir.parent)):
            try:
                usage = shutil.disk_usage(folder)
            except OSError:
                continue
            free.add_metric([name], usage.free)
            size.add_metric([name], usage.total)
        yield free
        yield size


def _candidate(decisions: list[ledger.Decision]) -> Iterator[Metric]:
    """The last judged candidate: its figures on the test images, and what the gate said to each check."""
    judged = [d for d in decisions if d.kind in (ledger.Kind.RELEASE, ledger.Kind.REJECTION)]
    if not judged:
        return
    figures = GaugeMetricFamily(
        "digits_candidate_metric", "The last judged candidate on the test images.", labels=["metric"]
    )
    for name, value in judged[-1].metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "schema":
            figures.add_metric([name], value)
    yield figures
    checks = GaugeMetricFamily(
        "digits_gate_check_passed",
        "1 when the last judged candidate passed the gate's check, else 0.",
        labels=["check"],
    )
    for check in judged[-1].checks:
        checks.add_metric([str(check.get("name"))], bool(check.get("passed")))
    yield checks


class _NoAnswer(Exception):
    """Prefect's API does not answer, or there is none."""


def _flow_runs(api_url: str) -> Iterator[Metric]:
    runs = GaugeMetricFamily(
        "digits_flow_runs", f"Runs among the flow's last {RUNS}, by the state they are in.", labels=["flow", "state"]
    )
    last = GaugeMetricFamily(
        "digits_flow_last_run_timestamp_seconds", "When a run last ended in that state.", labels=["flow", "state"]
    )
    duration = GaugeMetricFamily(
        "digits_flow_last_duration_seconds", "Time that the flow's last ended run took.", labels=["flow"]
    )
    tasks = GaugeMetricFamily(
        "digits_task_last_duration_seconds", "Time of each task of the flow's last ended run.", labels=["flow", "task"]
    )
    for flow in FLOWS:
        found = _ask(
            api_url,
            "flow_runs/filter",
            {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": RUNS},
        )
        states = [_state(run) for run in found]
        for state in dict.fromkeys((*ENDED, *states)):
            runs.add_metric([flow, state], states.count(state))
        ended = [(state, run) for state, run in zip(states, found, strict=True) if run.get("end_time")]
        for state in ENDED:
            times = [_seconds(run["end_time"]) for each, run in ended if each == state]
            if times:
                last.add_metric([flow, state], max(times))
        if ended:
            _, run = max(ended, key=lambda pair: _seconds(pair[1]["end_time"]))
            duration.add_metric([flow], run["total_run_time"])
            query = {"flow_runs": {"id": {"any_": [run["id"]]}}, "limit": RUNS}
            times_by_task: dict[str, float] = {}
            for task in _ask(api_url, "task_runs/filter", query):
                times_by_task[task["name"]] = times_by_task.get(task["name"], 0.0) + task["total_run_time"]
            for name, seconds in times_by_task.items():
                tasks.add_metric([flow, name], seconds)
    yield from (runs, last, duration, tasks)


def _ask(api_url: str, path: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    import httpx2

    try:
        answer = httpx2.post(f"{api_url.rstrip('/')}/{path}", json=query, timeout=_TIMEOUT_S)
        answer.raise_for_status()
        return answer.json()
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as err:
        raise _NoAnswer(str(err)) from err


def _state(run: dict[str, Any]) -> str:
    """A bounded label: the state's name where it is one we give, else its type."""
    name = str(run.get("state_name")).lower()
    return name if name in ENDED else str(run.get("state_type")).lower()


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
