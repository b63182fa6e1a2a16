"""Files that are whole or absent, and errors of the disk in one line."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from digits.errors import DigitsError


class DiskError(DigitsError):
    """The disk is full, read-only, or not ours to write."""

    code = "disk"


@contextlib.contextmanager
def disk_errors(what: str, folder: Path, aftermath: str) -> Iterator[None]:
    """Turn an ``OSError`` into a ``DiskError`` that says what could not be stored, why, and what to do.

    Args:
        what: what is being stored, such as "the raw data".
        folder: where, as the user knows it.
        aftermath: what state things are left in.
    """
    try:
        yield
    except OSError as err:
        where = f" ({err.filename})" if err.filename else ""
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason, mend = "no space left", "Free some and run this again"
        elif err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason, mend = (err.strerror or "not allowed").lower(), f"Make {folder} writable for you and run this again"
        else:
            reason, mend = err.strerror or str(err), "Mend that and run this again"
        raise DiskError(f"cannot store {what} in {folder}: {reason}{where}; {aftermath}. {mend}") from err


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        OSError: it cannot be read.
        ruamel.yaml.error.YAMLError: it is no YAML.
    """
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def write_json_atomically(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, also after a power cut."""
    write_text_atomically(path, _json(content))


def write_text_atomically(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the whole new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        _write(part, text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON and see it on the disk."""
    _write(path, _json(content))


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder. The first error ends it, as an ``OSError`` with its number, which shutil.copytree's has not."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def fsync_folder(folder: Path) -> None:
    """See a folder's entries (names, renames) on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """See every file below a folder, and the folders themselves, on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
