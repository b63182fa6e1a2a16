"""Metrics of several processes as one: what a scrape of any worker shows.

Plain lists and dicts, so that they travel as JSON and the supervisor needs nothing to add them up.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

Family = list[Any]
"""``[name, documentation, type, samples]``, a sample being ``[name, labels, value]``."""

_GAUGES: Final[dict[str, Callable[[float, float], float]]] = {
    "digits_upstream_ready": min,
    "digits_breaker_state": max,
    "digits_build_info": max,
    "digits_model_version_changed_timestamp_seconds": max,
    "process_start_time_seconds": min,
    "process_max_fds": min,
}
"""How the values of two processes become one; those of other gauges are added, as those of counters are."""


def add_up(snapshots: Iterable[list[Family]]) -> list[Family]:
    """One snapshot of all processes'."""
    families: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for name, text, kind, samples in (family for snapshot in snapshots for family in snapshot):
        families.setdefault(name, [name, text, kind, []])
        found = values.setdefault(name, {})
        for sample, labels, value in samples:
            key = sample, tuple(sorted(labels.items()))
            found[key] = _combine(sample, found[key], value) if key in found else value
    for name, family in families.items():
        family[3] = [[sample, dict(labels), value] for (sample, labels), value in values[name].items()]
    return list(families.values())


def that_stay(snapshot: list[Family]) -> list[Family]:
    """Of a process that has ended what counts on: a counter that went back would read as a sudden burst."""
    return [family for family in snapshot if family[2] in ("counter", "histogram")]


def _combine(sample: str, one: float, other: float) -> float:
    if sample.endswith("_created"):
        return min(one, other)
    return _GAUGES.get(sample, float.__add__)(float(one), float(other))


def snapshot_of(metrics: Iterable[Any]) -> list[Family]:
    """What a registry of prometheus-client collects."""
    return [
        [one.name, one.documentation, one.type, [[s.name, s.labels, s.value] for s in one.samples]] for one in metrics
    ]


class Totals:
    """A collector of prometheus-client that shows a snapshot."""

    def __init__(self, snapshot: list[Family]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Any]:
        """The families as the library has them."""
        from prometheus_client import Metric

        for name, text, kind, samples in self._snapshot:
            family = Metric(name, text, kind)
            for sample, labels, value in samples:
                family.add_sample(sample, labels, value)
            yield family
