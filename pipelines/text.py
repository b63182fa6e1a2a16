"""Figures as people read them."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any


def duration(seconds: float) -> str:
    """``8.4 s``, ``2 min 05 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def size(count: int) -> str:
    """``512 bytes``, ``3.2 MB``."""
    if count < 1000:
        return f"{count} bytes"
    units = ("kB", "MB", "GB", "TB")
    power = min(len(units), (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.1f} {units[power - 1]}"


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, with dotted names; lists are left out."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value


def print_json(content: Any) -> None:
    """One JSON document on stdout, for machines."""
    sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
    sys.stdout.flush()
