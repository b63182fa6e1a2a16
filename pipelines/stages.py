"""Run one DVC stage as ``dvc repro`` would, and say in one line how it ended."""

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from digits.errors import DigitsError
from pipelines.processes import Finished, stream
from pipelines.settings import Settings

GATE: Final = "gate"
"""The stage that judges. After it, a rejected candidate goes no further."""

_DVC_CHATTER: Final = re.compile(
    r"Running stage '|> |Updating lock file|Generating lock file|To track the changes|\s*git add|To enable auto staging"
    r"|\s*dvc config|Use `dvc push`|Stage '.*' (is cached|didn't change)|'.*\.dvc' didn't change|Verifying data sources"
    r"|Data and pipelines are up to date"
)
_BUSY: Final = re.compile(r"Unable to acquire lock|is busy, it is being blocked by")
_KILLED: Final = re.compile(r"exited with (-\d+|137|143)\b")


class StageFailed(DigitsError):
    """A stage ended with an error; the message holds its own last line."""

    code = "stage_failed"


class StageBusy(StageFailed):
    """Another DVC command held the lock. Worth another try."""


class StageKilled(StageFailed):
    """The stage was ended by a signal, as when memory ran out. Worth another try."""


@dataclass(frozen=True)
class StageReport:
    """A stage that is up to date now: whether it had to run, and for how long."""

    name: str
    ran: bool
    duration_s: float


def is_chatter(line: str) -> bool:
    """Whether DVC says this at every stage, so that showing it would only bury what the stage says."""
    return bool(_DVC_CHATTER.match(line))


def run_stage(
    settings: Settings,
    name: str,
    *,
    on_start: Callable[[], None] = lambda: None,
    on_line: Callable[[str], None] = lambda _line: None,
    terminal: TextIO | None = None,
) -> StageReport:
    """Bring one stage of dvc.yaml up to date: ``dvc repro --single-item``.

    Args:
        settings: where, and how long it may take.
        name: the stage.
        on_start: called when it is not up to date and begins.
        on_line: called with each line the stage prints.
        terminal: where its output goes as it comes, progress bar and all.

    Raises:
        StageFailed: it failed or took too long.
    """
    started = time.monotonic()
    ran = False

    def hear(line: str) -> None:
        nonlocal ran
        if line.startswith("Running stage '"):
            ran = True
            on_start()
        elif not is_chatter(line):
            on_line(line)

    done = stream(
        [sys.executable, "-m", "dvc", "repro", "--single-item", name],
        cwd=settings.project,
        env=_environment(),
        timeout_s=settings.stage_timeout_s,
        on_line=hear,
        terminal=terminal,
        hide=is_chatter,
    )
    if done.timed_out:
        raise StageFailed(f"stage {name} was stopped: not done within {settings.stage_timeout_s:.0f} s")
    if done.returncode:
        raise _failure(name, done)
    return StageReport(name, ran, time.monotonic() - started)


def _environment() -> dict[str, str]:
    """Ours, with this very Python first: ``python`` in dvc.yaml must be the one that has the packages."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}


def _failure(name: str, done: Finished) -> StageFailed:
    text = "\n".join(done.tail)
    if _BUSY.search(text):
        return StageBusy(f"stage {name}: another DVC command is at work in this project; wait until it has finished")
    own = [line for line in done.tail if not is_chatter(line) and not line.startswith("ERROR: failed to reproduce")]
    last = own[-1].strip() if own else f"exit code {done.returncode}"
    kind = StageKilled if done.returncode < 0 or _KILLED.search(text) else StageFailed
    return kind(f"stage {name} failed: {last.removeprefix('error: ')}")
