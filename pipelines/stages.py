"""Run DVC's stages one by one as ``dvc repro`` would, and say in one line how each ended."""

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from digits.errors import DigitsError
from pipelines import versioning
from pipelines.processes import Command, Finished
from pipelines.settings import Settings

GATE: Final = "gate"
"""The stage that judges. After it, a rejected candidate goes no further."""

_WAITING_DVC: Final = Path(__file__).with_name("waiting_dvc.py")
"""The script that imports DVC and waits for a stage's name."""

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


class Stages:
    """Brings stages of dvc.yaml up to date, as ``dvc repro --single-item`` does. A context manager.

    Whether a stage is up to date is asked of DVC in this process, which takes a tenth of a second. One that is not runs
    in a DVC of its own, in a process that can be stopped. That process is started one stage ahead, so that it has
    imported DVC by the time its stage is due.
    """

    def __init__(self, settings: Settings, terminal: TextIO | None = None) -> None:
        """``terminal``: where a stage's output goes as it comes, progress bar and all."""
        self._settings, self._terminal = settings, terminal
        self._spare: Command | None = None
        self._unchanged: set[str] = set()

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        if self._spare is not None:
            self._spare.stop()

    def look_ahead(self, names: Sequence[str]) -> None:
        """Ask DVC about all of these stages at once. An answer is used once, and none outlives a stage that runs.

        Raises:
            StageBusy: another DVC command is at work.
        """
        try:
            self._unchanged = set(versioning.unchanged_stages(self._settings, names))
        except versioning.Locked as err:
            raise StageBusy(f"stage {names[0]}: {err}") from err

    def bring_up_to_date(
        self,
        name: str,
        *,
        on_start: Callable[[], None] = lambda: None,
        on_line: Callable[[str], None] = lambda _line: None,
    ) -> StageReport:
        """See that a stage's outputs are what its dependencies give.

        Args:
            name: the stage.
            on_start: called when it is not up to date and begins.
            on_line: called with each line the stage prints.

        Raises:
            StageBusy: another DVC command is at work.
            StageFailed: it failed or took too long.
        """
        started = time.monotonic()
        if name not in self._unchanged:
            self.look_ahead([name])
        changed = name not in self._unchanged
        self._unchanged.discard(name)
        ran = changed and self._repro(name, on_start, on_line)
        return StageReport(name, ran, time.monotonic() - started)

    def _repro(self, name: str, on_start: Callable[[], None], on_line: Callable[[str], None]) -> bool:
        """Whether the stage ran, or else was found in the run cache."""
        ran = False

        def hear(line: str) -> None:
            nonlocal ran
            if line.startswith("Running stage '"):
                ran = True
                on_start()
            elif not is_chatter(line):
                on_line(line)

        timeout_s = self._settings.stage_timeout_s
        with self._spare or self._start() as dvc:
            self._spare = self._start()
            dvc.tell(name)
            done = dvc.follow(timeout_s=timeout_s, on_line=hear, hide=is_chatter)
        if done.timed_out:
            raise StageFailed(f"stage {name} was stopped: not done within {timeout_s:.0f} s")
        if done.returncode:
            raise _failure(name, done)
        return ran

    def _start(self) -> Command:
        return Command(
            [sys.executable, "-P", str(_WAITING_DVC)],
            cwd=self._settings.project,
            env=_environment(),
            terminal=self._terminal,
            listens=True,
        )


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
