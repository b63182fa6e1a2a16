"""What we ask of DVC: the raw data's cache and record, and the graph of stages. ``dvc`` is imported on first use."""

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ruamel.yaml.error import YAMLError

from digits.errors import DigitsError
from pipelines.dataset import RawFile
from pipelines.disk import read_yaml
from pipelines.settings import Settings

DATA_RECORD: Final = "data.dvc"


class VersioningError(DigitsError):
    """DVC or git is not set up here, or another DVC command holds the lock."""

    code = "versioning"


class Locked(VersioningError):
    """Another DVC command is at work here."""


@contextlib.contextmanager
def open_repo(settings: Settings) -> Iterator[Any]:
    """The project's ``dvc.repo.Repo``; DVC's own errors come out as ``VersioningError`` with what to do."""
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with contextlib.closing(Repo(str(settings.project))) as repo:
            yield repo
    except NotDvcRepoError as err:
        raise VersioningError(
            f"expected a DVC project in {settings.project}; found none. Run this in the repository's top folder"
        ) from err
    except SCMError as err:
        raise VersioningError(
            f"expected a git repository in {settings.project}; found none. Clone the repository with git, or run "
            "'git init' here"
        ) from err
    except LockError as err:
        raise Locked("another DVC command is at work in this project; wait until it has finished") from err
    except DvcException as err:
        raise VersioningError(f"DVC: {' '.join(str(err).split())}") from err


def recorded_data_hash(repo: Any) -> str | None:
    """What data.dvc records for ``data/``; None when there is no data.dvc yet."""
    out = _data_out(repo)
    return None if out is None else str(out.hash_info.value)


def recorded_data_files(repo: Any) -> tuple[RawFile, ...] | None:
    """The files that data.dvc records, with their MD5; None when the DVC cache lacks the list of them."""
    out = _data_out(repo)
    return None if out is None else listed_files(out)


def listed_files(out: Any) -> tuple[RawFile, ...] | None:
    """The files of a folder that DVC keeps, with their MD5; None when the cache lacks the list of them."""
    try:
        entries = json.loads(Path(out.cache.oid_to_path(out.hash_info.value)).read_bytes())
        return tuple(RawFile(entry["relpath"], entry["md5"], algorithm="md5") for entry in entries)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cached_data_files(repo: Any) -> dict[str, Path]:
    """Name in ``data/`` -> path of its object in the DVC cache; empty when the cache lacks the list of files.

    The paths are where the objects belong; they need not exist or be sound.
    """
    out, files = _data_out(repo), recorded_data_files(repo) or ()
    return {file.name: Path(out.cache.oid_to_path(file.digest)) for file in files}


def uncached_names(repo: Any) -> list[str]:
    """The names in ``data/`` whose object is not in the DVC cache."""
    return [name for name, path in cached_data_files(repo).items() if not path.is_file()]


def has_remote(repo: Any) -> bool:
    """Whether there is a DVC remote to pull from: one is configured and, where it is a folder, that is there."""
    name = repo.config["core"].get("remote")
    url = str(repo.config["remote"].get(name, {}).get("url", ""))
    return bool(url) and ("://" in url or Path(url).is_dir())


def fetch_data(settings: Settings, timeout_s: float) -> str | None:
    """Bring the raw data from the default DVC remote into the cache. What went wrong, or None."""
    return _dvc(settings, timeout_s, "fetch")


def pull_data(settings: Settings, timeout_s: float) -> str | None:
    """Bring the raw data from the default DVC remote into ``data/``. What went wrong, or None."""
    return _dvc(settings, timeout_s, "pull")


def _dvc(settings: Settings, timeout_s: float, verb: str) -> str | None:
    command = [sys.executable, "-m", "dvc", verb, "--quiet", DATA_RECORD]
    try:
        done = subprocess.run(
            command, cwd=settings.project, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return lines[0].removeprefix("ERROR: ") if lines else f"dvc {verb} exited with {done.returncode}"
    return None


def record_data(repo: Any, *, replace: bool) -> bool:
    """Put ``data/`` into the cache and see that it is what data.dvc says. ``dvc status data.dvc`` is clean afterwards.

    Args:
        repo: the project.
        replace: rewrite a data.dvc that says otherwise. Right only when the files are known to be the meant ones.

    Returns:
        Whether data.dvc was written.

    Raises:
        VersioningError: ``data/`` holds something else than data.dvc records.
    """
    if _data_out(repo) is None:
        repo.add(str(Path(repo.root_dir) / "data"))
        return True
    record = str(Path(repo.root_dir) / DATA_RECORD)
    if not repo.status(targets=[record]):
        return False
    (stage,) = repo.stage.load_file(record)
    recorded = stage.outs[0].hash_info.value
    with repo.lock:
        stage.save()
        found = stage.outs[0].hash_info.value
        if found != recorded and not replace:
            raise VersioningError(
                f"data/ holds other files than data.dvc records (expected {recorded}, came {found}). Remove what does "
                "not belong there; or, if the change is meant, record it: dvc add data"
            )
        with _quiet_dvc():
            stage.commit()
        _require_cached(repo, stage.outs[0])
        if found != recorded:
            stage.dump()
    return bool(found != recorded)


def _require_cached(repo: Any, out: Any) -> None:
    """See that the objects are in the cache: DVC only logs it when it could not store one.

    Raises:
        OSError: the disk is full.
        VersioningError: they are not there for another reason.
    """
    objects = {entry.name: Path(out.cache.oid_to_path(entry.digest)) for entry in listed_files(out) or ()}
    if objects and all(path.is_file() for path in objects.values()):
        return
    cache = Path(out.cache.path)
    free = shutil.disk_usage(cache if cache.is_dir() else repo.root_dir).free
    for half_written in cache.glob("*/.*.tmp"):  # DVC leaves them there for ever
        half_written.unlink(missing_ok=True)
    if free < out.meta.size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache))
    raise VersioningError("DVC could not put data/ into its cache; to see why: dvc add data")


