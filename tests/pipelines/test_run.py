"""`make run`: what is in the way is said in one line, servers are kept running, and nothing stays behind."""

import configparser
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.dataset import DataError
from pipelines.run import model_server_command, supervisor_config, why_not_up_to_date
from pipelines.settings import Settings
from tests.conftest import HANG_S, HTTP
from tests.pipelines.conftest import environment_for, run
from tests.ports import free_port

# Servers that start at once, in place of ours: what is tried here is what keeps them running, not they.
GATEWAY = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/crash": os._exit(3)
        body = str(os.getpid()).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["DIGITS_REST_PORT"])), Handler).serve_forever()
"""
MODEL_SERVER = "import sys, time; print(*sys.argv[1:], flush=True); time.sleep(3600)"


@pytest.fixture
def served(released: Path) -> Path:
    """A project with one version published and quick servers of its own."""
    for name, code in (("", ""), ("gateway", GATEWAY), ("model_server", MODEL_SERVER)):
        package = released / "serving" / name
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(code)
    return released


def four_ports() -> dict[str, str]:
    """Settings with free ports."""
    names = ("REST_PORT", "GRPC_PORT", "MODEL_SERVER_PORT", "MODEL_SERVER_REST_PORT")
    return {f"DIGITS_{name}": str(free_port()) for name in names}


class Running:
    """`python -m pipelines run` in a session of its own, with what it has said so far."""

    def __init__(self, project: Path, *words: str) -> None:
        ports = four_ports()
        self.url = f"http://127.0.0.1:{ports['DIGITS_REST_PORT']}"
        self.said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "run", *words],
            cwd=project,
            env=environment_for(project, **ports),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(iter(self.process.stdout.readline, ""))

    def wait_for(self, words: str, limit_s: float = HANG_S) -> None:
        deadline = time.monotonic() + limit_s
        while not any(words in line for line in self.said):
            assert time.monotonic() < deadline, "".join(self.said)
            time.sleep(0.05)

    def everything(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]


@contextmanager
def running(project: Path, *words: str) -> Iterator[Running]:
    stack = Running(project, *words)
    started: list[psutil.Process] = []
    try:
        with suppress(psutil.Error):
            started = stack.everything()
        yield stack
    finally:
        with suppress(psutil.Error):
            started += stack.everything()
        for process in started:
            with suppress(psutil.Error):
                process.kill()


def test_serves_at_once_restarts_what_falls_over_and_stops_cleanly(served: Path) -> None:
    """Addresses are printed; a crash is told and mended; Ctrl-C ends with 0 and leaves no process."""
    with running(served, "--skip-release") as stack:
        stack.wait_for("Ctrl-C")
        assert any(
            re.search(rf"draw a digit +http://localhost:{stack.url.rpartition(':')[2]}/", line) for line in stack.said
        )
        before = HTTP.get(stack.url + "/readyz").text
        with suppress(httpx.TransportError):
            HTTP.get(stack.url + "/crash")
        stack.wait_for(
            "gateway stopped (exit status 3; not expected); starting it again. Its log: run/logs/gateway.log"
        )
        deadline = time.monotonic() + HANG_S
        after = before
        while after == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            with suppress(httpx.TransportError):
                after = HTTP.get(stack.url + "/readyz").text
        flags = (served / "run" / "logs" / "model-server.log").read_text()
        assert f"--model_config_file={served}/models/models.config --model_config_file_poll_wait_seconds=1" in flags
        processes = stack.everything()
        assert len(processes) == 4  # itself, supervisord, two servers
        stack.process.send_signal(signal.SIGINT)
        assert stack.process.wait(HANG_S) == 0
        assert psutil.wait_procs(processes, timeout=HANG_S)[1] == []


def test_stopped_while_its_servers_are_being_started_they_hear_of_it(served: Path) -> None:
    """None has to be killed after the time that a server may take to finish what it does."""
    with running(served, "--skip-release") as stack:
        stack.wait_for("starting the model server and the gateway")
        stack.process.send_signal(signal.SIGINT)
        assert stack.process.wait(HANG_S) == 0
    told = (served / "run" / "logs" / "supervisord.log").read_text()
    assert "stopped: gateway (terminated by SIGTERM)" in told
    assert "SIGKILL" not in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_it_leaves_no_process_behind(served: Path, number: signal.Signals) -> None:
    """However it ends, the next `make run` finds its ports free."""
    with running(served, "--skip-release") as stack:
        stack.wait_for("Ctrl-C")
        processes = stack.everything()
        assert len(processes) == 4
        stack.process.send_signal(number)
        stack.process.wait(HANG_S)
        assert psutil.wait_procs(processes, timeout=HANG_S)[1] == []


def test_server_that_never_starts_ends_it_with_the_servers_last_words_and_stops_the_release(served: Path) -> None:
    """Exit code 1 and one line. One need not wait for the training to hear of it; no process stays."""
    (served / "serving" / "gateway" / "__main__.py").write_text(
        "import sys; sys.exit('error: no such file: page.html')"
    )
    (served / "weights.txt").write_text("slow")  # for an hour
    with running(served) as stack:
        stack.wait_for("release: changed: evaluate")
        assert stack.process.wait(HANG_S) == 1
        stack.wait_for("error: a server stopped again and again")
        assert any("gateway: error: no such file: page.html" in line for line in stack.said)
        assert not any("Traceback" in line for line in stack.said)
        left = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(served)]
        assert psutil.wait_procs(left, timeout=HANG_S)[1] == []


def test_port_in_use_is_named_with_its_owner(served: Path) -> None:
    """Which port, whose it is, and the setting that changes it; exit code 1."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run(served, "pipelines", "run", **{**four_ports(), "DIGITS_GRPC_PORT": str(port)})
    assert done.returncode == 1
    expected = (
        rf"error: port {port} for the gateway's gRPC API is in use by process {os.getpid()} .*DIGITS_GRPC_PORT=…\n"
    )
    assert re.fullmatch(expected, done.stderr)


