"""The container stack for real: build the images, bring docker-compose.yml up on empty volumes, hurt it, take it down.

Run by `make stack-test`, never by `make test`: it needs Docker, trains once and takes minutes. The tests of this file
build on each other, in order.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.client import GrpcClient, RestClient
from tests.conftest import ROOT, clean_environment, copy_checkout
from tests.stack.conftest import free_ports

HANG_S = 1500  # a hang's limit, not a claim about speed
IMAGES = ("gateway", "model-server", "pipeline")
BASE = "python:3.11-slim-bookworm"
SERVICES = ("postgres", "prefect-server", "pipeline", "model-server", "gateway", "pipeline-metrics", "prometheus")
"""Those with a health check. Left out: Grafana, whose dashboards' queries are tried in tests/monitoring."""

UP = ("up", "--detach", *SERVICES, "alertmanager")

PORTS = {
    "gateway": {"8080/tcp", "50051/tcp"},
    "prefect-server": {"4200/tcp"},
    "prometheus": {"9090/tcp"},
}

pytestmark = pytest.mark.timeout(HANG_S)


def docker(*words: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False, timeout=HANG_S)
    if check and done.returncode:
        pytest.fail(f"docker {' '.join(words)}: {done.stderr}")
    return done.stdout.strip()


class Compose:
    """The stack under a name and on ports of its own, so that one that runs already is not touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"digits-test-{os.getpid()}"
        self.tag = self.name
        rest, grpc, prometheus, prefect, alertmanager = free_ports(5)
        self.rest_url, self.grpc_address = f"http://127.0.0.1:{rest}", f"127.0.0.1:{grpc}"
        self.prometheus_url = f"http://127.0.0.1:{prometheus}"
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        self.revision = revision.stdout.strip()
        self._environment = clean_environment(
            DIGITS_TAG=self.tag,
            DIGITS_REST_PORT=str(rest),
            DIGITS_GRPC_PORT=str(grpc),
            DIGITS_PROMETHEUS_PORT=str(prometheus),
            DIGITS_PREFECT_PORT=str(prefect),
            DIGITS_ALERTMANAGER_PORT=str(alertmanager),
            REVISION=self.revision,
        )
        second = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
        self._command = [*(["docker", "compose"] if second else ["docker-compose"]), "--project-name", self.name]
        self._command += ["--profile", "embedded", "--profile", "monitoring"]

    def __call__(self, *words: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*self._command, *words], cwd=self.folder, env=self._environment, capture_output=True, text=True,
            check=False, timeout=HANG_S,
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"compose {' '.join(words)}: {done.stderr[-3000:]}\n{self.logs()}")
        return done

    def logs(self) -> str:
        done = subprocess.run(
            [*self._command, "logs", "--no-color", "--tail", "30"], cwd=self.folder, env=self._environment,
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return done.stdout

    def image(self, name: str) -> str:
        return f"digits-{name}:{self.tag}"

    def state(self, service: str) -> dict[str, Any]:
        """Docker's word on the service's container: Id, State (Pid, Running, Health), RestartCount."""
        label = f"label=com.docker.compose.project={self.name}"
        container = docker("ps", "-aq", "--filter", label, "--filter", f"label=com.docker.compose.service={service}")
        return json.loads(docker("inspect", container))[0]

    def wait_until_healthy(self, service: str, limit_s: float = HANG_S) -> None:
        deadline = time.monotonic() + limit_s
        while (state := self.state(service))["State"].get("Health", {}).get("Status") != "healthy":
            assert time.monotonic() < deadline, f"{service}: {state['State']}\n{self.logs()}"
            time.sleep(0.5)

    def wait_until_scheduled(self, limit_s: float = HANG_S) -> None:
        """Until the pipeline has said, since its container was last started, when it will release."""
        deadline = time.monotonic() + limit_s
        while True:
            state = self.state("pipeline")
            if "releases at" in docker("logs", "--since", state["State"]["StartedAt"], state["Id"]):
                return
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.5)

    def left_over(self) -> list[str]:
        """Containers, volumes, networks and images of ours that are still there."""
        label = f"label=com.docker.compose.project={self.name}"
        found = docker("ps", "-aq", "--filter", label) + docker("volume", "ls", "-q", "--filter", label)
        found += docker("network", "ls", "-q", "--filter", label)
        return (found + docker("images", "-q", "--filter", f"reference=digits-*:{self.tag}")).split()

    def clean_up(self) -> None:
        self("down", "--volumes", "--remove-orphans", "--timeout", "30")
        for name in IMAGES:
            docker("rmi", "--force", self.image(name), check=False)


@pytest.fixture(scope="module")
def compose(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    if not request.config.getoption("--stack"):
        pytest.skip("needs Docker and minutes: run with --stack (make stack-test)")
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.fail("--stack was given, and no Docker engine answers")
    compose = Compose(copy_checkout(tmp_path_factory.mktemp("checkout")))
    try:
        compose("build")
        yield compose
    finally:
        compose.clean_up()


def size(image: str) -> int:
    return int(docker("inspect", "--format", "{{.Size}}", image))


def seven() -> bytes:
    return (ROOT / "docs" / "seven.png").read_bytes()


def test_the_gateway_image_is_small_and_holds_only_its_own(compose: Compose) -> None:
    """At most 250 MB over its base; no TensorFlow, training or pipelines in it."""
    assert size(compose.image("gateway")) - size(BASE) <= 250e6
    names = docker("run", "--rm", "--entrypoint", "python", compose.image("gateway"), "-c",
                   "import os; print(os.listdir('/app'), os.listdir('/app/serving'))")  # fmt: skip
    assert "model_server" not in names
    for package in ("training", "pipelines", "tensorflow"):
        code = f"import importlib.util; print(importlib.util.find_spec('{package}'))"
        assert docker("run", "--rm", "--entrypoint", "python", compose.image("gateway"), "-c", code) == "None"


@pytest.mark.parametrize("name", IMAGES)
def test_images_run_as_nobody_special_and_say_what_they_are(compose: Compose, name: str) -> None:
    """A numeric user (so that a cluster can check it), labels, exec-form entrypoint, a health check."""
    config = json.loads(docker("inspect", compose.image(name)))[0]["Config"]
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.revision"] == compose.revision
    assert config["Labels"]["org.opencontainers.image.version"]
    assert config["Entrypoint"][0] == "python"
    assert config["Healthcheck"]["Test"][0] == "CMD"


@pytest.mark.parametrize(
    ("name", "options", "arguments", "line"),
    [
        ("gateway", ["--env", "DIGITS_REST_PORT=many"], [], "DIGITS_REST_PORT='many'"),
        ("gateway", ["--env", "DIGITS_UPSTREAM=nowhere"], [], "DIGITS_UPSTREAM='nowhere'"),
        ("model-server", [], ["--no_such_flag"], "--no_such_flag"),
        ("pipeline", ["--user", "12345"], ["release"], "must be writable for user 12345"),
        ("pipeline", ["--user", "12345"], ["make-secrets", "/run/secrets/digits/a"], "must be writable"),
        ("pipeline", ["--env", "PREFECT_SERVER_DATABASE_PASSWORD_FILE=/run/none"], ["prefect-server"], "/run/none"),
        ("pipeline", ["--env", "PREFECT_SERVER_DATABASE_HOST=127.0.0.1"], ["prefect-server"], "127.0.0.1:5432"),
        ("model-server", [], ["--model_config_file=/models/none.config"], "/models/none.config"),
        ("pipeline", [], ["schedule", "--cron", "sometimes"], "cron"),
    ],
)
def test_a_bad_configuration_is_one_line_and_an_exit_code(
    compose: Compose, name: str, options: list[str], arguments: list[str], line: str
) -> None:
    """A container that cannot work says why in one line and does not linger."""
    command = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", *options, compose.image(name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode in (1, 2)
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_the_first_up_on_empty_volumes_ends_in_answers_over_both_protocols(compose: Compose) -> None:
    """`up` fetches, trains, publishes and serves without a hand."""
    compose(*UP)
    for service in SERVICES:
        compose.wait_until_healthy(service)
    with RestClient(compose.rest_url) as rest, GrpcClient(compose.grpc_address) as grpc:
        for client in (rest, grpc):
            reading = client.classify(seven())
            assert (reading.digit, reading.model_version) == (7, "1")


def test_only_the_ports_people_need_are_open_and_only_on_this_machine(compose: Compose) -> None:
    """The gateway's two and the pages of Prefect and Prometheus; the others stay inside."""
    for service in SERVICES:
        bindings = compose.state(service)["NetworkSettings"]["Ports"] or {}
        open_ports = {port: hosts for port, hosts in bindings.items() if hosts}
        assert set(open_ports) == PORTS.get(service, set())
        assert all(host["HostIp"] == "127.0.0.1" for hosts in open_ports.values() for host in hosts)


