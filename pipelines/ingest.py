"""Get the raw files into ``data/``, verified, and into the DVC cache.

Sources in turn: what already lies in ``data/``, the DVC cache, a DVC remote where one is configured, then the public
ones of sources.py. A source writes into a folder of its own; only when every file there has the right SHA-256 are they
moved into ``data/``, each by an atomic rename. Killed at any moment, the next run starts clean.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from pipelines import additions, dvc_cache, versioning
from pipelines.dataset import (
    MNIST_DVC_HASH,
    RAW_FILES,
    TOTAL_BYTES,
    DataError,
    RawFile,
    check_folder,
    pinned_files,
    require_undamaged,
)
from pipelines.disk import disk_errors
from pipelines.locks import only_one
from pipelines.settings import Settings
from pipelines.sources import Attempt, Source, SourceFailed, public_sources


class NotThere(SourceFailed):
    """The source is in order and does not have the files: nothing to tell anyone about."""


@dataclass(frozen=True)
class Ingested:
    """What ingest did: where the files came from, and the data's hash as data.dvc records it."""

    source: str
    data_hash: str
    repaired: tuple[str, ...] = ()


def ingest(settings: Settings, *, repair: bool = True, tell: Callable[[str], None] = lambda _text: None) -> Ingested:
    """Make ``data/`` complete and right, and the DVC cache filled.

    Args:
        settings: where, and how long to try.
        repair: replace damaged files. False: they stop it, so that a changed file is never overwritten unasked.
        tell: called with a line for people about each source that failed.

    Raises:
        DataError: no source has the files. ``data/`` is as it was.
        DiskError: they cannot be stored.
        VersioningError: no git or DVC here, or data.dvc records something else.
    """
    with _at_work(settings, tell) as repo:
        return _ensure(settings, repo, repair, tell)


def add_batch(
    settings: Settings, path: Path, *, dry_run: bool = False, tell: Callable[[str], None] = lambda _text: None
) -> additions.Added:
    """Add a labelled batch to the training images: a new data version. The data there are must be as recorded.

    Args:
        settings: where.
        path: the batch: a folder, or an .npz.
        dry_run: only say what would be added.
        tell: called with a line for people.

    Raises:
        BadInput: the batch as a whole cannot be used. Nothing was changed.
        DataError, DiskError, VersioningError: as ``ingest``.
    """
    with _at_work(settings, tell) as repo, _counting_bar() as bar:
        _ensure(settings, repo, False, tell)
        return additions.add(
            settings,
            repo,
            path,
            dry_run=dry_run,
            on_picture=lambda done, total: bar("pictures read", done, total),
            on_compared=lambda done, total: bar("compared with the test images", done, total),
        )


@contextlib.contextmanager
def _at_work(settings: Settings, tell: Callable[[str], None]) -> Iterator[Any]:
    """The project under DVC, ours alone, and nothing half-done from a run that was cut off."""
    aftermath = f"data/ holds nothing half-written; about {3 * TOTAL_BYTES // 2**20} MB are needed"
    lock = only_one(settings.run_dir / "ingest.lock", "ingest", settings.lock_timeout_s)
    with disk_errors("the raw data", settings.project, aftermath), lock, versioning.open_repo(settings) as repo:
        if additions.complete(settings, repo):
            tell("a batch was being added when the last run was cut off: completed")
        yield repo


def _ensure(settings: Settings, repo: Any, repair: bool, tell: Callable[[str], None]) -> Ingested:
    with _counting_bar() as bar:
        mended = dvc_cache.mend(
            repo, everything=repair, on_checked=lambda done, total: bar("DVC cache: objects compared", done, total)
        )
    for line in mended:
        tell(line)
    source, state = "already here", check_folder(settings.data_dir, expected_files(settings, repo) or ())
    if not repair:
        require_undamaged(state)
    if not state.good or not settings.data_dir.is_dir():
        if state.damaged:
            tell(f"{state.describe_damage()}: getting it again")
        source = _fetch(settings, repo, tell)
    if versioning.record_data(repo, replace=repair and _holds_only_pinned_files(settings)):
        tell("data.dvc did not record these files; it does now")
    return Ingested(source, versioning.data_hash(settings), tuple(state.damaged))


