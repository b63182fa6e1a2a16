"""One Prometheus, Debian's, before a real gateway, the pipelines' exporter and a real Prefect server."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from pipelines import ledger, prefect_server, serving_config
from pipelines.settings import Settings
from serving.protos import digits_pb2
from tests.conftest import HANG_S, HTTP, ROOT, clean_environment
from tests.ports import free_port, free_ports
from tests.serving.gateway.conftest import Here, LoopThread, random_images, start_gateway, stop_gateway

MONITORING = ROOT / "monitoring"


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in read_yaml(MONITORING / "rules.yml")["groups"] for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    """The metric names of a PromQL expression: what is left without labels, ranges, functions and words."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    words = {"and", "or", "unless", "group_left", "group_right"}
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - words


class Prometheus:
    """A running Prometheus with the repository's own files, which scrapes these targets each half second."""

    def __init__(self, folder: Path, targets: dict[str, str]) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        config = read_yaml(MONITORING / "prometheus.yml")
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config.pop("alerting")
        targets = {**targets, "prometheus": self.address}
        for job in config["scrape_configs"]:
            for name in ("dns_sd_configs", "scrape_interval", "scrape_timeout"):
                job.pop(name, None)
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

    def wait_ready(self) -> None:
        """Until it answers queries: before that it says 503."""
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "Prometheus ended"
            with contextlib.suppress(httpx.TransportError):
                if HTTP.get(f"http://{self.address}/-/ready").status_code == 200:
                    return
            time.sleep(0.1)
        pytest.fail("Prometheus was never ready")

    def get(self, path: str, **params: str) -> Any:
        answer = HTTP.get(f"http://{self.address}/api/v1/{path}", params=params)
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
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running `python -m pipelines metrics`, with a release in the ledger and at a Prefect server."""
    project = tmp_path_factory.mktemp("project")
    settings = Settings(project=project)
    record_release(settings)
    (port,) = free_ports(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("PREFECT_", "DIGITS_"))]:
            patch.delenv(name)
        prefect_server.prepare_environment(settings)
        with prefect_server.server(settings):
            prefect_server.wait_until_ready(settings)
            make_runs(os.environ["PREFECT_API_URL"])
            environment = clean_environment(PREFECT_API_URL=os.environ["PREFECT_API_URL"], DIGITS_PROJECT=str(project))
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", "metrics", "--port", str(port)], cwd=ROOT, env=environment
            )
            try:
                yield f"127.0.0.1:{port}"
            finally:
                process.terminate()
                assert process.wait(HANG_S) == 0, "SIGTERM ends it well"


def record_release(settings: Settings) -> None:
    """A release of version 1 in the ledger, and models.config that serves it."""
    settings.versions_dir.joinpath("1").mkdir(parents=True)
    checks = [{"name": "accuracy", "passed": True}, {"name": "beats the champion", "passed": False}]
    metrics = {"accuracy": 0.99, "accuracy_low": 0.98, "accuracy_high": 1.0, "macro_f1": 0.99, "schema": 1}
    ledger.record(settings, ledger.Decision(ledger.Kind.RELEASE, version=1, metrics=metrics, checks=checks))
    serving_config.ensure(settings)


def make_runs(api_url: str) -> None:
    """A release that failed, and then one that completed with one task, as Prefect's API takes them from a flow."""
    with httpx.Client(base_url=api_url, timeout=HANG_S) as api:
        flow = api.post("/flows/", json={"name": "release"}).json()["id"]
        for state in ("FAILED", "COMPLETED"):
            run = api.post("/flow_runs/", json={"flow_id": flow, "state": {"type": "PENDING"}}).json()["id"]
            if state == "COMPLETED":
                task = {"flow_run_id": run, "task_key": "train", "dynamic_key": "0", "name": "train"}
                task_run = api.post("/task_runs/", json=task).json()["id"]
                set_states(api, f"/task_runs/{task_run}", "RUNNING", "COMPLETED")
            set_states(api, f"/flow_runs/{run}", "RUNNING", state)


def set_states(api: httpx.Client, path: str, *states: str) -> None:
    for state in states:
        answer = api.post(f"{path}/set_state", json={"state": {"type": state}, "force": True})
        assert answer.status_code in (200, 201), answer.text


@pytest.fixture(scope="module")
def prometheus(here: Here, exporter: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    targets = {"gateway": here.url.removeprefix("http://"), "pipeline": exporter}
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), targets)
    try:
        prometheus.wait_ready()
        send_traffic(here)
        prometheus.wait_for("count_over_time(digits_requests_total[5m]) > 1")
        send_traffic(here)
        prometheus.wait_for("rate(digits_requests_total[5m]) > 0")
        prometheus.wait_for("digits_ledger_up")
        yield prometheus
    finally:
        prometheus.stop()
