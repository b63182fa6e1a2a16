"""``ingest --add``: a labelled batch becomes part of the training images, and the data a new version.

The training file grows at its end; the test files are read, so that nothing of theirs gets into training, and never
written. Every row of the batch is either added or refused with a reason. Training files, params.yaml, data.dvc, the DVC
cache and the changelog go from the old version to the new one together, also when killed in between.
"""

import csv
import datetime
import errno
import getpass
import hashlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from ruamel.yaml import YAML

from pipelines import versioning
from pipelines.arrays import BadInput, idx_header
from pipelines.batches import Batch, read_batch
from pipelines.dataset import digest_of
from pipelines.disk import fsync_folder, read_yaml
from pipelines.likeness import SAME, nearest
from pipelines.params_file import edited
from pipelines.settings import Settings
from pipelines.transaction import Transaction

CHANGELOG: Final = "data-changelog.yaml"
REFUSED: Final = "refused.csv"
"""In the run folder: the rows of the latest batch that were refused, each with its reason."""

TRAIN_IMAGES: Final = "train-images-idx3-ubyte"
TRAIN_LABELS: Final = "train-labels-idx1-ubyte"

UNREADABLE: Final = "cannot be read"
BLANK: Final = "blank"
NO_PAPER: Final = "no paper"
REPEATED: Final = "repeats another of the batch"
CONTRADICTED: Final = "has two labels in the batch"
IN_TRAIN: Final = "in the training images already"
RELABELLED: Final = "in the training images with another label"
IN_TEST: Final = "in the test images"
LIKE_TEST: Final = "nearly a test image"

_HEAD: Final = (
    "# What was added to the training images, oldest first: written by `python -m pipelines ingest --add`, committed\n"
    "# with data.dvc and params.yaml. `data` is the hash that data.dvc records; `was` is the one before.\n"
)
_FACTS: Final = ("was", "when", "who", "source", "added", "added_by_digit", "refused", "train_images")
"""What an entry says after its `data`, in this order."""

_LEAST_GREATEST_PIXEL: Final = 128