def test_one_port_for_two_servers_is_refused(served: Path) -> None:
    ports = four_ports()
    done = run(served, "pipelines", "run", **{**ports, "DIGITS_MODEL_SERVER_PORT": ports["DIGITS_REST_PORT"]})
    assert done.returncode == 1
    assert "is set for both the gateway's REST API and page and the model server's gRPC API" in done.stderr


def test_folder_that_cannot_be_written_is_named(served: Path) -> None:
    """Here a file lies where a folder must be."""
    shutil.rmtree(served / "run", ignore_errors=True)
    (served / "run").write_text("in the way")
    done = run(served, "pipelines", "run", **four_ports())
    assert done.returncode == 1
    assert re.fullmatch(rf"error: cannot write in {served}/run: .*\n", done.stderr)


def test_too_little_disk_is_said_before_anything_starts(served: Path) -> None:
    done = run(served, "pipelines", "run", DIGITS_MIN_FREE_MB="999999999", **four_ports())
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: only [\d,]+ MB of disk are free, 999,999,999 are needed\. Free some first\n", done.stderr
    )


def test_another_folder_is_no_project(tmp_path: Path) -> None:
    done = run(tmp_path, "pipelines", "run")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: expected data.dvc in {tmp_path}; it is not there.")


def test_what_makes_a_release_due(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, code, parameters, a missing version or record; not a rejection that was judged already."""
    settings = Settings(project=released)
    assert why_not_up_to_date(settings) is None
    (released / "accuracy.txt").write_text("0.5")
    assert why_not_up_to_date(settings) == "changed: evaluate"
    assert run(released, "dvc", "repro").returncode != 0  # the export refuses
    assert why_not_up_to_date(settings) is None

    record = released / "models" / "champion" / "champion.json"
    record.unlink()
    assert why_not_up_to_date(settings) == "changed: gate"
    shutil.move(released / "models" / "digits", released / "models" / "away")
    assert why_not_up_to_date(settings) == "nothing is published yet"
    (released / "data" / "labels").write_text("damaged")
    with pytest.raises(DataError, match="data/labels has MD5"):
        why_not_up_to_date(settings)
    shutil.rmtree(released / "data")
    assert why_not_up_to_date(settings) == "the raw data is not here yet"


def test_tensorflow_serving_is_used_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found on PATH; the flags are the same ones, but for the one with which it would serve less than ours does."""
    ours = model_server_command(Settings(project=tmp_path))
    assert ours[1:4] == ["-m", "serving.model_server", "--prefer_tflite_model=true"]
    binary = tmp_path / "tensorflow_model_server"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    theirs = model_server_command(Settings(project=tmp_path))
    assert theirs == [str(binary), *ours[4:]]


def test_odd_folder_names_survive_supervisords_configuration(tmp_path: Path) -> None:
    """Blanks, quotes, per cent signs and semicolons in a path are still that path."""
    project = tmp_path / "50% off; 'my' digits"
    parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    parser.read_string(supervisor_config(Settings(project=project)))
    command = shlex.split(parser["program:model-server"]["command"].replace("%%", "%"))
    assert f"--model_config_file={project}/models/models.config" in command
    assert parser["program:gateway"]["directory"].replace("%%", "%") == str(project)
