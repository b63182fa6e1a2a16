"""Backups of the release ledger: every row as a line of JSON, the same for SQLite and PostgreSQL."""

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
    """Write all of the ledger to ``run/backups/ledger-<UTC>.jsonl.gz``; the oldest beyond 14 are removed.

    Returns:
        The file, and how many rows are in it.

    Raises:
        LedgerAway: the database does not answer.
        DiskError: it cannot be written.
    """
    rows = [entry.as_json() for entry in ledger.read(settings)]
    folder = settings.run_dir / "backups"
    now = datetime.datetime.now(datetime.UTC)
    path = folder / f"ledger-{now:%Y%m%dT%H%M%S.%f}Z.jsonl.gz"
    part = path.with_name(f".{path.name}.part")
    with disk_errors("the ledger's backup", folder, "the ledger itself is untouched"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with gzip.open(part, "wt", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        for old in sorted(folder.glob("ledger-*.jsonl.gz"))[:-_KEPT]:
            old.unlink()
        fsync_folder(folder)
    return path, len(rows)


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