def expected_files(settings: Settings, repo: Any) -> tuple[RawFile, ...] | None:
    """What ``data/`` must hold. None: data of one's own, and the list of its files is not in the DVC cache.

    What params.yaml names comes first, since ``dvc repro`` takes a damaged file for a new version and records it.
    """
    if pinned := pinned_files(settings.project / "params.yaml"):
        return pinned
    if versioning.recorded_data_hash(repo) in (None, MNIST_DVC_HASH):
        return RAW_FILES
    return versioning.recorded_data_files(repo)


def _holds_only_pinned_files(settings: Settings) -> bool:
    """Whether ``data/`` is known to be the meant data: whatever lies there is named in params.yaml."""
    pinned = {file.name for file in pinned_files(settings.project / "params.yaml")}
    folder = settings.data_dir
    return pinned == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _fetch(settings: Settings, repo: Any, tell: Callable[[str], None]) -> str:
    """Fill ``data/`` from the first source that works; its name."""
    failures = []
    is_public = set(expected_files(settings, repo) or ()) == set(RAW_FILES)
    public = public_sources(settings) if is_public else []
    with _incoming_folder(settings) as incoming, _progress_bar() as progress:
        for source in [*_dvc_sources(settings, repo), *public]:
            folder = incoming / "files"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            deadline = time.monotonic() + settings.source_timeout_s
            try:
                source.fetch(Attempt(folder, settings, progress, deadline=deadline))
                _move_into_place(folder, settings.data_dir, expected_files(settings, repo) or ())
            except SourceFailed as err:
                failures.append(f"{source.name}: {err}")
                if not isinstance(err, NotThere):
                    tell(failures[-1])
                continue
            return source.name
    mend = (
        "Check the network and the package index's settings, or put the files into data/ yourself"
        if public
        else "data.dvc records data of your own: push it to a DVC remote from where it is, or copy it into data/"
    )
    raise DataError(f"no source had the raw data ({'; '.join(failures)}). {mend}, and run this again")


def _dvc_sources(settings: Settings, repo: Any) -> list[Source]:
    """The DVC cache, and the DVC remote if there is one."""

    def from_cache(attempt: Attempt) -> None:
        cached, files = versioning.cached_data_files(repo), expected_files(settings, repo)
        if not files or not cached:
            raise NotThere("does not hold the list of files")
        for file in files:
            if file.name not in cached or not cached[file.name].is_file():
                raise NotThere(f"does not hold {file.name}")
            (attempt.folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cached[file.name], attempt.folder / file.name)

    def from_remote(attempt: Attempt) -> None:
        if failure := versioning.fetch_data(settings, attempt.left_s()):
            raise SourceFailed(failure)
        # With `verify` DVC itself has dropped what came damaged, and says nothing; without, it is ours to find.
        objects = versioning.cached_data_files(repo)
        damaged = [name for name, path in objects.items() if dvc_cache.is_damaged(path) or not path.is_file()]
        if damaged:
            for name in damaged:
                objects[name].unlink(missing_ok=True)
            raise SourceFailed(f"holds a damaged object of {', '.join(damaged)}: not used")
        from_cache(attempt)

    sources = [Source("DVC cache", from_cache)]
    if versioning.has_remote(repo):
        sources.append(Source("DVC remote", from_remote))
    return sources


def _move_into_place(folder: Path, data_dir: Path, files: tuple[RawFile, ...]) -> None:
    """Check every file once more, on the disk, then move them: all right or none moved."""
    state = check_folder(folder, files)
    if not state.good:
        missing = [f"{name} is missing" for name in state.missing]
        raise SourceFailed("; ".join([*missing, *(f"{name} {fault}" for name, fault in state.damaged.items())]))
    for file in files:
        (data_dir / file.name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
        (folder / file.name).replace(data_dir / file.name)


@contextlib.contextmanager
def _incoming_folder(settings: Settings) -> Iterator[Path]:
    """A folder on the same file system as ``data/``, so that a rename is atomic; emptied before and after."""
    near = settings.data_dir if settings.data_dir.is_dir() else settings.project
    same = near.stat().st_dev == settings.run_dir.stat().st_dev
    folder = settings.run_dir / "ingest" if same else settings.data_dir / ".incoming"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Bar:
    """Our progress on a rich bar."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def start(self, what: str, total_bytes: int | None) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total_bytes)

    def advance(self, count_bytes: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, count_bytes)


@contextlib.contextmanager
def _progress_bar() -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Bar(bar)


@contextlib.contextmanager
def _counting_bar() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield show
