"""The monitoring files, by Prometheus' own tool."""

import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.monitoring.conftest import HANG_S, MONITORING, read_yaml, rules

pytestmark = pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's package prometheus")


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
