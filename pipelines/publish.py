"""Make an approved candidate a served version: ``models/digits/<n>/``, whole or not at all.

The order is what makes it safe to be killed anywhere: everything is put together in ``.incoming-…`` (a name no server
looks at), loaded and queried there in a fresh process, written out to the disk, and renamed to its number in one step.
The next run removes what was left of an unfinished one, and completes the records of a finished one (recovery.py).
Published is not yet served by default: that is what promotion.py is for.
"""

import datetime
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from digits import contract
from digits.errors import DigitsError
from pipelines import ledger, serving_config
from pipelines.candidate import Candidate, read_candidate
from pipelines.champion import record_champion, served_version
from pipelines.dataset import digest_of
from pipelines.disk import copy_tree, disk_errors, fsync_folder, fsync_tree, write_json
from pipelines.lineage import files_digest, provenance
from pipelines.locks import only_one
from pipelines.processes import stream
from pipelines.settings import Settings
from pipelines.versions import Version, newest_version

PUBLISH_LOCK: Final = ".publish.lock"
"""In the folder of versions: one at a time adds or removes one."""

_INCOMING: Final = ".incoming-"


class PublishError(DigitsError):
    """The candidate could not be published; what is served is as it was."""

    code = "publish"


@dataclass(frozen=True)
class Published:
    """The outcome: the version, and whether this call made it."""

    version: Version
    new: bool


def publish(settings: Settings, *, tell: Callable[[str], None] = lambda _text: None) -> Published:
    """Publish the candidate under ``artifacts/``, unless a version that counts holds these very weights.

    Those are the served version, the newest one, and any that was rolled back: it must not come back by another number.

    Args:
        settings: where.
        tell: called with each line the check in a fresh process prints, and when the ledger cannot be reached.

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
        with only_one(store / PUBLISH_LOCK, "publisher", settings.lock_timeout_s):
            _remove_unfinished(store)
            candidate = read_candidate(settings)
            serving_config.ensure(settings)
            served, newest = served_version(settings), newest_version(store)
            for version in (served, newest, *serving_config.withdrawn_versions(settings)):
                if version and version.model_sha256 == candidate.model_sha256:
                    record_champion(settings)
                    return Published(version, new=False)
            version = _publish_as(settings, candidate, served, newest, tell)
            record_champion(settings)
    ledger.record(settings, ledger.release(version.lineage), tell=tell)
    return Published(version, new=True)


def _publish_as(
    settings: Settings,
    candidate: Candidate,
    served: Version | None,
    newest: Version | None,
    tell: Callable[[str], None],
) -> Version:
    store = settings.versions_dir
    number = newest.number + 1 if newest else 1
    incoming = store / f"{_INCOMING}{number}-{os.getpid()}"
    try:
        copy_tree(candidate.saved_model, incoming)
        _require_same_answers(settings, incoming, tell)
        lineage = _lineage(settings, candidate, incoming, number)
        lineage["previous_version"] = newest.number if newest else None
        lineage["served_version"] = served.number if served else None
        (incoming / contract.LINEAGE_FILE).parent.mkdir(exist_ok=True)
        write_json(incoming / contract.LINEAGE_FILE, lineage)
        fsync_tree(incoming)
        incoming.rename(store / str(number))
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    fsync_folder(store)
    return Version(number, store / str(number), lineage)


def _require_same_answers(settings: Settings, folder: Path, tell: Callable[[str], None]) -> None:
    """Ask the copy that is to be served before it gets its number."""
    if problem := why_not_verified(settings, folder, tell):
        raise PublishError(f"the candidate {problem}: not published")


def why_not_verified(settings: Settings, folder: Path, tell: Callable[[str], None]) -> str | None:
    """Load a version in a fresh process and compare its answers with the golden ones: what is wrong, or None."""
    command = [sys.executable, "-m", "training", "verify", str(folder)]
    done = stream(command, cwd=settings.project, timeout_s=settings.verify_timeout_s, on_line=tell)
    if done.timed_out:
        return f"did not load and answer within {settings.verify_timeout_s:.0f} s"
    if done.returncode:
        said = done.tail[-1] if done.tail else f"exit code {done.returncode}"
        return f"did not pass its check in a fresh process ({said})"
    return None


def _lineage(settings: Settings, candidate: Candidate, folder: Path, number: int) -> dict[str, Any]:
    """Where this version comes from: enough to find its commit, data and parameters, and to check its files."""
    files = {str(path.relative_to(folder)): digest_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        "schema": 1,
        "version": number,
        "published_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "published_by": ledger.author(),
        "model_sha256": candidate.model_sha256,
        **provenance(settings),
        "metrics": candidate.metrics,
        "decision": candidate.decision,
        "files_sha256": files,
        "saved_model_sha256": files_digest(files),
    }


def _remove_unfinished(store: Path) -> None:
    for leftover in store.glob(f"{_INCOMING}*"):
        shutil.rmtree(leftover)
