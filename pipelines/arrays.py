"""Arrays of images in files: IDX (also .gz), .npy, .npz. Read as a stream, so that size does not matter.

The files come from other people: sizes and types are checked from the header, and nothing is ever unpickled.
"""

import contextlib
import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from digits.contract import IMAGE_BYTES, IMAGE_HEIGHT, IMAGE_WIDTH
from digits.errors import DigitsError

IMAGES: Final = "images"
LABELS: Final = "labels"
"""Names of the arrays in an .npz."""

_IDX_TYPES: Final = {
    0x08: "uint8", 0x09: "int8", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8",
}  # fmt: skip
_SHAPES: Final = f"(N, {IMAGE_HEIGHT}, {IMAGE_WIDTH}), (N, {IMAGE_HEIGHT}, {IMAGE_WIDTH}, 1) or (N, {IMAGE_BYTES})"


class BadInput(DigitsError):
    """A file or folder that was given holds something else than is read here."""

    code = "bad_input"


class Header(NamedTuple):
    """What an array's header says; ``offset`` is where its data begin in the (unpacked) file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of data that must follow."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_array_file(path: Path) -> bool:
    """Whether the name is one of an array file: .npy, .npz, or IDX with or without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith((".npy", ".npz", "-ubyte", ".idx", ".idx1", ".idx3")) or "idx3" in name or "idx1" in name


@contextlib.contextmanager
def open_array(path: Path, member: str = IMAGES) -> Iterator[tuple[Header, BinaryIO]]:
    """An array's header, and a stream that stands where its data begin.

    Args:
        path: the file.
        member: which array of an .npz.

    Raises:
        BadInput: it is missing, damaged, or no such file.
    """
    with contextlib.ExitStack() as stack:
        with _readable(path):
            header, stream = _open(path, member, stack)
        yield header, stream


def _open(path: Path, member: str, stack: contextlib.ExitStack) -> tuple[Header, BinaryIO]:
    stream: Any = stack.enter_context(path.open("rb"))
    if path.suffix == ".npz":
        archive = stack.enter_context(zipfile.ZipFile(stream))
        stream = stack.enter_context(_member_of(archive, path, member))
        return _npy_header(stream, path), stream
    if path.suffix == ".npy":
        return _npy_header(stream, path), stream
    if path.suffix == ".gz":
        stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
    return _idx_header(stream, path), stream


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, RuntimeError, NotImplementedError) as err:
        raise BadInput(f"{path} is cut short or damaged: {err}") from err
    except OSError as err:
        raise BadInput(f"{path} cannot be read: {err.strerror or err}") from err


def check_images(header: Header, path: Path) -> int:
    """How many images an array holds.

    Raises:
        BadInput: not uint8, or of another shape.
    """
    if header.dtype != np.uint8:
        raise BadInput(
            f"{path} holds {header.dtype.name}; images are uint8, ink 255 on paper 0. Convert them: "
            "np.clip(np.rint(images * 255), 0, 255).astype(np.uint8) if they are 0 to 1"
        )
    if header.shape[1:] not in ((IMAGE_HEIGHT, IMAGE_WIDTH), (IMAGE_HEIGHT, IMAGE_WIDTH, 1), (IMAGE_BYTES,)):
        raise BadInput(f"{path} has the shape {header.shape}; expected {_SHAPES}")
    return header.shape[0]


def read_images(path: Path) -> np.ndarray:
    """All images of a file -> uint8 (N, 28, 28).

    Raises:
        BadInput: as ``open_array`` and ``check_images``; or there are fewer or more bytes than the header says.
    """
    with open_array(path) as (header, stream):
        count = check_images(header, path)
        content = b"".join(chunks(header, stream, path))
    return np.frombuffer(content, np.uint8).reshape(count, IMAGE_HEIGHT, IMAGE_WIDTH)


def read_labels(path: Path) -> np.ndarray:
    """All labels of a file -> int64 (N,), unchecked.

    Raises:
        BadInput: as ``open_array``; or they are no list of whole numbers.
    """
    with open_array(path, LABELS) as (header, stream):
        if header.dtype.kind not in "iu" or len(header.shape) != 1:
            raise BadInput(
                f"{path}: labels are whole numbers of the shape (N,); came {header.dtype.name} {header.shape}"
            )
        content = b"".join(chunks(header, stream, path))
    return np.frombuffer(content, header.dtype).astype(np.int64)


def chunks(header: Header, stream: BinaryIO, path: Path, size_bytes: int = 1 << 20) -> Iterator[bytes]:
    """An array's data, piece by piece: exactly as much as its header says.

    Raises:
        BadInput: less or more came.
    """
    left = header.size_bytes
    while left:
        with _readable(path):
            piece = stream.read(min(size_bytes, left))
        if not piece:
            raise BadInput(
                f"{path} is cut short: its header says {header.shape}, {header.size_bytes:,} bytes; {left:,} are "
                "missing"
            )
        left -= len(piece)
        yield piece
    with _readable(path):
        more = stream.read(1)
    if more:
        raise BadInput(f"{path} is too long: more follows the {header.size_bytes:,} bytes that its header says")


def idx_header(*shape: int) -> bytes:
    """The header of an IDX file of uint8."""
    return struct.pack(f">HBB{len(shape)}I", 0, 0x08, len(shape), *shape)


def _idx_header(stream: BinaryIO, path: Path) -> Header:
    start = stream.read(4)
    kind = _IDX_TYPES.get(start[2]) if len(start) == 4 and start[:2] == b"\0\0" else None
    if kind is None or not 1 <= start[3] <= 4:
        raise BadInput(
            f"{path} is no IDX file: it begins with {start.hex() or 'nothing'}, where two zero bytes, a type and a "
            "number of dimensions belong"
        )
    sizes = stream.read(4 * start[3])
    if len(sizes) != 4 * start[3]:
        raise BadInput(f"{path} is cut short within its header")
    return Header(struct.unpack(f">{start[3]}I", sizes), np.dtype(kind), 4 + len(sizes))


def _npy_header(stream: BinaryIO, path: Path) -> Header:
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, in_columns, dtype = read(stream)
    except (ValueError, KeyError) as err:
        raise BadInput(f"{path} is no .npy array: {' '.join(str(err).split())[:200]}") from err
    if dtype.hasobject or not shape or (in_columns and len(shape) > 1):
        raise BadInput(f"{path} holds {dtype.name} {shape}; expected plain numbers, row by row (C order)")
    return Header(shape, dtype, stream.tell())


def _member_of(archive: zipfile.ZipFile, path: Path, member: str) -> contextlib.AbstractContextManager:
    names = archive.namelist()
    if f"{member}.npy" not in names:
        held = ", ".join(name.removesuffix(".npy") for name in names[:6]) or "nothing"
        raise BadInput(f"{path} has no array {member!r}; it holds {held}")
    return archive.open(f"{member}.npy")