@contextlib.contextmanager
def _quiet_dvc() -> Iterator[None]:
    """Keep DVC from logging, where we look at the outcome ourselves."""
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def data_hash(settings: Settings) -> str:
    """The hash that data.dvc records for ``data/``, such as ``d019….dir``."""
    path = settings.project / DATA_RECORD
    try:
        return str(read_yaml(path)["outs"][0]["md5"])
    except (OSError, YAMLError, KeyError, IndexError, TypeError) as err:
        raise VersioningError(f"expected data.dvc with the hash of data/; {path} has none. Run: dvc add data") from err


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml: its name, and the names of the stages it needs."""

    name: str
    needs: tuple[str, ...]


def stages_in_order(settings: Settings) -> list[Stage]:
    """The stages of dvc.yaml, each after what it depends on, from DVC's own graph."""
    from dvc.stage import PipelineStage
    from networkx import topological_sort  # type: ignore[import-untyped]  # has no types

    with open_repo(settings) as repo:
        graph = repo.index.graph  # edges go from a stage to what it needs
        ordered = [node for node in reversed(list(topological_sort(graph))) if isinstance(node, PipelineStage)]
        return [
            Stage(
                _address(node),
                tuple(sorted(_address(need) for need in graph.successors(node) if isinstance(need, PipelineStage))),
            )
            for node in ordered
        ]


def unchanged_stages(settings: Settings, names: Sequence[str]) -> list[str]:
    """Those of these stages, up to the first other one, with which ``dvc repro --single-item NAME`` would do nothing.

    Raises:
        Locked: another DVC command is at work.
        VersioningError: there is no such stage.
    """
    with open_repo(settings) as repo, repo.lock:
        return list(itertools.takewhile(lambda name: not _changed(repo, settings, name), names))


def _changed(repo: Any, settings: Settings, name: str) -> bool:
    file, _, stage_name = name.rpartition(":")
    # DVC takes a relative path from the current folder, which need not be the project's.
    target = f"{settings.project.absolute() / (file or 'dvc.yaml')}:{stage_name}"
    (stage,) = repo.stage.collect(target)
    return bool(stage.changed())


@dataclass(frozen=True)
class Collected:
    """What a garbage collection removed from the cache."""

    objects: int
    freed_bytes: int


def collect_garbage(settings: Settings, data_hashes: Iterable[str]) -> Collected:
    """Remove from DVC's cache what nothing refers to: no file of the workspace, no commit, no experiment.

    ``dvc gc --workspace --all-commits --all-experiments`` does the same, but for the data of published versions, which
    need not be committed, as in a container without git.

    Args:
        settings: where.
        data_hashes: hashes of ``data/`` (such as ``d019….dir``) that stay besides, with their files.

    Raises:
        Locked: another DVC command is at work.
    """
    from dvc.scm import NoSCM
    from dvc_data.hashfile.gc import gc
    from dvc_data.hashfile.hash_info import HashInfo

    with open_repo(settings) as repo, repo.lock:
        history = not isinstance(repo.scm, NoSCM)
        used = repo.used_objs(all_commits=history, all_experiments=history, force=True)
        cache = repo.cache.local
        kept = set().union(*used.values())
        for value in data_hashes:
            kept |= {HashInfo("md5", value), *_files_of(Path(cache.oid_to_path(value)))}
        before = _size_of(cache)
        removed = sum(int(gc(odb, kept)) for odb in {odb for _, odb in repo.cache.by_scheme() if odb})
        return Collected(removed, before - _size_of(cache))


def _files_of(listing: Path) -> Iterator[Any]:
    """The files that a ``.dir`` object lists; none when it is not in the cache."""
    from dvc_data.hashfile.hash_info import HashInfo

    with contextlib.suppress(OSError, ValueError):
        for entry in json.loads(listing.read_bytes()):
            yield HashInfo("md5", entry["md5"])


def _size_of(cache: Any) -> int:
    return sum(path.stat().st_size for path in Path(cache.path).rglob("*") if path.is_file())


def changed_stages(repo: Any) -> set[str]:
    """The stages (and data.dvc) that ``dvc repro`` would look at again: something they use or make has changed."""
    # DVC names them as seen from the current folder, which need not be the project's.
    return {name.rpartition(":")[2].rpartition("/")[2] for name in repo.status()}


def _address(stage: Any) -> str:
    """A stage's name as seen from the project's folder: ``train``, or ``other/dvc.yaml:train``."""
    return stage.name if stage.path_in_repo == "dvc.yaml" else f"{stage.path_in_repo}:{stage.name}"


def _data_out(repo: Any) -> Any:
    """DVC's view of ``data/``; None when there is no data.dvc yet."""
    record = Path(repo.root_dir) / DATA_RECORD
    if not record.is_file():
        return None
    (stage,) = repo.stage.load_file(str(record))
    return stage.outs[0]