def test_the_lineage_names_the_commit_that_the_image_was_built_from(compose: Compose) -> None:
    """There is no git in the image; the build says which commit it is."""
    lineage = compose("exec", "-T", "pipeline", "python", "-c",
                      "print(open('/project/models/digits/1/assets.extra/lineage.json').read())")  # fmt: skip
    assert json.loads(lineage.stdout)["git"]["commit"] == compose.revision


def test_a_release_on_demand_finds_all_up_to_date(compose: Compose) -> None:
    """Beside the schedule, in its container: nothing is trained or published twice."""
    done = compose("exec", "-T", "pipeline", "python", "/usr/local/lib/digits/pipeline.py", "release")
    assert "version 1 already published" in done.stdout


def test_prometheus_sees_the_gateway_and_its_rules_are_well(compose: Compose) -> None:
    """Scraped by service name; each rule evaluates."""
    deadline = time.monotonic() + 60
    while True:
        answer = httpx.get(f"{compose.prometheus_url}/api/v1/query", params={"query": 'up{job="gateway"}'}).json()
        if [series["value"][1] for series in answer["data"]["result"]] == ["1"]:
            break
        assert time.monotonic() < deadline, answer
        time.sleep(1)
    groups = httpx.get(f"{compose.prometheus_url}/api/v1/rules").json()["data"]["groups"]
    assert groups
    assert not [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]


