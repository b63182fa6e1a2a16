"""What is to be scored: so many rows, any range of which can be read at any time and from any process."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from digits.contract import IMAGE_BYTES, IMAGE_HEIGHT, IMAGE_WIDTH
from digits.errors import DigitsError
from digits.image import read_digit
from pipelines.arrays import BadInput, check_images, chunks, is_array_file, open_array

MAX_PICTURE_BYTES: Final = 64 << 20
"""A larger picture file is not read: its row is an error."""

BLANK_CONTRAST: Final = 8
"""Grey levels: an array's image with less between its lightest and darkest pixel has nothing drawn on it."""


@dataclass(frozen=True)
class Rows:
    """A range of the input; what could not be read has its error and an empty image."""

    images: np.ndarray
    """uint8 (N, 28, 28), ink 255 on paper 0."""
    names: list[str]
    errors: list[str | None]


@dataclass(frozen=True)
class Arrays:
    """Images that lie one after another in a file."""

    path: Path
    offset: int
    count: int

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``, that one excluded."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset + start * IMAGE_BYTES)
            content = stream.read((stop - start) * IMAGE_BYTES)
        if len(content) != (stop - start) * IMAGE_BYTES:
            raise BadInput(f"{self.path} has become shorter since the job began; expected {self.count:,} images")
        images = np.frombuffer(content, np.uint8).reshape(stop - start, IMAGE_HEIGHT, IMAGE_WIDTH)
        contrast = images.max(axis=(1, 2)).astype(int) - images.min(axis=(1, 2))
        errors = ["bad_image: nothing is drawn on it" if c < BLANK_CONTRAST else None for c in contrast]
        return Rows(images, [""] * len(images), errors)


@dataclass(frozen=True)
class Pictures:
    """Picture files in a folder. Their geometry is settled here, by the code that the gateway uses."""

    folder: Path
    names: tuple[str, ...]

    def read(self) -> Rows:
        """All of them."""
        images = np.zeros((len(self.names), IMAGE_HEIGHT, IMAGE_WIDTH), np.uint8)
        errors: list[str | None] = []
        for row, name in enumerate(self.names):
            try:
                images[row] = read_digit(_content(self.folder / name))
                errors.append(None)
            except OSError as err:
                errors.append(f"unreadable: {err.strerror or err}")
            except DigitsError as err:
                errors.append(f"{err.code}: {' '.join(str(err).split())}")
        return Rows(images, list(self.names), errors)


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_PICTURE_BYTES:
        raise BadInput(f"the file has {size:,} bytes; at most {MAX_PICTURE_BYTES:,} are read")
    return path.read_bytes()


def list_pictures(folder: Path) -> tuple[str, ...]:
    """Every file below a folder, sorted, hidden ones left out: each is to have its row.

    Raises:
        BadInput: there is none, or it holds arrays and no pictures.
    """
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.relpath(Path(root) / name, folder) for name in files if not name.startswith(".")]
    if not names:
        raise BadInput(f"{folder} is empty: expected pictures in it")
    if all(is_array_file(Path(name)) for name in names):
        raise BadInput(
            f"{folder} holds array files and no pictures: name the one to score, such as {folder / names[0]}"
        )
    return tuple(sorted(names))


def open_images(path: Path, spool: Path, on_unpacked: Callable[[int, int], None]) -> Arrays:
    """An array file ready to be read in ranges; a packed one (.gz, .npz) is unpacked to ``spool`` once.

    Args:
        path: IDX, IDX .gz, .npy or .npz of uint8 images.
        spool: where to; kept from an earlier, unfinished run it is used again.
        on_unpacked: told how many bytes are unpacked, of how many.

    Raises:
        BadInput: it is none, or damaged.
    """
    with open_array(path) as (header, stream):
        count = check_images(header, path)
        if path.suffix not in (".gz", ".npz"):
            size = path.stat().st_size
            if size != header.offset + header.size_bytes:
                raise BadInput(
                    f"{path} has {size:,} bytes; its header says {header.shape}, {header.offset + header.size_bytes:,}"
                )
            return Arrays(path, header.offset, count)
        if not (spool.is_file() and spool.stat().st_size == header.size_bytes):
            part = spool.with_name(f".{spool.name}.part")
            done = 0
            with part.open("wb") as out:
                for piece in chunks(header, stream, path):
                    out.write(piece)
                    done += len(piece)
                    on_unpacked(done, header.size_bytes)
            part.replace(spool)
    return Arrays(spool, 0, count)


def identity_of(path: Path) -> dict[str, Any]:
    """What tells whether the input is still the one that a job began with."""
    stat = path.stat()
    return {"path": str(path.absolute()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
