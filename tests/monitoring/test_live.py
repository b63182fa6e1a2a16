"""Rules and panels, each query against Debian's real Prometheus that scraped a real gateway and the real exporter."""

import json
import re
import shutil

import pytest

from monitoring.dashboards import DASHBOARDS, Panel, dashboards
from tests.monitoring.conftest import Prometheus, metrics_in, rules
from tests.serving.gateway.conftest import Here, eventually

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus")

PANELS = [(uid, panel) for uid, (_, rows) in DASHBOARDS.items() for panels in rows.values() for panel in panels]


def for_prometheus(query: str) -> str:
    """The query as Grafana would send it: its variables filled in, all versions chosen."""
    return query.replace("$__rate_interval", "1m").replace("$version", ".*")


def test_prometheus_scrapes_the_gateway(prometheus: Prometheus) -> None:
    """A gateway that runs is up, in Prometheus' own words."""
    (up,) = prometheus.wait_for('up{job="gateway"}')
    assert up["value"][1] == "1"


def test_rules_use_only_metrics_that_something_emits(prometheus: Prometheus) -> None:
    """A rule on a metric that nothing emits is silent for ever."""
    known = set(prometheus.get("label/__name__/values"))
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        used = metrics_in(rule["expr"])
        assert used, rule
        assert used <= known | recorded, rule


def test_every_rule_evaluates_and_every_recording_rule_gives_series(here: Here, prometheus: Prometheus) -> None:
    """Prometheus itself says of each rule that it is well, after real traffic."""
    for rule in rules():
        if "record" in rule:
            prometheus.wait_for(rule["record"])
    running = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(running) == len(rules())
    assert {rule["name"]: rule["health"] for rule in running} == dict.fromkeys(
        [rule.get("record") or rule["alert"] for rule in rules()], "ok"
    )


def test_no_alert_is_raised_while_all_is_well(prometheus: Prometheus) -> None:
    """Bad requests of a client raise nothing; the ratios are those of the traffic sent."""

    def alerts() -> list[dict[str, str]]:
        found = [alert["metric"] for alert in prometheus.query("ALERTS")]
        # The disk of the machine that runs the tests may be full indeed.
        found = [alert for alert in found if alert["alertname"] != "DiskFull"]
        assert [alert for alert in found if alert["alertstate"] == "firing"] == []
        return found

    # One scrape that takes more than its half second, beside other tests, makes an alert pending until the next one.
    eventually(lambda: not alerts())
    (errors,) = prometheus.wait_for("digits:request_errors:ratio5m")
    assert float(errors["value"][1]) == 0


@pytest.mark.parametrize(("uid", "panel"), PANELS, ids=[f"{uid}: {panel.title}" for uid, panel in PANELS])
def test_every_query_of_a_panel_gives_series(prometheus: Prometheus, uid: str, panel: Panel) -> None:
    """A panel without data teaches people not to look."""
    for query in panel.queries.values():
        assert prometheus.wait_for(for_prometheus(query))


def test_no_panel_asks_for_a_metric_that_nothing_emits(prometheus: Prometheus) -> None:
    """Also where another metric in the same query would hide it."""
    known = set(prometheus.get("label/__name__/values"))
    for _, panel in PANELS:
        for query in panel.queries.values():
            used = metrics_in(for_prometheus(query))
            assert used, panel
            assert used <= known, panel


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
