"""What happens when a process dies, a port is taken, a folder cannot be written, a Python is wrong."""

import contextlib
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import HANG_S, HTTP, ROOT, running_below
from tests.ports import free_ports
from tests.stack.conftest import Stack, run_environment, tail
from tests.stack.test_bad_requests import drawn_seven, encode


def child_running(stack: Stack, module: str) -> psutil.Process:
    """The stack's own process that runs ``module``."""
    for process, command in running_below(stack.process.pid):
        if f"-m {module}" in command and Path(command.split()[0]).name.startswith("python"):
            return process
    pytest.fail(f"no process of the stack runs {module}:\n{tail(stack.log)}")


def wait_for_seven(stack: Stack, limit_s: float = HANG_S) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            answer = HTTP.post(stack.rest_url + "/classify", content=encode(drawn_seven()))
            if answer.status_code == 200:
                assert answer.json()["digit"] == 7
                return
        time.sleep(0.2)
    pytest.fail(f"no answer within {limit_s} s:\n{tail(stack.log)}")


def test_a_killed_gateway_is_started_again(stack: Stack) -> None:
    """Kill -9 of the gateway: another takes its place and answers."""
    before = child_running(stack, "serving.gateway")
    before.kill()
    before.wait(HANG_S)
    wait_for_seven(stack)
    assert child_running(stack, "serving.gateway").pid != before.pid


def test_a_killed_model_server_is_a_clean_error_and_comes_back(stack: Stack) -> None:
    """Kill -9 of the model server: callers get 503 or 504 with a code, and it comes back by itself."""
    before = child_running(stack, "serving.model_server")
    before.kill()
    before.wait(HANG_S)
    seen = set()
    for _ in range(20):
        answer = HTTP.post(stack.rest_url + "/classify", content=encode(drawn_seven()))
        seen.add(answer.status_code)
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] in {"model_unavailable", "deadline_exceeded", "overloaded"}
            break
    assert seen <= {200, 503, 504}
    assert 503 in seen or 504 in seen
    wait_for_seven(stack)
    stack.wait_until_ready()


def test_the_gateway_process_holds_no_tensorflow(stack: Stack) -> None:
    """The running gateway has not mapped TensorFlow's library; with its real upstream it stays under 120 MB."""
    gateway = child_running(stack, "serving.gateway")
    assert not any("tensorflow" in Path(m.path).name.lower() for m in gateway.memory_maps())
    assert gateway.memory_info().rss < 120e6


@pytest.mark.parametrize("setting", ["DIGITS_REST_PORT", "DIGITS_GRPC_PORT", "DIGITS_MODEL_SERVER_PORT"])
def test_a_port_in_use_is_one_line_and_stops(raw_data: Path, setting: str) -> None:
    """`make run` with a taken port names the port and the setting that moves it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = run_environment(free_ports(4)) | {setting: str(port)}
        run = subprocess.run(
            [sys.executable, "-m", "pipelines", "run"], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=HANG_S,
        )  # fmt: skip
    assert run.returncode not in (0, None)
    (line,) = run.stderr.strip().splitlines()
    assert str(port) in line
    assert setting in line


def test_an_unwritable_folder_is_one_line_and_stops(raw_data: Path) -> None:
    """A model folder nobody can write (not even root: /proc) is named, with the setting that moves it."""
    environment = run_environment(free_ports(4)) | {"DIGITS_MODELS_DIR": "/proc/models"}
    run = subprocess.run(
        [sys.executable, "-m", "pipelines", "run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert run.returncode not in (0, None)
    (line,) = run.stderr.strip().splitlines()
    assert "/proc/models" in line
    assert "DIGITS_MODELS_DIR" in line


@pytest.mark.parametrize("version", ["3.9", "3.10", "2.7"])
def test_a_wrong_python_is_one_line_and_stops(tmp_path: Path, version: str) -> None:
    """`make run PYTHON=…` with a Python that is too old names both versions and installs nothing."""
    old = tmp_path / "python"
    old.write_text(f"#!/bin/sh\necho {version}\n")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    run = subprocess.run(
        ["requirements/install", str(old), str(tmp_path / "venv")], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode != 0
    (line,) = run.stderr.strip().splitlines()
    assert version in line
    assert "3.11" in line
    assert not (tmp_path / "venv").exists()


def test_no_python_at_all_is_one_line_and_stops(tmp_path: Path) -> None:
    """A PYTHON that does not exist is named."""
    run = subprocess.run(
        ["requirements/install", "/nowhere/python3", str(tmp_path / "venv")], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode != 0
    (line,) = run.stderr.strip().splitlines()
    assert "/nowhere/python3" in line
