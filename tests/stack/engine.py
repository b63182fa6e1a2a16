"""Docker's engine, and starting it again where a test may."""

import os
import shlex
import subprocess
import time
from pathlib import Path

import psutil
import pytest

PID_FILE = Path("/var/run/docker.pid")
HANG_S = 300


def is_up() -> bool:
    """Whether an engine answers."""
    return subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=HANG_S).returncode == 0


def restart(command: str | None, ours: set[str]) -> None:
    """Stop the engine as a shutdown of the machine would, start it again, and wait until it answers.

    Args:
        command: What restarts it (``--restart-engine``). None: SIGTERM to dockerd and the same command line again,
            where no service manager looks after it and no containers but ours would feel it; else a skip.
        ours: Ids of the containers that may be stopped.
    """
    if command:
        subprocess.run(shlex.split(command), check=True, timeout=HANG_S)
    else:
        dockerd = _dockerd_of_nobody(ours)
        words, environment, log = dockerd.cmdline(), dockerd.environ(), Path(f"/proc/{dockerd.pid}/fd/1").resolve()
        dockerd.terminate()
        dockerd.wait(HANG_S)
        with (log if log.is_file() else Path(os.devnull)).open("ab") as sink:
            subprocess.Popen(
                words, env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
                start_new_session=True,
            )  # fmt: skip
    deadline = time.monotonic() + HANG_S
    while not is_up():
        assert time.monotonic() < deadline, "the engine did not come back"
        time.sleep(0.5)


def _dockerd_of_nobody(ours: set[str]) -> psutil.Process:
    """A dockerd that was started by hand and serves only us."""
    ask = "--restart-engine COMMAND says how (make stack-test ARGS='--restart-engine=\"systemctl restart docker\"')"
    running = subprocess.run(
        ["docker", "ps", "-q", "--no-trunc"], capture_output=True, text=True, check=True, timeout=HANG_S
    )
    if others := set(running.stdout.split()) - ours:
        pytest.skip(f"{len(others)} other containers run on this engine; {ask}")
    if Path("/run/systemd/system").exists() or not PID_FILE.is_file() or os.getuid() != 0:
        pytest.skip(f"the engine is not ours to stop; {ask}")
    dockerd = psutil.Process(int(PID_FILE.read_text()))
    assert dockerd.name() == "dockerd"
    return dockerd
