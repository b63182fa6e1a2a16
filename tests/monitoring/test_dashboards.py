"""The dashboards, each query against Debian's real Prometheus that scraped real traffic."""

import json
import re
import shutil

import pytest

from monitoring.dashboards import DASHBOARDS, Panel, dashboards
from tests.conftest import ROOT
from tests.monitoring.conftest import Prometheus, metrics_in

PANELS = [(uid, panel) for uid, (_, rows) in DASHBOARDS.items() for panels in rows.values() for panel in panels]

needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus")


def for_prometheus(query: str) -> str:
    """The query as Grafana would send it: its variables filled in, all versions chosen."""
    return query.replace("$__rate_interval", "1m").replace("$version", ".*")


@needs_prometheus
@pytest.mark.parametrize(("uid", "panel"), PANELS, ids=[f"{uid}: {panel.title}" for uid, panel in PANELS])
def test_every_query_of_a_panel_gives_series(prometheus: Prometheus, uid: str, panel: Panel) -> None:
    """A panel without data teaches people not to look."""
    for query in panel.queries.values():
        assert prometheus.wait_for(for_prometheus(query))


@needs_prometheus
def test_no_panel_asks_for_a_metric_that_nothing_emits(prometheus: Prometheus) -> None:
    """Also where another metric in the same query would hide it."""
    known = set(prometheus.get("label/__name__/values"))
    for _, panel in PANELS:
        for query in panel.queries.values():
            used = metrics_in(for_prometheus(query))
            assert used, panel
            assert used <= known, panel


@needs_prometheus
def test_the_version_variable_and_the_release_annotations_find_something_to_ask(prometheus: Prometheus) -> None:
    """Their metrics exist, and versions have labels."""
    assert "test" not in dashboards()
    for text in dashboards().values():
        board = json.loads(text)
        (variable,) = board["templating"]["list"]
        metric, label = re.fullmatch(r"label_values\((\w+)\{.*\}, (\w+)\)", variable["query"]).groups()
        assert prometheus.wait_for(f'{metric}{{{label}!=""}}')
        (annotation,) = board["annotations"]["list"]
        prometheus.query(annotation["expr"])
        assert metrics_in(annotation["expr"]) <= set(prometheus.get("label/__name__/values"))


def test_panels_say_what_they_show_and_in_what_unit() -> None:
    """In a sentence, under a title that is unique on its dashboard; figures that can be bad have limits."""
    for uid, (_, rows) in DASHBOARDS.items():
        panels = [panel for panels in rows.values() for panel in panels]
        titles = [panel.title for panel in panels]
        assert len(set(titles)) == len(titles), uid
        for panel in panels:
            assert panel.text.endswith("."), panel
            assert panel.unit, panel
        assert any(panel.thresholds for panel in panels), uid


def test_the_json_in_the_repository_is_what_the_code_makes() -> None:
    """Grafana reads these files; nobody edits them."""
    folder = ROOT / "monitoring" / "grafana" / "dashboards"
    assert {path.name: path.read_text() for path in folder.glob("*.json")} == dashboards()
