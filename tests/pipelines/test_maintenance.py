"""Maintenance: the ledger is backed up, and what nothing refers to goes; nothing that a version needs does."""

import gzip
import json
from pathlib import Path

import pytest

from pipelines import backup, ledger, versioning
from pipelines.locks import RELEASE_LOCK, only_one
from pipelines.promotion import promote
from pipelines.publish import publish
from pipelines.settings import Settings
from tests.pipelines.conftest import run

NOBODY = "http://127.0.0.1:9"
"""No model server is there."""


def new_data(settings: Settings, labels: str) -> str:
    """Data that data.dvc records and no commit does; the hash."""
    (settings.project / "data" / "labels").write_text(labels)
    with versioning.open_repo(settings) as repo:
        versioning.record_data(repo, replace=True)
    return versioning.data_hash(settings)


def cached(settings: Settings, value: str) -> list[Path]:
    """The objects of a data version in DVC's cache: the list of files, and the files."""
    cache = settings.project / ".dvc" / "cache" / "files" / "md5"
    listing = cache / value[:2] / value[2:]
    entries = json.loads(listing.read_text()) if listing.is_file() else []
    return [listing, *(cache / entry["md5"][:2] / entry["md5"][2:] for entry in entries)]


def test_maintenance_keeps_what_versions_need_and_its_backup_restores_the_ledger(
    candidate, toy: Path, prefect_url: str
) -> None:
    """Kept: data of a commit, of the workspace, and of a published version that neither has. Gone: data of none."""
    settings = Settings(project=toy, model_server_url=NOBODY)
    data = [versioning.data_hash(settings)]
    for weights, labels in (("first", "uncommitted"), ("second", "also uncommitted"), ("third", "in the workspace")):
        data.append(new_data(settings, labels))
        candidate(weights, 0.99)
        promote(settings, publish(settings).version.number)
    data.append(new_data(settings, "of no version"))
    new_data(settings, "in the workspace")
    objects = {value: cached(settings, value) for value in data}
    assert all(path.is_file() for paths in objects.values() for path in paths)

    looks = toy / "models" / "looks.jsonl"
    looks.write_text('{"why": "candidate"}\n')
    environment = {"PREFECT_API_URL": prefect_url, "DIGITS_MODEL_SERVER_URL": NOBODY}
    done = run(toy, "pipelines", "maintain", "--keep", "1", "--json", **environment)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["removed_versions"] == [1]
    assert sorted(outcome["kept_versions"]) == ["2", "3"]
    committed, first, second, workspace, none = (objects[value] for value in data)
    assert all(path.is_file() for path in (*committed, *second, *workspace))
    needed = {*committed, *second, *workspace}
    gone = {*first, *none} - needed
    assert len(gone) == 4  # each a list of files, and its labels; the images are the same in all
    assert not any(path.exists() for path in gone)
    assert outcome["removed_objects"] >= 4
    assert outcome["freed_bytes"] > 0
    assert run(toy, "dvc", "status", "--json", "data.dvc").stdout.strip() == "{}"

    rows = [entry.as_json() for entry in ledger.read(settings) if entry.decision.kind is not ledger.Kind.PRUNE]
    assert outcome["backup_rows"] == len(rows) == 6  # three releases, three promotions
    (toy / "run" / "ledger.sqlite").unlink()
    assert backup.restore(settings, Path(outcome["backup"])) == 6
    assert [entry.as_json() for entry in ledger.read(settings)] == rows
    backup.restore(settings, Path(outcome["backup"]))
    assert len(ledger.read(settings)) == 6
    (kept,) = (toy / "run" / "backups").glob("looks-*.jsonl.gz")
    assert gzip.decompress(kept.read_bytes()) == looks.read_bytes()


def test_maintenance_waits_for_no_release_but_is_refused_by_name(toy: Path) -> None:
    """Exit code 5, at once."""
    with only_one(toy / "run" / RELEASE_LOCK, "release"):
        done = run(toy, "pipelines", "maintain")
    assert done.returncode == 5
    assert "error: another release or maintenance (process" in done.stderr


@pytest.mark.parametrize("content", [b"", b"no gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00"])
def test_what_is_no_backup_is_refused(toy: Path, tmp_path: Path, content: bytes) -> None:
    """Also one that was cut off; nothing is written."""
    (tmp_path / "ledger.jsonl.gz").write_bytes(content)
    with pytest.raises(backup.BadBackup, match=r"expected a backup of the ledger"):
        backup.restore(Settings(project=toy), tmp_path / "ledger.jsonl.gz")
    assert not (toy / "run" / "ledger.sqlite").exists()
