"""A folder of pictures for each class, read as the gateway reads pictures: what is trained on is what will be sent."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from digits.errors import DigitsError
from digits.image import read_digit
from training.workspace import BadRawData, Split

_CHUNK_PICTURES = 1024
_NAMED = 3


def read_folder(
    folder: Path, classes: tuple[str, ...], advance: Callable[[int, int], None] = lambda _done, _total: None
) -> Split:
    """Read ``folder/CLASS/…`` for each class; the pictures of a class in the order of their names.

    A picture of 28 x 28 keeps its geometry, any other is cut out, scaled and centred (digits/image.py).

    Args:
        folder: of one split.
        classes: the names of its folders; a picture's label is the place of its folder's name among them.
        advance: told how many pictures are read, of how many.

    Raises:
        BadRawData: a folder is missing, empty, or of no known class; or pictures cannot be read, the first of which is
            named.
    """
    files = list_pictures(folder, classes)
    images = np.empty((len(files), IMAGE_HEIGHT, IMAGE_WIDTH), np.uint8)
    unreadable: list[str] = []
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(files), _CHUNK_PICTURES):
            chunk = files[first : first + _CHUNK_PICTURES]
            for at, (found, (path, _)) in enumerate(zip(pool.map(_read, chunk), chunk, strict=True), first):
                if isinstance(found, str):
                    unreadable.append(f"{path}: {found}")
                else:
                    images[at] = found
            advance(first + len(chunk), len(files))
    if unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise BadRawData(f"{unreadable[0]}{more}. Replace or remove it, then `dvc add data`")
    return Split(images, np.array([label for _, label in files], np.int64))


def list_pictures(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The files of a split with their labels, class by class; hidden ones are left out.

    Raises:
        BadRawData: as ``read_folder``.
    """
    if not folder.is_dir():
        raise BadRawData(f"{folder} is missing: with data.format folder it holds a folder of pictures for each class")
    found = {path.name: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    strange = [name for name, path in found.items() if name not in classes or not path.is_dir()]
    missing = [name for name in classes if name not in found]
    if strange or missing:
        raise BadRawData(
            f"{folder}: expected a folder for each name of data.classes in params.yaml and nothing else; "
            f"{_some('missing', missing)}{'; ' if strange and missing else ''}{_some('unknown', strange)}"
        )
    files = [(path, label) for label, name in enumerate(classes) for path in sorted(_files_in(found[name]))]
    empty = set(range(len(classes))) - {label for _, label in files}
    if empty:
        raise BadRawData(f"{folder}: {_some('no picture in', [classes[label] for label in sorted(empty)])}")
    return files


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _read(file: tuple[Path, int]) -> np.ndarray | str:
    try:
        return read_digit(file[0].read_bytes())
    except OSError as err:
        return f"cannot be read: {err.strerror or err}"
    except DigitsError as err:
        return str(err)


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}: {', '.join(map(repr, names[:_NAMED]))}{more}"
