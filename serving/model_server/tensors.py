"""TensorProto ↔ numpy, with the types that TensorFlow Serving takes and gives."""

from typing import Any, Final

import ml_dtypes
import numpy as np
from tensorflow.core.framework import tensor_pb2, types_pb2

from serving.model_server.errors import ServingError, invalid_argument

MAX_REPEATED_BYTES: Final = 64 * 1024 * 1024
"""A proto may give one value for a whole tensor. Up to this size: a message of 30 bytes must not ask for terabytes."""

_FIELD_BY_NUMPY: Final[dict[Any, tuple[int, str]]] = {
    np.dtype(np.float32): (types_pb2.DT_FLOAT, "float_val"),
    np.dtype(np.float64): (types_pb2.DT_DOUBLE, "double_val"),
    np.dtype(np.int64): (types_pb2.DT_INT64, "int64_val"),
    np.dtype(np.int32): (types_pb2.DT_INT32, "int_val"),
    np.dtype(np.int16): (types_pb2.DT_INT16, "int_val"),
    np.dtype(np.int8): (types_pb2.DT_INT8, "int_val"),
    np.dtype(np.uint8): (types_pb2.DT_UINT8, "int_val"),
    np.dtype(np.uint16): (types_pb2.DT_UINT16, "int_val"),
    np.dtype(np.uint32): (types_pb2.DT_UINT32, "uint32_val"),
    np.dtype(np.uint64): (types_pb2.DT_UINT64, "uint64_val"),
    np.dtype(np.bool_): (types_pb2.DT_BOOL, "bool_val"),
    np.dtype(np.float16): (types_pb2.DT_HALF, "half_val"),
    np.dtype(ml_dtypes.bfloat16): (types_pb2.DT_BFLOAT16, "half_val"),
    np.dtype(np.complex64): (types_pb2.DT_COMPLEX64, "scomplex_val"),
    np.dtype(np.complex128): (types_pb2.DT_COMPLEX128, "dcomplex_val"),
    np.dtype(object): (types_pb2.DT_STRING, "string_val"),
}
_BY_TYPE: Final = {kind: (dtype, field) for dtype, (kind, field) in _FIELD_BY_NUMPY.items()}


def numpy_dtype(kind: int) -> np.dtype[Any] | None:
    """The numpy type of a ``DataType`` (object for strings), or None where none serves."""
    entry = _BY_TYPE.get(kind)
    return entry[0] if entry else None


def type_name(kind: int) -> str:
    """As TensorFlow prints it: ``float``, ``uint8``, ``string``."""
    return types_pb2.DataType.Name(kind)[3:].lower() if kind in types_pb2.DataType.values() else f"type {kind}"


def enum_name(array: np.ndarray[Any, Any]) -> str:
    """The type of an array as its ``DataType``: ``DT_FLOAT``, ``DT_STRING``."""
    entry = _FIELD_BY_NUMPY.get(array.dtype)
    return types_pb2.DataType.Name(entry[0]) if entry else str(array.dtype)


def type_of(array: np.ndarray[Any, Any]) -> str:
    """The type of an array as TensorFlow prints it."""
    entry = _FIELD_BY_NUMPY.get(array.dtype)
    return type_name(entry[0]) if entry else str(array.dtype)


def text(value: Any) -> str:
    """A value of a string tensor for a text field of a message, which must be UTF-8.

    Raises:
        ServingError: INVALID_ARGUMENT, it is not.
    """
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as err:
        raise invalid_argument(f"a string of the answer is not UTF-8: {value[:40]!r}") from err


def to_array(proto: tensor_pb2.TensorProto, alias: str) -> np.ndarray[Any, Any]:
    """The array in a proto, from ``tensor_content`` without a copy or from its typed field. Read-only.

    Fewer values than the shape holds repeat the last one, as everywhere in TensorFlow.

    Raises:
        ServingError: INVALID_ARGUMENT, the shape is negative or does not fit the content, or no such type is taken.
    """
    entry = _BY_TYPE.get(proto.dtype)
    if entry is None:
        raise _parsing_error(alias, f"type {type_name(proto.dtype)} is not taken here")
    dtype, field = entry
    shape = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        raise _parsing_error(alias, "the shape is not fully known")
    size = 1
    for dim in shape:
        size *= dim
    content = proto.tensor_content
    if content and dtype.kind != "O":
        if len(content) != size * dtype.itemsize:
            raise _parsing_error(
                alias, f"{len(content)} bytes of tensor_content, {size * dtype.itemsize} expected for shape {shape}"
            )
        return np.frombuffer(content, dtype).reshape(shape)
    return _from_values(getattr(proto, field), dtype, size, alias).reshape(shape)


def _from_values(values: Any, dtype: np.dtype[Any], size: int, alias: str) -> np.ndarray[Any, Any]:
    given = _given(values, dtype)
    if len(given) >= size:
        return given[:size]
    if size * dtype.itemsize > MAX_REPEATED_BYTES:
        raise _parsing_error(alias, f"{len(given)} values for {size} elements")
    full: np.ndarray[Any, Any] = np.empty(size, dtype)
    full[: len(given)] = given
    full[len(given) :] = given[-1] if len(given) else (b"" if dtype.kind == "O" else 0)
    return full


def _given(values: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if dtype.kind == "O":
        strings: np.ndarray[Any, Any] = np.empty(len(values), object)
        strings[:] = values
        return strings
    if dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        return np.array(values, np.uint16).view(dtype)
    if dtype.kind == "c":
        return np.array(values, np.float64).reshape(-1, 2) @ np.array([1, 1j]).astype(dtype)
    # As a C cast does: a value outside the type's range wraps.
    return np.array(values, np.int32 if dtype.itemsize < 4 and dtype.kind in "iu" else dtype).astype(dtype, copy=False)


def fill(proto: tensor_pb2.TensorProto, array: np.ndarray[Any, Any]) -> None:
    """Write ``array`` into an empty proto, into the typed field of its type as TensorFlow Serving does.

    Raises:
        ServingError: INVALID_ARGUMENT, an array type that has no place in a proto.
    """
    entry = _FIELD_BY_NUMPY.get(array.dtype)
    if entry is None:
        raise invalid_argument(f"an output of type {array.dtype} cannot be sent")
    proto.dtype, field = entry
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if array.dtype == np.float32:
        # A packed field is its little-endian bytes: far cheaper than one Python float a value.
        proto.MergeFromString(_packed(5, np.ascontiguousarray(array, "<f4").tobytes()))
        return
    flat = array.reshape(-1)
    if field == "half_val":
        flat = flat.view(np.uint16)
    elif array.dtype.kind == "c":
        flat = flat.view(flat.real.dtype)
    values = flat.tolist()
    if array.dtype.kind == "O":
        values = [value if isinstance(value, bytes) else str(value).encode() for value in values]
    getattr(proto, field).extend(values)


def _packed(number: int, content: bytes) -> bytes:
    """Wire format of a packed repeated field: tag, length, content."""
    length, left = bytearray(), len(content)
    while left > 0x7F:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    return bytes([number << 3 | 2]) + bytes(length) + content


def _parsing_error(alias: str, reason: str) -> ServingError:
    return invalid_argument(f"tensor parsing error: {alias}: {reason}")