def test_prometheus_sees_every_part(compose: Compose) -> None:
    """Both servers, the pipelines' exporter with ledger and Prefect, Prefect itself, Prometheus."""
    wanted = {"gateway", "model-server", "pipeline", "prefect", "prometheus"}
    deadline = time.monotonic() + 120
    while True:
        up = {series["metric"]["job"]: series["value"][1] for series in query(compose, "up")}
        if up == dict.fromkeys(wanted, "1"):
            break
        assert time.monotonic() < deadline, up
        time.sleep(1)
    for metric in ("digits_ledger_up", "digits_prefect_up", "digits_promoted_version"):
        (series,) = query(compose, metric)
        assert series["value"][1] == "1", metric


def query(compose: Compose, expression: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{compose.prometheus_url}/api/v1/query", params={"query": expression}, timeout=10)
    return answer.json()["data"]["result"]


def test_no_password_is_in_an_environment_or_an_image(compose: Compose) -> None:
    """It is a file, of which only the readers know the place."""
    word = compose("exec", "-T", "postgres", "cat", "/run/secrets/digits/postgres_password").stdout.strip()
    assert len(word) == 48
    for service in SERVICES:
        assert word not in json.dumps(compose.state(service)["Config"])


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_comes_back(compose: Compose, service: str) -> None:
    """A kill -9 of the whole container; Docker starts it again, and answers come as before."""
    before = compose.state(service)
    os.kill(before["State"]["Pid"], signal.SIGKILL)
    deadline = time.monotonic() + HANG_S
    while compose.state(service)["RestartCount"] == before["RestartCount"]:
        assert time.monotonic() < deadline, f"{service} was not started again"
        time.sleep(0.2)
    compose.wait_until_healthy(service)
    with contextlib.suppress(httpx.TransportError):
        httpx.get(compose.rest_url + "/readyz", timeout=5)
    compose.wait_until_healthy("gateway")
    with RestClient(compose.rest_url) as rest:
        reading = rest.classify(seven())
    assert (reading.digit, reading.model_version) == (7, "1")


def test_a_stopped_stack_ends_in_order_and_starts_again_from_its_volumes(compose: Compose) -> None:
    """SIGTERM reaches each process: exit code 0, no kill. Nothing is trained again."""
    compose.wait_until_scheduled()
    compose("stop", "--timeout", "60")
    codes = {service: compose.state(service)["State"]["ExitCode"] for service in SERVICES}
    # uvicorn, under Prefect's server, shuts down and then ends by the signal that it got.
    assert codes == dict.fromkeys(SERVICES, 0) | {"prefect-server": 143}
    compose(*UP)
    compose.wait_until_healthy("gateway")
    with GrpcClient(compose.grpc_address) as grpc:
        assert grpc.classify(seven()).model_version == "1"


def test_down_leaves_nothing_behind(compose: Compose) -> None:
    """No container, volume, network or image of ours."""
    compose.clean_up()
    assert compose.left_over() == []
