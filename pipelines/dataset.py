"""Which raw files the pipeline starts from, and what they must be.

As it comes, that is MNIST: ``RAW_FILES`` says what its files are, and they can be fetched from public places. For data
of one's own put it into ``data/``, run ``dvc add data``, and name its files' SHA-256 in params.yaml
(``validate.sha256``), or leave that empty while the data still grows: then the files are those that data.dvc records.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ruamel.yaml.error import YAMLError

from digits.errors import DigitsError
from pipelines.disk import read_yaml


class DataError(DigitsError):
    """The raw data is missing, damaged, or cannot be had."""

    code = "data"


@dataclass(frozen=True)
class RawFile:
    """One raw file: its name in ``data/``, its digest in hexadecimal, and its exact size where that is known."""

    name: str
    digest: str
    size_bytes: int | None = None
    algorithm: str = "sha256"


RAW_FILES: Final = (
    RawFile("train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", 47_040_016),
    RawFile("train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", 60_008),
    RawFile("t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", 7_840_016),
    RawFile("t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", 10_008),
)
"""MNIST as Yann LeCun, Corinna Cortes and Christopher Burges published it, unpacked (IDX format)."""

MNIST_DVC_HASH: Final = "d0193be11ab497254ec667a4864050d9.dir"
"""What data.dvc records when ``data/`` holds exactly those files."""

TOTAL_BYTES: Final = sum(file.size_bytes or 0 for file in RAW_FILES)


_SHOWN: Final = {"sha256": "SHA-256", "md5": "MD5"}


def pinned_files(params_file: Path) -> tuple[RawFile, ...]:
    """The files whose SHA-256 params.yaml names under ``validate.sha256``; none when it names none."""
    try:
        pins = read_yaml(params_file)["validate"]["sha256"] or {}
        known = {file.name: file for file in RAW_FILES}
        return tuple(
            known[name] if name in known and known[name].digest == digest else RawFile(str(name), str(digest))
            for name, digest in pins.items()
        )
    except (OSError, YAMLError, KeyError, TypeError, AttributeError):
        return ()


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """Digest of a file's content, hexadecimal. MD5 is what DVC knows files by; it proves integrity, not origin."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def fault_of(path: Path, expected: RawFile) -> str | None:
    """What is wrong with the file at ``path``; None when it is exactly the expected one."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if expected.size_bytes not in (None, size):
        return f"has {size:,} bytes, expected {expected.size_bytes:,}"
    digest = digest_of(path, expected.algorithm)
    if digest != expected.digest:
        return f"has {_SHOWN[expected.algorithm]} {digest[:12]}…, expected {expected.digest[:12]}…"
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


def check_folder(folder: Path, files: Iterable[RawFile]) -> FolderState:
    """Compare a folder with what it should hold, by digest."""
    missing, damaged = [], {}
    for file in files:
        fault = fault_of(folder / file.name, file)
        if fault == "is missing":
            missing.append(file.name)
        elif fault:
            damaged[file.name] = fault
    return FolderState(tuple(missing), damaged)


def require_undamaged(state: FolderState) -> None:
    """Stop when a file that is there is not what it should be. Merely missing ones are for ``ingest`` to fetch.

    Raises:
        DataError: a file is damaged, or was changed on purpose.
    """
    if state.damaged:
        raise DataError(
            f"{state.describe_damage()}; nothing was trained. To get the recorded data again: python -m pipelines "
            "ingest. If the change is meant: dvc add data, and set validate.sha256 in params.yaml"
        )
