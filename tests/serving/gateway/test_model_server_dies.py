"""kill -9 of the model server under load, and its return: answers or clean errors in time, never a wrong digit."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port
from tests.serving.gateway.conftest import LoopThread, eventually
from tests.serving.gateway.load import CALL_S, Load
from tests.serving.gateway.test_process import ROOT, Process

BACK_S = 2.0
"""What is promised from the model server's return to the next answer."""

CLEAN = re.compile(r"(503|504|UNAVAILABLE|DEADLINE_EXCEEDED) (model_unavailable|deadline_exceeded)")


class ModelServer:
    """A model server process that can be killed and started again on its port."""

    def __init__(self, command: list[str], port: int, rest_port: int = 0) -> None:
        self.port = port
        self._command = command
        self._rest_port = rest_port
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait_until_back(self) -> float:
        """When it serves again, as it says itself: ``time.monotonic()`` seconds."""
        if self._rest_port:
            url = f"http://127.0.0.1:{self._rest_port}/v1/models/digits"
            eventually(lambda: "AVAILABLE" in _get(url), 120)
        else:
            eventually(lambda: _accepts(self.port), 60)
        return time.monotonic()


def _get(url: str) -> str:
    try:
        return httpx.get(url, timeout=2).text
    except httpx.TransportError:
        return ""


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def toy() -> Iterator[ModelServer]:
    """The server with a model one can check by hand."""
    port = free_port()
    server = ModelServer([sys.executable, "-m", "tests.serving.gateway.upstream_server", str(port), "0.002"], port)
    yield server
    server.kill()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[ModelServer]:
    """serving.model_server with a tiny model that answers its version, 7, to every image."""
    export = "import sys; from pathlib import Path; from tests.serving.model_server.conftest import export_tiny; "
    export += "export_tiny(Path(sys.argv[1]), 7)"
    subprocess.run([sys.executable, "-c", export, str(tmp_path / "7")], cwd=ROOT, check=True, capture_output=True)
    port, rest_port = free_port(), free_port()
    command = [
        sys.executable, "-m", "serving.model_server", f"--port={port}", f"--rest_api_port={rest_port}",
        "--model_name=digits", f"--model_base_path={tmp_path}",
    ]  # fmt: skip
    server = ModelServer(command, port, rest_port)
    server.wait_until_back()
    yield server
    server.kill()


def kill_and_return(
    server: ModelServer, thread: LoopThread, kills: int, away_s: float, digit: int | None = None
) -> tuple[Load, list[float]]:
    """What clients saw of so many kills, and the seconds from each return to the next good answer."""
    process = Process(f"127.0.0.1:{server.port}", DIGITS_TIMEOUT_S="5")
    backs = []
    try:
        process.wait_ready()
        with Load(thread, process.url, process.first["grpc"], rest=8, rpc=8, digit=digit) as load:
            for _ in range(kills):
                good = load.good
                eventually(lambda good=good: load.good > good + 300)
                server.kill()
                eventually(lambda: httpx.get(process.url + "/readyz").status_code == 503)
                time.sleep(away_s)
                server.start()
                back = server.wait_until_back()
                eventually(lambda back=back: load.last_good > back)
                backs.append(max(0.0, load.first_good_after(back) - back))
        assert httpx.get(process.url + "/healthz").status_code == 200
        text = httpx.get(process.url + "/metrics").text
        assert "digits_breaker_state 0.0" in text
    finally:
        process.popen.terminate()
        assert process.end() == 0
    return load, backs


def check(load: Load, backs: list[float]) -> None:
    assert load.bad, "the kill was not noticed"
    assert {one.how for one in load.bad if not CLEAN.fullmatch(one.how)} == set()
    assert (load.wrong, load.late) == (0, 0)
    assert max(one.took_s for one in load.bad) < CALL_S
    assert max(backs) < BACK_S


def test_killed_under_load_every_call_ends_cleanly_and_service_is_back_with_the_server(
    toy: ModelServer, thread: LoopThread
) -> None:
    """Three kills: 503 and 504, UNAVAILABLE and DEADLINE_EXCEEDED in time, no digit of another image, then answers."""
    load, backs = kill_and_return(toy, thread, kills=3, away_s=0.5)
    print(load.good, "good,", load.how_it_went(), "back after", [f"{one:.2f} s" for one in backs])
    check(load, backs)


@pytest.mark.slow
def test_the_real_model_server_killed_under_load(real: ModelServer, thread: LoopThread) -> None:
    """The same with serving.model_server, whose return takes as long as TensorFlow takes to load."""
    load, backs = kill_and_return(real, thread, kills=2, away_s=0.5, digit=7)
    print(load.good, "good,", load.how_it_went(), "back after", [f"{one:.2f} s" for one in backs])
    check(load, backs)
