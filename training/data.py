"""The raw files: IDX or folders of pictures in, arrays out, and a split that never changes for a seed.

IDX is the format of yann.lecun.com/exdb/mnist: a magic number (two zero bytes, the type 0x08 for uint8, the number of
dimensions), each dimension as a big-endian uint32, then the bytes.
"""

import functools
import struct
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from training.folders import read_folder
from training.params import DataParams
from training.workspace import BadRawData, Split

_UINT8 = 0x08
_MEND = "Fetch it again with `python -m pipelines ingest`."


SPLITS = ("train", "test")


def read_splits(raw_dir: Path, params: DataParams, console: Console) -> dict[str, Split]:
    """Read the images and labels of ``train`` and ``test``, whatever they lie as; a bar shows how pictures are read.

    Raises:
        BadRawData: as ``read_raw_split`` and ``read_folder``.
    """
    if params.format == "idx":
        return {name: read_raw_split(raw_dir, name) for name in SPLITS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    splits = {}
    with Progress(*columns, console=console, transient=True) as progress:
        for name in SPLITS:
            task = progress.add_task(f"reading pictures of {name}", total=None)
            show = functools.partial(_show, progress, task)
            splits[name] = read_folder(raw_dir / name, params.classes, show)
    return splits


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one IDX file of uint8 with that many dimensions.

    Raises:
        BadRawData: missing, empty, of another kind, or not as long as its header says.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as err:
        raise BadRawData(f"{path} is missing. {_MEND}") from err
    except OSError as err:
        raise BadRawData(f"{path} cannot be read: {err.strerror or err}. {_MEND}") from err

    header_bytes = 4 + 4 * dimensions
    if not content:
        raise BadRawData(f"{path} is empty. {_MEND}")
    if len(content) < header_bytes:
        raise BadRawData(f"{path} has {len(content)} bytes, fewer than its header of {header_bytes}. {_MEND}")
    expected_magic = (_UINT8 << 8) | dimensions
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header_bytes])
    if magic != expected_magic:
        raise BadRawData(
            f"{path} starts with 0x{magic:08x}; an IDX file of uint8 in {dimensions} dimensions starts with "
            f"0x{expected_magic:08x}. {_MEND}"
        )
    size = int(np.prod(shape, dtype=object))
    if len(content) - header_bytes != size:
        relation = "cut short" if len(content) - header_bytes < size else "too long"
        raise BadRawData(
            f"{path} is {relation}: its header says {' x '.join(map(str, shape))} = {size} bytes of data, "
            f"{len(content) - header_bytes} came. {_MEND}"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def read_raw_split(raw_dir: Path, name: str) -> Split:
    """Read the images and labels of ``train`` or ``test`` as they lie, labels unchecked.

    Raises:
        BadRawData: a file is damaged, images are not 28 x 28, or there are not as many labels as images.
    """
    prefix = {"train": "train", "test": "t10k"}[name]
    images = read_idx(raw_dir / f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = read_idx(raw_dir / f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if images.shape[1:] != (IMAGE_HEIGHT, IMAGE_WIDTH):
        raise BadRawData(
            f"{raw_dir}/{prefix}-images-idx3-ubyte holds images of {images.shape[1]} x {images.shape[2]} pixels; "
            f"{IMAGE_HEIGHT} x {IMAGE_WIDTH} are expected. {_MEND}"
        )
    if len(images) != len(labels):
        raise BadRawData(f"the {name} files hold {len(images)} images but {len(labels)} labels. {_MEND}")
    return Split(images, labels.astype(np.int64))


def split_stratified(
    labels: np.ndarray, held_out: int, classes: tuple[str, ...], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose ``held_out`` of the indices so that each class keeps its share; the rest stay for training.

    Args:
        labels: int (N,), 0 to C - 1.
        held_out: how many to set aside, fewer than N.
        classes: the names of the C classes.
        seed: the same seed makes the same choice.

    Returns:
        The kept and the held-out indices, each sorted; together every index once.

    Raises:
        BadRawData: there are too few images, or a class would have none on one side.
    """
    if held_out >= len(labels):
        raise BadRawData(
            f"prepare.validation_images is {held_out}, but there are only {len(labels)} training images: set it lower"
        )
    counts = np.bincount(labels, minlength=len(classes))
    exact = counts * held_out / len(labels)
    quota = np.floor(exact).astype(int)
    # Largest remainders make the quotas add up.
    for label in np.argsort(quota - exact, kind="stable")[: held_out - quota.sum()]:
        quota[label] += 1
    rng = np.random.default_rng(seed)
    chosen = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if quota[label] == 0 or quota[label] == len(members):
            raise BadRawData(
                f"class {name} has {len(members)} training images, too few to split {held_out} of {len(labels)} off"
            )
        chosen.append(rng.permutation(members)[: quota[label]])
    out = np.sort(np.concatenate(chosen))
    kept = np.setdiff1d(np.arange(len(labels)), out, assume_unique=True)
    return kept, out
