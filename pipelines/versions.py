"""The published versions: the folders ``models/digits/<n>/``, each with its lineage."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digits import contract
from digits.errors import DigitsError


class NoSuchVersion(DigitsError):
    """That version is not among the published ones."""

    code = "no_such_version"


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


def version_numbers(versions_dir: Path) -> list[int]:
    """The numbers of the published versions, ascending."""
    try:
        return sorted(int(path.name) for path in versions_dir.iterdir() if path.name.isdecimal() and path.is_dir())
    except FileNotFoundError:
        return []


def newest_version(versions_dir: Path) -> Version | None:
    """The highest published version; None when there is none."""
    numbers = version_numbers(versions_dir)
    return read_version(versions_dir / str(numbers[-1])) if numbers else None


def find_version(versions_dir: Path, number: int) -> Version:
    """A published version by its number.

    Raises:
        NoSuchVersion: there is none of that number; the message lists those there are.
    """
    numbers = version_numbers(versions_dir)
    if number not in numbers:
        there = ", ".join(map(str, numbers)) or "none"
        raise NoSuchVersion(f"expected a published version; there is no version {number} in {versions_dir} ({there})")
    return read_version(versions_dir / str(number))


def read_version(folder: Path) -> Version:
    """The version in a folder that is named by its number."""
    return Version(int(folder.name), folder, read_lineage(folder))


def read_lineage(folder: Path) -> dict[str, Any]:
    """A version's lineage; empty if it has none that can be read."""
    try:
        lineage = json.loads((folder / contract.LINEAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return lineage if isinstance(lineage, dict) else {}
