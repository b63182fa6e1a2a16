"""The candidate is served for a moment, by a real server in a process of its own, and nothing of that is left."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import HANG_S, ROOT, running_below
from training import probe
from training.workspace import import_tensorflow_quietly


@pytest.fixture(scope="module", autouse=True)
def tensorflow() -> Any:
    import_tensorflow_quietly()


def test_a_version_that_does_not_load_fails_with_the_servers_words(tmp_path: Path) -> None:
    """And the server is gone."""
    (tmp_path / "digits" / "1").mkdir(parents=True)
    (tmp_path / "digits" / "1" / "saved_model.pb").write_bytes(b"no graph")
    with pytest.raises(probe.ProbeFailed, match=r"did not load the candidate: .*digits has no loaded version"):  # noqa: SIM117
        with probe._model_server(tmp_path) as server:
            server.load(tmp_path / "digits")
    assert not [line for _, line in running_below(psutil.Process().pid) if str(tmp_path) in line]


def test_a_server_that_does_not_start_fails_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its code is not installed."""
    monkeypatch.setattr(probe, "_CODE", tmp_path)
    with pytest.raises(probe.ProbeFailed, match=r"ended at once: .*No module named"):  # noqa: SIM117
        with probe._model_server(tmp_path) as server:
            server.load(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a child with its parent")
def test_the_server_does_not_outlive_a_probe_that_is_killed(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from training import probe
        with probe._model_server(Path({str(tmp_path)!r})) as server:
            print(server._process.pid, flush=True)
            input()
        """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    server = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait(HANG_S)
    server.wait(HANG_S)
    parent.stdout.close()