@dataclass(frozen=True)
class Refusal:
    """A row that was not added: its name in the batch, the label it came with, why, and which row it collides with."""

    name: str
    label: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Added:
    """What became of a batch."""

    source: str
    added: int
    refused: tuple[Refusal, ...]
    data_hash: str
    was: str
    train_images: int

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> how many, the commonest first."""
        return dict(Counter(one.reason for one in self.refused).most_common())


def add(
    settings: Settings,
    repo: Any,
    path: Path,
    *,
    dry_run: bool = False,
    on_picture: Callable[[int, int], None] = lambda _done, _total: None,
    on_compared: Callable[[int, int], None] = lambda _done, _total: None,
) -> Added:
    """Add a batch to the training images. The data must be complete and as recorded; the caller holds ingest's lock.

    Args:
        settings: where.
        repo: the project under DVC.
        path: the batch; see ``read_batch``.
        dry_run: only say what would be added.
        on_picture: told how many pictures are read, of how many.
        on_compared: told how many images are compared with the test images, of how many.

    Raises:
        BadInput: the batch as a whole cannot be used. Nothing was changed.
        OSError: it cannot be stored. Nothing was changed.
    """
    from training.data import read_raw_split
    from training.params import load_params

    data = load_params(settings.project / "params.yaml").data
    if data.format != "idx":
        raise BadInput(
            "data.format in params.yaml is folder: put the pictures into data/train/CLASS yourself, then dvc add data"
        )
    batch = read_batch(path, data.classes, on_picture)
    train, test = (read_raw_split(settings.data_dir, name) for name in ("train", "test"))
    refused = judge(batch, train.images, train.labels, test.images, least_ink_px(settings), on_compared)
    names = {one.name for one in refused}
    kept = np.array([name not in names for name in batch.names], bool)
    was = versioning.data_hash(settings)
    done = Added(batch.source, int(kept.sum()), tuple(refused), was, was, len(train.labels) + int(kept.sum()))
    _write_refused(settings.run_dir / REFUSED, refused)
    if dry_run or not done.added:
        return done
    _decide(settings, repo, batch, kept, done, len(data.classes))
    complete(settings, repo)
    return replace(done, data_hash=versioning.data_hash(settings))


def complete(settings: Settings, repo: Any) -> bool:
    """Carry an addition through that was decided and then cut off; forget one that was not. Whether there was one."""
    transaction = _transaction(settings)
    facts = transaction.decided()
    if facts is not None:
        transaction.move()
        versioning.record_data(repo, replace=True)
        _write_changelog(settings, facts)
    transaction.close()
    return facts is not None


def judge(
    batch: Batch,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    min_ink_px: float,
    on_compared: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Refusal]:
    """Every row that is not to be added, and why; each at most once."""
    refused = [Refusal(name, label, UNREADABLE, why) for name, label, why in batch.unreadable]
    known = _Known(batch, train_images, train_labels, test_images)
    left = []
    for row, (name, label) in enumerate(zip(batch.names, batch.labels.tolist(), strict=True)):
        found = _faintness(batch.images[row], min_ink_px) or known.collision(row)
        if found:
            refused.append(Refusal(name, label, *found))
        else:
            left.append(row)
    return refused + _like_test(batch, left, test_images, on_compared)


def _faintness(image: np.ndarray, min_ink_px: float) -> tuple[str, str] | None:
    """What validation would stop for, later: no ink, or no paper."""
    ink_px, greatest, least = image.sum(dtype=np.int64) / 255.0, image.max(), image.min()
    if greatest < _LEAST_GREATEST_PIXEL or ink_px < min_ink_px:
        return BLANK, f"{ink_px:.1f} pixels of ink, greatest pixel {greatest}"
    return (NO_PAPER, f"least pixel {least}; paper is 0") if least else None


class _Known:
    """Which images there are already: in training, in test, and earlier in the batch. Found by their exact pixels."""

    def __init__(
        self, batch: Batch, train_images: np.ndarray, train_labels: np.ndarray, test_images: np.ndarray
    ) -> None:
        self._batch, self._train_labels = batch, train_labels
        self._hashes = _hashes(batch.images)
        self._train, self._test = _rows_by_hash(train_images), _rows_by_hash(test_images)
        self._labels: dict[bytes, set[int]] = {}
        for key, label in zip(self._hashes, batch.labels.tolist(), strict=True):
            self._labels.setdefault(key, set()).add(label)
        self._seen: dict[bytes, str] = {}

    def collision(self, row: int) -> tuple[str, str] | None:
        """Reason and detail when the row is known; remembered otherwise."""
        key, name, label = self._hashes[row], self._batch.names[row], int(self._batch.labels[row])
        if key in self._test:
            return IN_TEST, f"test row {self._test[key]}"
        if key in self._train:
            known = int(self._train_labels[self._train[key]])
            return (IN_TRAIN if known == label else RELABELLED), f"training row {self._train[key]}, labelled {known}"
        if len(self._labels[key]) > 1:
            return CONTRADICTED, "labelled " + " and ".join(map(str, sorted(self._labels[key])))
        if key in self._seen:
            return REPEATED, self._seen[key]
        self._seen[key] = name
        return None


def least_ink_px(settings: Settings) -> float:
    """What validation asks of the faintest image, as params.yaml says."""
    return float(read_yaml(settings.project / "params.yaml").get("validate", {}).get("min_image_ink_px", 0.0))


def _like_test(
    batch: Batch, rows: list[int], test_images: np.ndarray, on_compared: Callable[[int, int], None]
) -> list[Refusal]:
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        on_compared(done, len(rows))

    which, likeness = nearest(batch.images[rows], test_images, tell)
    return [
        Refusal(batch.names[row], int(batch.labels[row]), LIKE_TEST, f"test row {which[i]}, likeness {likeness[i]:.4f}")
        for i, row in enumerate(rows)
        if likeness[i] >= SAME
    ]


def _hashes(images: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def _rows_by_hash(images: np.ndarray) -> dict[bytes, int]:
    return {key: row for row, key in enumerate(_hashes(images))}


def _decide(settings: Settings, repo: Any, batch: Batch, kept: np.ndarray, done: Added, class_count: int) -> None:
    """Write all that changes beside the old, see that there is room for the DVC cache, and put it in the journal."""
    transaction = _transaction(settings)
    transaction.begin()
    folder = transaction.folder
    count = done.train_images
    header_bytes = {TRAIN_IMAGES: 16, TRAIN_LABELS: 8}
    shapes = {TRAIN_IMAGES: idx_header(count, *batch.images.shape[1:]), TRAIN_LABELS: idx_header(count)}
    more = {TRAIN_IMAGES: batch.images[kept], TRAIN_LABELS: batch.labels[kept].astype(np.uint8)}
    for name, header in shapes.items():
        with (folder / name).open("wb") as new, (settings.data_dir / name).open("rb") as old:
            new.write(header)
            old.seek(header_bytes[name])
            shutil.copyfileobj(old, new)
            new.write(more[name].tobytes())
    (folder / "params.yaml").write_text(_new_params(settings, folder, count), encoding="utf-8")
    needed = sum((folder / name).stat().st_size for name in shapes)
    cache = Path(repo.cache.local_cache_dir)
    if shutil.disk_usage(cache if cache.is_dir() else settings.project).free < needed + (16 << 20):
        transaction.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache))
    with repo.lock:  # another DVC command at work is said now, while nothing has changed
        pass
    places = {"params.yaml": "params.yaml", **{name: f"data/{name}" for name in shapes}}
    transaction.decide(places, _facts(batch, kept, done, class_count))


def _new_params(settings: Settings, folder: Path, train_images: int) -> str:
    """params.yaml with the new count and digests where it names them; comments and layout stay."""

    def renew(params: Any) -> None:
        validate = params.get("validate") or {}
        for name in (TRAIN_IMAGES, TRAIN_LABELS):
            if name in (validate.get("sha256") or {}):
                validate["sha256"][name] = digest_of(folder / name)
        if "train_images" in validate:
            validate["train_images"] = train_images

    return edited(settings, renew)


def _facts(batch: Batch, kept: np.ndarray, done: Added, class_count: int) -> dict[str, Any]:
    counts = np.bincount(batch.labels[kept], minlength=class_count).tolist()
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "who": _who(),
        "source": done.source,
        "added": done.added,
        "added_by_digit": counts,
        "refused": done.reasons,
        "train_images": done.train_images,
        "was": done.was,
    }


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def _write_changelog(settings: Settings, facts: dict[str, Any]) -> None:
    """Append an entry, unless it is there already from a run that was cut off after it."""
    path = settings.project / CHANGELOG
    old = path.read_text(encoding="utf-8") if path.is_file() else _HEAD
    entry = {"data": versioning.data_hash(settings), **{name: facts[name] for name in _FACTS}}
    entries = YAML(typ="safe").load(old) or []
    if any(one.get("data") == entry["data"] and one.get("when") == entry["when"] for one in entries):
        return
    yaml = YAML()
    yaml.width = 4096
    yaml.default_flow_style = None  # lists of numbers on one line
    text = io.StringIO()
    yaml.dump([entry], text)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(f"{old.rstrip()}\n\n{text.getvalue()}")
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
    fsync_folder(path.parent)


def _write_refused(path: Path, refused: list[Refusal]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["name", "label", "reason", "detail"])
        writer.writeheader()
        writer.writerows(asdict(one) for one in refused)


def _transaction(settings: Settings) -> Transaction:
    return Transaction(settings.run_dir / "addition", settings.project)
