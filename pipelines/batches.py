"""A batch of labelled images as people hand it over: two IDX files, an .npz, or a folder of pictures for each class."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from digits.errors import DigitsError
from digits.image import read_digit
from pipelines.arrays import BadInput, is_array_file, read_images, read_labels

_KINDS: Final = (
    "Expected one of: an IDX pair (…images-idx3-ubyte and …labels-idx1-ubyte, also .gz), one .npz with `images` and "
    "`labels`, or a folder of pictures for each class"
)
MAX_INK_SHARE: Final = 0.5
"""Mean of pixel / 255 over a batch above which its images cannot be ink 255 on paper 0: MNIST has 0.13."""


@dataclass(frozen=True)
class Batch:
    """Labelled images, and what of the batch could not be read."""

    source: str
    """The folder's or file's name."""
    images: np.ndarray
    """uint8 (N, 28, 28), ink 255 on paper 0."""
    labels: np.ndarray
    """int64 (N,), 0 to C - 1."""
    names: list[str]
    """N; where each came from: a picture's path in the folder, or its row."""
    unreadable: list[tuple[str, int, str]] = field(default_factory=list)
    """Name, label and what is wrong, of each picture without an image in here."""


def read_batch(
    path: Path, classes: Sequence[str], on_picture: Callable[[int, int], None] = lambda _done, _total: None
) -> Batch:
    """Read a batch.

    Args:
        path: a folder that holds one of the three kinds, or an .npz itself.
        classes: the names of the classes, in the order of their labels.
        on_picture: called as pictures are read: how many are done, of how many.

    Raises:
        BadInput: nothing of that kind is there, or something that makes the whole batch doubtful: a damaged file, other
            shapes or types, labels out of range, not as many labels as images, white paper.
    """
    if path.is_file() and path.suffix == ".npz":
        batch = _from_arrays(path, path, path)
    elif path.is_dir():
        batch = _from_folder(path, classes, on_picture)
    else:
        raise BadInput(f"{path} {'holds no labels' if path.exists() else 'is not there'}. {_KINDS}")
    _check(batch, classes)
    return batch


def _from_folder(folder: Path, classes: Sequence[str], on_picture: Callable[[int, int], None]) -> Batch:
    arrays = [path for path in sorted(folder.iterdir()) if path.is_file() and is_array_file(path)]
    packed = [path for path in arrays if path.suffix == ".npz"]
    images, labels = ([path for path in arrays if word in path.name] for word in ("idx3", "idx1"))
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = [bool(packed), bool(images or labels), bool(folders)]
    if found == [True, False, False] and len(packed) == 1:
        return _from_arrays(folder, packed[0], packed[0])
    if found == [False, True, False] and (len(images), len(labels)) == (1, 1):
        return _from_arrays(folder, images[0], labels[0])
    if found == [False, False, True]:
        return _from_pictures(folder, folders, classes, on_picture)
    held = ", ".join(path.name for path in [*arrays, *folders][:6]) or "neither"
    raise BadInput(f"{folder} holds {held}. {_KINDS}; one of them, and one batch at a time")


def _from_arrays(source: Path, images_file: Path, labels_file: Path) -> Batch:
    images, labels = read_images(images_file), read_labels(labels_file)
    if len(images) != len(labels):
        raise BadInput(f"{source} holds {len(images):,} images but {len(labels):,} labels; expected one for each")
    return Batch(source.name, images, labels, [f"row {row}" for row in range(len(images))])


def _from_pictures(
    folder: Path, folders: list[Path], classes: Sequence[str], on_picture: Callable[[int, int], None]
) -> Batch:
    label_of = {name: label for label, name in enumerate(classes)}
    if strange := [path.name for path in folders if path.name not in label_of]:
        raise BadInput(
            f"{folder} has a folder {strange[0]!r}; expected one for each class, named {classes[0]} to {classes[-1]} "
            "(data.classes in params.yaml)"
        )
    files = [(file, label_of[of.name]) for of in folders for file in sorted(_files_in(of))]
    images, labels, names, unreadable = [], [], [], []
    for done, (file, label) in enumerate(files, 1):
        name = str(file.relative_to(folder))
        try:
            images.append(read_digit(file.read_bytes()))
            labels.append(label)
            names.append(name)
        except OSError as err:
            unreadable.append((name, label, f"cannot be read: {err.strerror}"))
        except DigitsError as err:
            unreadable.append((name, label, str(err)))
        on_picture(done, len(files))
    stacked = np.stack(images) if images else np.zeros((0, IMAGE_HEIGHT, IMAGE_WIDTH), np.uint8)
    return Batch(folder.name, stacked, np.array(labels, np.int64), names, unreadable)


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _check(batch: Batch, classes: Sequence[str]) -> None:
    if not len(batch.images):
        said = f"; the first of {len(batch.unreadable)}: {batch.unreadable[0][2]}" if batch.unreadable else ""
        raise BadInput(f"{batch.source} holds no image that can be read{said}")
    wrong = np.flatnonzero((batch.labels < 0) | (batch.labels >= len(classes)))
    if len(wrong):
        raise BadInput(
            f"{batch.source}: labels are 0 to {len(classes) - 1}, but {len(wrong):,} are not; the first is "
            f"{batch.labels[wrong[0]]} at row {wrong[0]}. Nothing was added"
        )
    ink_share = batch.images.mean() / 255
    if ink_share > MAX_INK_SHARE:
        raise BadInput(
            f"{batch.source}: images are ink 255 on paper 0, but {ink_share:.0%} of these are ink (a tenth to a fifth "
            "is usual): they look inverted. Send 255 - images. Nothing was added"
        )
