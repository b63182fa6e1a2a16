"""Make an approved candidate a served version: ``models/digits/<n>/``, whole or not at all.

The order is what makes it safe to be killed anywhere: everything is put together in ``.incoming-…`` (a name no server
looks at), loaded and queried there in a fresh process, written out to the disk, renamed to its number in one step, and
only then recorded as champion. The next run removes what was left of an unfinished one, and completes a missing record.
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from ruamel.yaml.error import YAMLError

from digits import contract
from digits.errors import DigitsError
from pipelines import versioning
from pipelines.candidate import Candidate, read_candidate
from pipelines.dataset import digest_of
from pipelines.disk import (
    copy_tree,
    disk_errors,
    fsync_folder,
    fsync_tree,
    read_yaml,
    write_json,
    write_json_atomically,
)
from pipelines.locks import only_one
from pipelines.processes import stream
from pipelines.settings import Settings

_INCOMING: Final = ".incoming-"
_PACKAGES: Final = ("tensorflow", "keras", "numpy", "dvc", "prefect", "great-expectations")


class PublishError(DigitsError):
    """The candidate could not be published; what is served is as it was."""

    code = "publish"


@dataclass(frozen=True)
class Version:
    """A published version: its number, folder and lineage (empty if it has none that can be read)."""

    number: int
    folder: Path
    lineage: dict[str, Any]

    @property
    def model_sha256(self) -> str | None:
        """The weights in it."""
        return self.lineage.get("model_sha256")


@dataclass(frozen=True)
class Published:
    """The outcome: the version, and whether this call made it."""

    version: Version
    new: bool


def newest_version(versions_dir: Path) -> Version | None:
    """The highest published version; None when there is none."""
    numbers = _version_numbers(versions_dir)
    if not numbers:
        return None
    folder = versions_dir / str(max(numbers))
    try:
        lineage = json.loads((folder / contract.LINEAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        lineage = {}
    return Version(max(numbers), folder, lineage if isinstance(lineage, dict) else {})


def publish(settings: Settings, *, tell: Callable[[str], None] = lambda _text: None) -> Published:
    """Publish the candidate under ``artifacts/``, unless the newest version holds these very weights already.

    Args:
        settings: where.
        tell: called with each line the check in a fresh process prints.

    Raises:
        Rejected: the gate did not approve it.
        CandidateError: there is none, or its parts do not belong together.
        PublishError: it does not load, or does not answer as the trained network did.
        DiskError: the store is full or cannot be written.
        Busy: another publisher is at work.
    """
    store = settings.versions_dir
    kept = "the version served now is untouched"
    with disk_errors("the new version", store, kept):
        store.mkdir(parents=True, exist_ok=True)
        with only_one(store / ".publish.lock", "publisher", settings.lock_timeout_s):
            _remove_unfinished(store)
            candidate = read_candidate(settings)
            newest = newest_version(store)
            if newest and newest.model_sha256 == candidate.model_sha256:
                record_champion(settings)
                return Published(newest, new=False)
            version = _publish_as(settings, candidate, newest, tell)
            record_champion(settings)
            return Published(version, new=True)


def record_champion(settings: Settings) -> bool:
    """Write the champion's record if it does not name the newest version, as after a crash between rename and record.

    Returns:
        Whether it had to be written.
    """
    newest = newest_version(settings.versions_dir)
    if newest is None or not newest.lineage:
        return False
    record = {
        "schema": 1,
        "version": newest.number,
        "model_sha256": newest.model_sha256,
        "path": _path_in_project(settings, newest.folder),
        "metrics": newest.lineage.get("metrics"),
        "test_sha256": (newest.lineage.get("metrics") or {}).get("test_sha256"),
        "published_at": newest.lineage.get("published_at"),
    }
    if champion_record(settings) == record:
        return False
    with disk_errors("the champion's record", settings.champion_file.parent, "the version itself is published"):
        write_json_atomically(settings.champion_file, record)
    return True


def champion_record(settings: Settings) -> dict[str, Any] | None:
    """The champion's record; None when there is none that can be read."""
    try:
        record = json.loads(settings.champion_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _publish_as(
    settings: Settings, candidate: Candidate, newest: Version | None, tell: Callable[[str], None]
) -> Version:
    store = settings.versions_dir
    number = newest.number + 1 if newest else 1
    incoming = store / f"{_INCOMING}{number}-{os.getpid()}"
    try:
        copy_tree(candidate.saved_model, incoming)
        _require_same_answers(settings, incoming, tell)
        lineage = _lineage(settings, candidate, incoming, number, newest)
        (incoming / contract.LINEAGE_FILE).parent.mkdir(exist_ok=True)
        write_json(incoming / contract.LINEAGE_FILE, lineage)
        fsync_tree(incoming)
        incoming.rename(store / str(number))
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    fsync_folder(store)
    return Version(number, store / str(number), lineage)


def _require_same_answers(settings: Settings, folder: Path, tell: Callable[[str], None]) -> None:
    """Load the copy that is to be served in a fresh process and compare its answers with the golden ones."""
    command = [sys.executable, "-m", "training", "verify", str(folder)]
    done = stream(command, cwd=settings.project, timeout_s=settings.verify_timeout_s, on_line=tell)
    if done.timed_out:
        raise PublishError(
            f"the candidate did not load and answer within {settings.verify_timeout_s:.0f} s: not published"
        )
    if done.returncode:
        said = done.tail[-1] if done.tail else f"exit code {done.returncode}"
        raise PublishError(f"the candidate did not pass its check in a fresh process ({said}): not published")


def _lineage(
    settings: Settings, candidate: Candidate, folder: Path, number: int, newest: Version | None
) -> dict[str, Any]:
    """Where this version comes from: enough to find its commit, data and parameters, and to check its files."""
    params = settings.project / "params.yaml"
    return {
        "schema": 1,
        "version": number,
        "previous_version": newest.number if newest else None,
        "published_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model_sha256": candidate.model_sha256,
        "git": _git_state(settings),
        "data_md5": versioning.data_hash(settings),
        "params_sha256": digest_of(params),
        "params": read_yaml(params),
        "stages": _stage_hashes(settings.project / "dvc.lock"),
        "metrics": candidate.metrics,
        "decision": candidate.decision,
        "files_sha256": {
            str(path.relative_to(folder)): digest_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
        "packages": _package_versions(),
        "python": sys.version.split()[0],
    }


def _git_state(settings: Settings) -> dict[str, Any]:
    """The commit, and which files differ from it. ``dvc.lock`` is left out: every training changes it."""

    def git(*words: str) -> str | None:
        if shutil.which("git") is None:
            return None
        done = subprocess.run(["git", *words], cwd=settings.project, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    changed = [line[3:] for line in (status or "").splitlines() if line[3:] != "dvc.lock"]
    return {
        "commit": commit.strip() if commit else settings.revision,
        "dirty": bool(changed),
        "changed_files": changed[:50],
    }


def _stage_hashes(lock_file: Path) -> dict[str, Any]:
    """For each stage, what DVC recorded of its dependencies and outputs: path -> MD5."""
    try:
        stages = read_yaml(lock_file)["stages"]
    except (OSError, YAMLError, KeyError, TypeError):
        return {}
    return {
        name: {part: {item["path"]: item.get("md5") for item in stage.get(part, [])} for part in ("deps", "outs")}
        for name, stage in stages.items()
    }


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _version_numbers(versions_dir: Path) -> list[int]:
    try:
        return [int(path.name) for path in versions_dir.iterdir() if path.name.isdecimal() and path.is_dir()]
    except FileNotFoundError:
        return []


def _remove_unfinished(store: Path) -> None:
    for leftover in store.glob(f"{_INCOMING}*"):
        shutil.rmtree(leftover)


def _path_in_project(settings: Settings, folder: Path) -> str:
    """Relative to the project where it lies inside, so that the record survives a move of the whole folder."""
    project = settings.project.absolute()
    return str(folder.relative_to(project)) if folder.is_relative_to(project) else str(folder)
