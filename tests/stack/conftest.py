"""One running stack for all tests here: what `make run` starts, in a fresh checkout, on free ports."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import HANG_S, HTTP, OUTPUT, clean_environment, copy_checkout
from tests.ports import free_ports

FIRST_ANSWER_S = 900  # a hang's limit, not a claim about speed: training shares two cores with the other tests


@dataclass
class Stack:
    """A running `python -m pipelines run` and where to reach it."""

    root: Path
    rest_url: str
    grpc_address: str
    model_server_grpc: str
    model_server_rest: str
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen = field(repr=False)

    @property
    def model_dir(self) -> Path:
        return self.root / "models" / "digits"

    @property
    def data_dir(self) -> Path:
        return self.root / "data"

    def wait_until_ready(self, limit_s: float = FIRST_ANSWER_S) -> dict:
        """The answer of /readyz once it is 200. Fails with the log's end when the stack ends or time is up."""
        return wait_until_ready(self.rest_url, self.process, self.log, limit_s)


def wait_until_ready(rest_url: str, process: subprocess.Popen, log: Path, limit_s: float) -> dict:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the stack ended with {process.returncode}:\n{tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            answer = HTTP.get(rest_url + "/readyz", timeout=5)
            if answer.status_code == 200:
                return answer.json()
        time.sleep(0.25)
    pytest.fail(f"the stack was not ready within {limit_s} s:\n{tail(log)}")


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def start_run(root: Path, environment: dict[str, str], log: Path) -> subprocess.Popen:
    """`python -m pipelines run` in ``root``, in a session of its own so that a test's Ctrl-C reaches only it."""
    with log.open("a") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", "run"],
            cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def stop_run(process: subprocess.Popen, limit_s: float = HANG_S) -> int:
    """Ctrl-C, as a person would; a kill only if that does not end it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def run_environment(ports: list[int]) -> dict[str, str]:
    rest, grpc, server_grpc, server_rest = ports
    return clean_environment(
        DIGITS_REST_PORT=str(rest),
        DIGITS_GRPC_PORT=str(grpc),
        DIGITS_MODEL_SERVER_PORT=str(server_grpc),
        DIGITS_MODEL_SERVER_REST_PORT=str(server_rest),
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )


def in_less_time(params: dict[str, Any]) -> None:
    """The quick profile with a shorter twin and fewer images to damage; test_quick_profile.py has these too."""
    params["twin"]["epochs"] = 1
    params["evaluate"] |= {"robustness_images": 500, "nondigit_images": 100}


@pytest.fixture(scope="session")
def stack(raw_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole path on the real 70,000 images, from a fresh checkout to a ready gateway."""
    root = copy_checkout(tmp_path_factory.mktemp("checkout"), in_less_time)
    ports = free_ports(4)
    environment = run_environment(ports)
    OUTPUT.mkdir(exist_ok=True)
    log = OUTPUT / "stack.log"
    log.unlink(missing_ok=True)
    rest, grpc, server_grpc, server_rest = ports
    process = start_run(root, environment, log)
    running = Stack(
        root=root,
        rest_url=f"http://127.0.0.1:{rest}",
        grpc_address=f"127.0.0.1:{grpc}",
        model_server_grpc=f"127.0.0.1:{server_grpc}",
        model_server_rest=f"http://127.0.0.1:{server_rest}",
        environment=environment,
        log=log,
        process=process,
    )
    try:
        running.wait_until_ready()
        yield running
    finally:
        stop_run(running.process)
