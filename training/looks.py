"""Who has looked at the sealed test split: a file to which each look adds a line.

A figure on a test split is honest for the first network measured on it, and a little less so with each further one that
people chose between. So the number of candidates measured so far stands beside the figure.
"""

import fcntl
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from training.workspace import BadArtifact, Workspace

CANDIDATE = "candidate"
"""``why`` of a look that a candidate is chosen by."""


@dataclass(frozen=True)
class Look:
    """One network measured on one test split."""

    at: str
    """UTC, ISO 8601."""
    why: str
    """``candidate``, or for what else."""
    model_sha256: str
    test_sha256: str
    test_images: int
    look: int
    """The how-manieth look of this network at this split, from 1."""
    candidates: int
    """Different candidates measured on this split up to now, this one among them."""


def record_look(workspace: Workspace, model_sha256: str, test_sha256: str, test_images: int, why: str) -> Look:
    """Add a line to models/looks.jsonl, before the look: one that fails was a look all the same.

    The file is beside the published versions and no output of a stage, so DVC neither removes nor restores it.

    Raises:
        BadArtifact: the file cannot be read or written, or has a line that is no look.
    """
    path = looks_file(workspace)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before = [look for look in _parse(path, file.read()) if look.test_sha256 == test_sha256]
            candidates = {look.model_sha256 for look in before if look.why == CANDIDATE}
            if why == CANDIDATE:
                candidates.add(model_sha256)
            look = Look(
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                why=why,
                model_sha256=model_sha256,
                test_sha256=test_sha256,
                test_images=test_images,
                look=1 + sum(look.model_sha256 == model_sha256 for look in before),
                candidates=len(candidates),
            )
            file.write(json.dumps(asdict(look)) + "\n")
    except (OSError, UnicodeDecodeError) as err:
        raise BadArtifact(f"{path}, the record of looks at the test split, cannot be read or written: {err}") from err
    return look


def looks_file(workspace: Workspace) -> Path:
    """models/looks.jsonl of the checkout; for an experiment in a temporary one, of the checkout it was started from."""
    root = workspace.root.resolve()
    for folder in root.parents:
        if (folder.name, folder.parent.name, folder.parent.parent.name) == ("exps", "tmp", ".dvc"):
            root = folder.parents[2]
    return root / "models" / "looks.jsonl"


def _parse(path: Path, text: str) -> list[Look]:
    looks = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            looks.append(Look(**json.loads(line)))
        except (ValueError, TypeError, RecursionError) as err:
            raise BadArtifact(
                f"{path}, line {number}, is no look at the test split: mend the line, or move the file away and know "
                "that candidates are then counted from nought"
            ) from err
    return looks
