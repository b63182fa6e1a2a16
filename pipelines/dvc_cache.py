"""The DVC cache's objects, compared with their names. DVC trusts an object that is there: a damaged one would be handed
out as good, by ``dvc checkout`` and by a stage whose result it remembers, and never be replaced.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.dataset import digest_of
from pipelines.versioning import DATA_RECORD, listed_files


class _Object(NamedTuple):
    """An object that data.dvc or dvc.lock records."""

    name: str
    """Path in the project of the file it is the content of."""
    path: Path
    """Where it lies in the cache."""
    copy: Path | None
    """The project's own copy of the file; None for a folder's list of files."""
    made_by: str


def mend(
    repo: Any, *, everything: bool = False, on_checked: Callable[[int, int], None] = lambda _done, _total: None
) -> list[str]:
    """Remove damaged objects; put back those of which ``data/`` or ``artifacts/`` holds a sound copy.

    Args:
        repo: the project.
        everything: look at all of the cache, older versions too, and not only at what is recorded now.
        on_checked: told how many objects were looked at, of how many.

    Returns:
        A line for people about each.
    """
    objects = list(_recorded(repo))
    others = _others(repo, {one.path for one in objects}) if everything else []
    total = len(objects) + len(others)
    told = []
    for done, one in enumerate([*objects, *others], 1):
        if is_damaged(one.path):
            one.path.unlink()
            told.append(f"DVC cache: the object of {one.name} was damaged and is removed; {_put_back(one)}")
        on_checked(done, total)
    return told


def is_damaged(path: Path) -> bool:
    """Whether an object is there and its content is not what its name says."""
    return path.is_file() and digest_of(path, "md5") != _digest_in(path)


def _put_back(damaged: _Object) -> str:
    if damaged.copy and damaged.copy.is_file() and digest_of(damaged.copy, "md5") == _digest_in(damaged.path):
        part = damaged.path.with_name(f".{damaged.path.name}.part")
        shutil.copyfile(damaged.copy, part)
        part.chmod(0o444)  # as DVC keeps its own
        part.replace(damaged.path)
        return f"put back from {damaged.name}"
    return damaged.made_by


def _digest_in(path: Path) -> str:
    return (path.parent.name + path.name).removesuffix(".dir")


def _recorded(repo: Any) -> Iterator[_Object]:
    for out in repo.index.outs:
        if not (out.use_cache and out.hash_info and out.hash_info.value):
            continue
        folder = Path(out.fs_path)
        name = str(folder.relative_to(repo.root_dir))
        is_data = out.stage.path_in_repo == DATA_RECORD
        made_by = "it is fetched again when needed" if is_data else f"stage {out.stage.name} makes it again when needed"
        path = Path(out.cache.oid_to_path(out.hash_info.value))
        if not out.hash_info.isdir:
            yield _Object(name, path, folder, made_by)
            continue
        yield _Object(f"{name} (the list of its files)", path, None, made_by)
        for file in listed_files(out) or ():
            yield _Object(f"{name}/{file.name}", Path(out.cache.oid_to_path(file.digest)), folder / file.name, made_by)


def _others(repo: Any, known: set[Path]) -> list[_Object]:
    cache = Path(repo.cache.local.path)
    paths = [path for path in sorted(cache.glob("[0-9a-f][0-9a-f]/*")) if not path.name.startswith(".")]
    made_by = "push that version again from where it is whole, if it is still needed"
    return [
        _Object(f"an older version ({_digest_in(path)[:12]}…)", path, None, made_by)
        for path in paths
        if path not in known
    ]
