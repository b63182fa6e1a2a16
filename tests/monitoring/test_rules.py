"""The monitoring files, with Debian's real Prometheus before a real gateway and the real exporter."""

import re
import shutil
import subprocess
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.monitoring.conftest import HANG_S, MONITORING, Prometheus, metrics_in, read_yaml
from tests.serving.gateway.conftest import Here

pytestmark = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="needs Debian's package prometheus"
)


def rules() -> list[dict[str, Any]]:
    return [rule for group in read_yaml(MONITORING / "rules.yml")["groups"] for rule in group["rules"]]


def test_promtool_finds_no_fault_in_the_configuration_and_rules() -> None:
    """What compose mounts into Prometheus is valid."""
    subprocess.run(["promtool", "check", "config", MONITORING / "prometheus.yml"], check=True, timeout=HANG_S)


def test_every_alert_fires_when_it_should() -> None:
    """monitoring/rules_test.yml: each alert with series that raise it, and close ones that do not."""
    subprocess.run(["promtool", "test", "rules", MONITORING / "rules_test.yml"], check=True, timeout=HANG_S)


def test_every_alert_has_a_unit_test_and_a_runbook_entry() -> None:
    """An alert nobody has seen fire, or that leaves its reader alone, is no alert."""
    tested = {
        case["alertname"]
        for test in read_yaml(MONITORING / "rules_test.yml")["tests"]
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    anchors = {f"docs/runbook.md#{heading.lower().replace(' ', '-')}" for heading in headings}
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert alerts
    assert set(alerts) == tested
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook"] in anchors, name
        assert rule["labels"]["severity"] in {"page", "ticket"}, name


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
    assert prometheus.query("ALERTS") == []
    (errors,) = prometheus.wait_for("digits:request_errors:ratio5m")
    assert float(errors["value"][1]) == 0
