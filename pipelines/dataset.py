"""Which raw files the pipeline starts from, and what they must be.

For data of one's own: put the files into ``data/``, change ``RAW_FILES`` to them, and run ``dvc add data``.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from digits.errors import DigitsError

_CHUNK_BYTES: Final = 1 << 20


class DataError(DigitsError):
    """The raw data is missing, damaged, or cannot be had."""

    code = "data"


@dataclass(frozen=True)
class RawFile:
    """One raw file: its name in ``data/``, its exact size and its SHA-256 (hexadecimal)."""

    name: str
    size_bytes: int
    sha256: str


RAW_FILES: Final = (
    RawFile("train-images-idx3-ubyte", 47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    RawFile("train-labels-idx1-ubyte", 60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    RawFile("t10k-images-idx3-ubyte", 7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    RawFile("t10k-labels-idx1-ubyte", 10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
)
"""MNIST as Yann LeCun, Corinna Cortes and Christopher Burges published it, unpacked (IDX format)."""

TOTAL_BYTES: Final = sum(file.size_bytes for file in RAW_FILES)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fault_of(path: Path, expected: RawFile) -> str | None:
    """What is wrong with the file at ``path``; None when it is exactly the expected one."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected.size_bytes:
        return f"has {size:,} bytes, expected {expected.size_bytes:,}"
    digest = sha256_of(path)
    if digest != expected.sha256:
        return f"has SHA-256 {digest[:12]}…, expected {expected.sha256[:12]}…"
    return None


@dataclass(frozen=True)
class FolderState:
    """What a check of a data folder found: names that are missing, and names with what is wrong about them."""

    missing: tuple[str, ...]
    damaged: dict[str, str]

    @property
    def good(self) -> bool:
        """Whether every file is there and right."""
        return not self.missing and not self.damaged

    def describe_damage(self) -> str:
        """The damaged files in words, for an error message."""
        return ", ".join(f"data/{name} {fault}" for name, fault in self.damaged.items())


def check_folder(folder: Path, files: Iterable[RawFile] = RAW_FILES) -> FolderState:
    """Compare a folder with what it should hold, by SHA-256."""
    missing, damaged = [], {}
    for file in files:
        fault = fault_of(folder / file.name, file)
        if fault == "is missing":
            missing.append(file.name)
        elif fault:
            damaged[file.name] = fault
    return FolderState(tuple(missing), damaged)


def require_good_or_absent(folder: Path) -> FolderState:
    """The state of the folder; raises when a file that is there is not what it should be.

    Raises:
        DataError: a file is damaged. Files that are merely missing are for ``ingest`` to fetch.
    """
    state = check_folder(folder)
    if state.damaged:
        raise DataError(
            f"{state.describe_damage()}; nothing was trained. To fetch it again: python -m pipelines ingest. "
            "For data of your own see pipelines/dataset.py"
        )
    return state
