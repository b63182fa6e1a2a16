"""The monitoring files, with Debian's real Prometheus before a real gateway."""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from serving.protos import digits_pb2
from tests.conftest import ROOT
from tests.serving.gateway.conftest import Here, LoopThread, random_images, start_gateway, stop_gateway

MONITORING = ROOT / "monitoring"
HANG_S = 60  # a hang's limit, not a claim about speed

pytestmark = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="needs Debian's package prometheus"
)


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in read_yaml(MONITORING / "rules.yml")["groups"] for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    """The metric names of a PromQL expression: what is left without labels, ranges, functions and words."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - {"and", "or", "unless"}


class Prometheus:
    """A running Prometheus with the repository's own files, which scrapes one gateway each half second."""

    def __init__(self, folder: Path, gateway: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        config = read_yaml(MONITORING / "prometheus.yml")
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        targets = {"gateway": gateway, "prometheus": self.address}
        for job in config["scrape_configs"]:
            job.pop("dns_sd_configs", None)
            job["static_configs"] = [{"targets": [targets[job["job_name"]]]}] if job["job_name"] in targets else []
        folder.mkdir(exist_ok=True)
        with (folder / "prometheus.yml").open("w") as out:
            YAML(typ="safe").dump(config, out)
        shutil.copy(MONITORING / "rules.yml", folder)
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "log").open("w"),
        )

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"http://{self.address}/api/v1/{path}", params=params, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def wait_for(self, expression: str) -> list[dict[str, Any]]:
        """What the expression gives, once it gives anything."""
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            try:
                if found := self.query(expression):
                    return found
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, "Prometheus ended"
            time.sleep(0.1)
        pytest.fail(f"{expression} never gave anything")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(HANG_S)


def send_traffic(here: Here) -> None:
    """Good and bad requests over both protocols."""
    for image in random_images(5):
        assert here.classify(image.tobytes()).status_code == 200
        here.stub.Classify(digits_pb2.ClassifyRequest(image=image.tobytes()))
    here.classify(b"no picture")


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    here = start_gateway(LoopThread())
    yield here
    stop_gateway(here)


@pytest.fixture(scope="module")
def prometheus(here: Here, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), here.url.removeprefix("http://"))
    try:
        send_traffic(here)
        prometheus.wait_for("count_over_time(digits_requests_total[5m]) > 1")
        send_traffic(here)
        prometheus.wait_for("rate(digits_requests_total[5m]) > 0")
        yield prometheus
    finally:
        prometheus.stop()


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
