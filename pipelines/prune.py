"""Remove published versions that nobody needs; never one that is served, or that one would go back to."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipelines import ledger, serving_config
from pipelines.champion import champion_record
from pipelines.disk import disk_errors, fsync_folder
from pipelines.locks import only_one
from pipelines.publish import PUBLISH_LOCK
from pipelines.settings import Settings
from pipelines.versions import read_lineage, version_numbers

_PRUNED: Final = ".pruned-"
"""Decided; its row may still be missing from the ledger."""

_RECORDED: Final = ".removed-"


@dataclass(frozen=True)
class Pruned:
    """The outcome: the versions removed, and those kept, each with the reason."""

    removed: tuple[int, ...]
    kept: dict[int, str]


def prune(
    settings: Settings, keep: int, *, dry_run: bool = False, tell: Callable[[str], None] = lambda _text: None
) -> Pruned:
    """Remove all but the newest ``keep`` versions and those that are needed.

    A folder first gets a name that no server looks at, in one step; then the ledger gets its row, with the lineage;
    only then the files go. Killed between, the next run goes on from there.

    Args:
        settings: where.
        keep: how many of the newest stay in any case; at least 1: the highest number is never given twice.
        dry_run: only say what would go.
        tell: called with what a person should know.

    Raises:
        ValueError: ``keep`` is less than 1.
        Busy: a publisher or a promotion is at work.
        DiskError: the store cannot be written.
    """
    if keep < 1:
        raise ValueError(f"at least 1 version is kept; came {keep}")
    store = settings.versions_dir
    if not store.is_dir():
        return Pruned((), {})
    with (
        disk_errors("the removal of versions", store, "what is served is not touched by that"),
        only_one(store / PUBLISH_LOCK, "publisher", settings.lock_timeout_s),
        serving_config.only_writer(settings, settings.lock_timeout_s),
    ):
        kept = needed_versions(settings, keep)
        removed = tuple(number for number in version_numbers(store) if number not in kept)
        if not dry_run:
            for number in removed:
                lineage = read_lineage(store / str(number))
                (store / str(number)).rename(store / f"{_PRUNED}{number}")
                fsync_folder(store)
                if ledger.record(settings, ledger.prune(lineage, number), tell=tell):
                    _remove(store / f"{_PRUNED}{number}")
            _remove_recorded(store)
    return Pruned(removed, kept)


def needed_versions(settings: Settings, keep: int) -> dict[int, str]:
    """The versions that stay, and why."""
    numbers = version_numbers(settings.versions_dir)
    config = serving_config.read(settings)
    champion = (champion_record(settings) or {}).get("version")
    reasons = dict.fromkeys(numbers[-keep:], f"one of the newest {keep}" if keep > 1 else "the newest")
    if config is None or config.promoted is None:
        reasons |= dict.fromkeys(numbers[-1:], "served: the newest")
    else:
        reasons |= dict.fromkeys(config.versions, "loaded by the model server")
        reasons |= {config.predecessor: "the served one's predecessor"} if config.predecessor is not None else {}
        reasons[config.promoted] = "served"
    if champion in numbers and champion not in reasons:
        reasons[champion] = "the champion"
    return {number: reasons[number] for number in numbers if number in reasons}


def pruned_lineages(settings: Settings) -> Iterator[tuple[int, dict[str, Any]]]:
    """The versions whose removal has been decided and whose files are still there."""
    for folder in sorted(settings.versions_dir.glob(f"{_PRUNED}*")):
        number = folder.name.removeprefix(_PRUNED)
        if number.isdecimal():
            yield int(number), read_lineage(folder)


def remove_pruned(settings: Settings) -> None:
    """Remove the files of versions whose removal is recorded."""
    for folder in settings.versions_dir.glob(f"{_PRUNED}*"):
        _remove(folder)
    _remove_recorded(settings.versions_dir)


def _remove(folder: Path) -> None:
    """Under a third name, so that a folder whose lineage is already gone is not taken for one to be recorded."""
    recorded = folder.with_name(folder.name.replace(_PRUNED, _RECORDED))
    folder.rename(recorded)
    shutil.rmtree(recorded, ignore_errors=True)


def _remove_recorded(store: Path) -> None:
    for folder in store.glob(f"{_RECORDED}*"):
        shutil.rmtree(folder, ignore_errors=True)
