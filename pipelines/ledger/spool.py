"""Decisions on their way into the ledger: each is a file, on the disk, before the database is asked to take it.

A database that is away stops nothing and undoes nothing: what was decided waits here, in order, and the next command
delivers it. Taken twice, as after a kill between the two steps, it is in the ledger once: its id is unique there.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipelines.disk import write_json_atomically
from pipelines.ledger import database
from pipelines.ledger.database import LedgerError
from pipelines.ledger.decision import Decision
from pipelines.locks import Busy, only_one
from pipelines.settings import Settings

_WAIT_S = 10.0
"""For another process that delivers at the moment."""


def record(settings: Settings, decision: Decision, *, tell: Callable[[str], None] = lambda _text: None) -> bool:
    """Put a decision into the ledger. It never raises for want of a database or of space.

    Args:
        settings: where.
        decision: the row.
        tell: called with one line when it is not in the ledger yet.

    Returns:
        Whether it is kept: in the ledger, or on the disk until the ledger is back.
    """
    folder = spool_dir(settings)
    try:
        with _spool_alone(settings):
            number = max((int(path.name.partition("-")[0]) for path in _files(folder)), default=0) + 1
            write_json_atomically(folder / f"{number:08d}-{decision.id}.json", decision.as_json())
    except (OSError, Busy) as err:
        tell(f"the ledger's spool {folder} cannot be written ({err}): {decision.kind} not recorded yet")
        return False
    deliver(settings, tell=tell)
    return True


def deliver(
    settings: Settings, also: Sequence[Decision] = (), *, tell: Callable[[str], None] = lambda _text: None
) -> bool:
    """Bring what waits into the ledger, oldest first.

    Args:
        settings: where.
        also: decisions that can be read elsewhere at any time; added after those that wait, if they are missing.
        tell: called with one line when the ledger is away, or when something waited and arrived now.

    Returns:
        Whether all is in the ledger.
    """
    if not also and not waiting(settings):
        return True
    try:
        with only_one(settings.run_dir / "ledger.lock", "writer of the ledger", _WAIT_S):
            with _spool_alone(settings):
                files = _readable(settings, tell)
            database.append(settings, [*files.values(), *also])
            for path in files:
                path.unlink()
    except (LedgerError, Busy, OSError) as err:
        count = len(waiting(settings))
        rows = "1 decision waits" if count == 1 else f"{count} decisions wait"
        tell(f"the ledger is away ({err}). {rows} in {spool_dir(settings)}; the next command delivers them")
        return False
    if len(files) > 1:
        tell(f"{len(files)} decisions that waited are in the ledger now")
    return True


def waiting(settings: Settings) -> list[Path]:
    """The files of the decisions that the ledger has not taken yet, oldest first."""
    return _files(spool_dir(settings))


def spool_dir(settings: Settings) -> Path:
    """Where they wait."""
    return settings.run_dir / "ledger-spool"


@contextlib.contextmanager
def _spool_alone(settings: Settings) -> Iterator[None]:
    """Nobody else adds meanwhile, so what is half-written there is of one who was killed: it goes."""
    with only_one(settings.run_dir / "ledger-spool.lock", "writer of the ledger's spool", _WAIT_S):
        for part in spool_dir(settings).glob(".*.part"):
            part.unlink()
        yield


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.name[:1].isdecimal())


def _readable(settings: Settings, tell: Callable[[str], None]) -> dict[Path, Decision]:
    """What waits. A file that the disk has damaged is put aside by another name, so that it holds up no other."""
    found = {}
    for path in waiting(settings):
        try:
            found[path] = Decision.from_json(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as err:
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            tell(f"{aside} holds no decision that can be read ({err}); put aside")
    return found
