"""Commands that are watched, stopped in time, and never outlive who started them."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.processes import stream
from pipelines.stages import is_chatter
from tests.conftest import HANG_S, ROOT
from tests.pipelines.conftest import environment_for

PARENT = """
import sys
from pathlib import Path
from pipelines.processes import stream
stream(["bash", "-c", "sleep 3600 & echo $$ $! > pids; wait"], cwd=Path.cwd(), timeout_s=3600)
"""


def test_lines_and_exit_code_are_kept(tmp_path: Path) -> None:
    """From stdout and stderr, in order, without colours; of a redrawn progress bar only what it showed last."""
    heard: list[str] = []
    script = r"printf 'one\n\033[31mtwo\033[0m\n' ; printf '10%%\r50%%\r100%%\n' >&2; printf 'no end'; exit 7"
    done = stream(["bash", "-c", script], cwd=tmp_path, timeout_s=20, on_line=heard.append)
    assert heard == ["one", "two", "100%", "no end"]
    assert (done.returncode, done.timed_out, done.tail) == (7, False, ("one", "two", "100%", "no end"))


def test_command_that_takes_too_long_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    """Also when a child of it ignores being asked politely."""
    script = "(trap '' TERM HUP; echo $BASHPID > child; while :; do sleep 0.1; done) & wait"
    started = time.monotonic()
    done = stream(["bash", "-c", script], cwd=tmp_path, timeout_s=2)
    assert done.timed_out
    assert done.returncode == -signal.SIGTERM
    assert time.monotonic() - started < 20
    child = int((tmp_path / "child").read_text())
    assert gone(child)


def test_command_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    done = stream(["no-such-command"], cwd=tmp_path, timeout_s=20)
    assert done.returncode == 127
    assert done.tail == ("cannot start no-such-command: No such file or directory",)


@pytest.mark.parametrize("starter", [[], ["nohup"]], ids=["as it is", "under nohup"])
def test_killed_parent_takes_its_command_and_what_that_started_along(tmp_path: Path, starter: list[str]) -> None:
    """Kill -9 leaves no time to tidy up: the kernel does it, also where hang-ups were ignored."""
    parent = subprocess.Popen([*starter, sys.executable, "-c", PARENT], cwd=tmp_path, env=environment_for(ROOT))
    pids_file = tmp_path / "pids"
    deadline = time.monotonic() + HANG_S
    while not (pids_file.exists() and len(pids_file.read_text().split()) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int(word) for word in pids_file.read_text().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait(HANG_S)
    for pid in pids:
        assert gone(pid)


def test_progress_bar_lives_on_a_terminal_and_chatter_is_hidden(tmp_path: Path) -> None:
    """The command sees a terminal of the same width; its bytes pass as they come, but for the lines to hide."""
    script = r"""
    [ -t 1 ] && [ -t 2 ] && echo "terminal of $(stty size </dev/tty | cut -d' ' -f2)"
    echo "Running stage 'train':"; echo "> python -m training train"; printf '\r\033[2K 10%%'; printf '\r\033[2K 99%%\n'
    echo done
    """
    code = (
        "import sys; from pathlib import Path; from pipelines.processes import stream; from pipelines.stages import *\n"
        f"d = stream(['bash', '-c', {script!r}], cwd=Path.cwd(), timeout_s=20, terminal=sys.stderr, hide=is_chatter)\n"
        "sys.exit(d.tail[-1] != 'done')"
    )
    master, slave = pty.openpty()
    subprocess.run(["stty", "rows", "40", "cols", "133"], stdin=slave, check=True)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment_for(ROOT, TERM="xterm"), stderr=slave, stdin=slave
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(master)
    assert process.wait(HANG_S) == 0, shown
    text = shown.decode().replace("\r\r\n", "\n").replace("\r\n", "\n")
    assert text == "terminal of 133\n\r\x1b[2K 10%\r\x1b[2K 99%\ndone\n"


def test_what_dvc_says_at_every_stage_is_chatter_and_errors_are_not() -> None:
    """Hiding must never hide what went wrong."""
    hidden = [
        "Running stage 'train':",
        "> python -m training train",
        "Updating lock file 'dvc.lock'",
        "\tgit add dvc.lock",
    ]
    shown = ["ERROR: failed to reproduce 'train'", "error: the loss is not a number", "epoch 3/15 loss 0.1", ""]
    assert [line for line in [*hidden, *shown] if is_chatter(line)] == hidden


def gone(pid: int) -> bool:
    """Wait until it is."""
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False
