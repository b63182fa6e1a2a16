"""Who has looked at the sealed test split: a file to which each look adds a line, and each result another.

A figure on a test split is honest for the first network measured on it, and a little less so with each further one that
people chose between. So the number of candidates measured so far stands beside the figure; and, where the same recipe
was measured from several seeds, their spread.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from training.params import Params
from training.workspace import BadArtifact, Workspace

CANDIDATE = "candidate"
"""``why`` of a look that a candidate is chosen by."""
CHAMPION = "champion"
"""``why`` of a look at the published version, for the candidate to be compared with."""
RESULT = "result"
"""``why`` of the line that says what a candidate's look came to."""


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
    recipe: str = ""
    """The same for networks that differ in their seed alone."""
    seed: int = 0
    accuracy: float | None = None
    """In a line of a result."""


def record_look(
    workspace: Workspace, params: Params | None, model_sha256: str, test_sha256: str, test_images: int, why: str
) -> Look:
    """Add a line to models/looks.jsonl, before the look: one that fails was a look all the same.

    ``params`` made the network; None: they are not known. The file is beside the published versions and no output of
    a stage, so DVC neither removes nor restores it.

    Raises:
        BadArtifact: the file cannot be read or written, or has a line that is no look.
    """
    with _opened(workspace) as (looks, append):
        before = [look for look in looks if look.test_sha256 == test_sha256 and look.why != RESULT]
        candidates = {look.model_sha256 for look in before if look.why == CANDIDATE}
        look = Look(
            at=_now(),
            why=why,
            model_sha256=model_sha256,
            test_sha256=test_sha256,
            test_images=test_images,
            recipe=recipe(params) if params else "",
            seed=params.seed if params else 0,
            look=1 + sum(look.model_sha256 == model_sha256 for look in before),
            candidates=len(candidates | {model_sha256} if why == CANDIDATE else candidates),
        )
        append(look)
    return look


def record_result(workspace: Workspace, look: Look, accuracy: float) -> dict[int, float]:
    """Add the accuracy that a look came to; return that of each seed of its recipe on this test split, by seed.

    Raises:
        BadArtifact: as ``record_look``.
    """
    with _opened(workspace) as (looks, append):
        result = Look(**{**asdict(look), "at": _now(), "why": RESULT, "accuracy": accuracy})
        append(result)
    alike = [one for one in (*looks, result) if (one.recipe, one.test_sha256) == (look.recipe, look.test_sha256)]
    return dict(sorted((one.seed, one.accuracy) for one in alike if one.accuracy is not None))


def recipe(params: Params) -> str:
    """What a network is made by, but for the seed, as 16 digits of a hash: data, split, network, training."""
    parts = params.model_dump(mode="json", include={"data", "prepare", "model", "train", "augment"})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def looks_file(workspace: Workspace) -> Path:
    """models/looks.jsonl of the checkout; for an experiment in a temporary one, of the checkout it was started from."""
    root = workspace.root.resolve()
    for folder in root.parents:
        if (folder.name, folder.parent.name, folder.parent.parent.name) == ("exps", "tmp", ".dvc"):
            root = folder.parents[2]
    return root / "models" / "looks.jsonl"


@contextmanager
def _opened(workspace: Workspace) -> Iterator[tuple[list[Look], Callable[[Look], object]]]:
    """The looks so far and a function that adds one, while nobody else can."""
    path = looks_file(workspace)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield _parse(path, file.read()), lambda look: file.write(json.dumps(asdict(look)) + "\n")
    except (OSError, UnicodeDecodeError) as err:
        raise BadArtifact(f"{path}, the record of looks at the test split, cannot be read or written: {err}") from err


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
