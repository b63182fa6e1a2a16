"""Backups of what cannot be made again: the release ledger, every row as a line of JSON, the same for SQLite and
PostgreSQL; and the record of looks at the test split.
"""

import datetime
import gzip
import json
from pathlib import Path
from typing import Final

from digits.errors import DigitsError
from pipelines import ledger
from pipelines.disk import disk_errors, fsync_folder
from pipelines.settings import Settings

_KEPT: Final = 14


class BadBackup(DigitsError):
    """A file that is no backup of the ledger, or is damaged."""

    code = "bad_backup"


def back_up(settings: Settings) -> tuple[Path, int]:
    """Write all of the ledger to ``run/backups/ledger-<UTC>.jsonl.gz``, and models/looks.jsonl to one beside it.

    The oldest beyond 14 of each are removed.

    Returns:
        The ledger's file, and how many rows are in it.

    Raises:
        LedgerAway: the database does not answer.
        DiskError: it cannot be written.
    """
    rows = [json.dumps(entry.as_json(), sort_keys=True) + "\n" for entry in ledger.read(settings)]
    content = "".join(rows).encode()
    folder = settings.run_dir / "backups"
    looks = settings.project / "models" / "looks.jsonl"
    now = datetime.datetime.now(datetime.UTC)
    with disk_errors("the backup", folder, "the ledger itself is untouched"):
        folder.mkdir(parents=True, exist_ok=True)
        path = _write(folder, "ledger", now, content)
        if looks.exists():
            _write(folder, "looks", now, looks.read_bytes())
        fsync_folder(folder)
    return path, len(rows)


def _write(folder: Path, name: str, now: datetime.datetime, content: bytes) -> Path:
    """A new file of one kind; the oldest of that kind go."""
    path = folder / f"{name}-{now:%Y%m%dT%H%M%S.%f}Z.jsonl.gz"
    part = path.with_name(f".{path.name}.part")
    try:
        with gzip.open(part, "wb") as stream:
            stream.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    for old in sorted(folder.glob(f"{name}-*.jsonl.gz"))[:-_KEPT]:
        old.unlink()
    return path


def restore(settings: Settings, path: Path) -> int:
    """Put a backup's rows into the ledger, in their order. Rows that are there already stay as they are.

    Returns:
        How many rows the backup has.

    Raises:
        BadBackup: it cannot be read whole; nothing was written.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            decisions = [ledger.Decision.from_json(json.loads(line)) for line in stream]
    except (OSError, EOFError, ValueError, TypeError) as err:
        raise BadBackup(f"expected a backup of the ledger (run/backups/ledger-….jsonl.gz); {path}: {err}") from err
    if not decisions:
        raise BadBackup(f"expected a backup of the ledger; {path} has no rows")
    for decision in decisions:
        ledger.record(settings, decision)
    return len(decisions)
