"""JSON bodies of the REST API ↔ arrays, in TensorFlow Serving's two formats.

Row: ``{"instances": […]}`` → ``{"predictions": […]}``, one element an example. Columnar: ``{"inputs": …}`` →
``{"outputs": …}``, one array a tensor. Bytes travel as ``{"b64": "…"}``.
"""

import base64
import binascii
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson
from tensorflow.core.protobuf import meta_graph_pb2

from serving.model_server import tensors
from serving.model_server.errors import Code, ServingError, invalid_argument

MAX_RANK: Final = 32
_MAX_ECHO_CHARS: Final = 200
_INF: Final = re.compile(rb'("(?:[^"\\]|\\.)*"?)|\bInf\b', re.DOTALL)
"""Strings, ended or not, to be left alone; or the short spelling of infinity."""
_JSON_TYPES: Final = {type(None): "Null", bool: "Bool", dict: "Object", list: "Array", str: "String"}

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class PredictBody:
    """A parsed body: its signature name and, still as JSON values, its tensors in row or columnar format."""

    signature_name: str
    row_format: bool
    content: Any


def load(body: bytes) -> tuple[dict[str, Any], str]:
    """Read any method's body: the object, and the signature name in it.

    Raises:
        ServingError: INVALID_ARGUMENT, no JSON object, or a signature name that is no string.
    """
    document = _loads(body)
    if not isinstance(document, dict):
        raise invalid_argument(f"JSON Value: {echo(document)} Is not object")
    signature_name = document.get("signature_name", "")
    if not isinstance(signature_name, str):
        raise invalid_argument("JSON Value not formatted correctly. 'signature_name' key must be a string value.")
    return document, signature_name


def parse(body: bytes) -> PredictBody:
    """Read the body of ``:predict``.

    Raises:
        ServingError: INVALID_ARGUMENT, no JSON object or not with exactly one of the two keys.
    """
    document, signature_name = load(body)
    if "instances" in document and "inputs" in document:
        raise invalid_argument("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
    if "inputs" in document:
        return PredictBody(signature_name, False, document["inputs"])
    if "instances" not in document:
        raise invalid_argument("Missing 'inputs' or 'instances' key")
    instances = document["instances"]
    if not isinstance(instances, list):
        raise invalid_argument("Expecting 'instances' to be an list/array")
    if not instances:
        raise invalid_argument("No values in 'instances' array")
    return PredictBody(signature_name, True, instances)


def read_inputs(body: PredictBody, signature: meta_graph_pb2.SignatureDef) -> Arrays:
    """The signature's inputs as arrays of its types.

    Raises:
        ServingError: INVALID_ARGUMENT, in TensorFlow Serving's words where clients may match on them.
    """
    if not signature.inputs:
        raise invalid_argument(f"Failed to get input map for signature: {body.signature_name or 'DEFAULT'}")
    kinds = {alias: info.dtype for alias, info in signature.inputs.items()}
    return _from_rows(body.content, kinds) if body.row_format else _from_columns(body.content, kinds)


def dump(outputs: Arrays, row_format: bool) -> bytes:
    """The answer's body.

    Raises:
        ServingError: INVALID_ARGUMENT, the row format needs outputs that share their first dimension.
    """
    if not row_format:
        return dumps({"outputs": _unwrapped({alias: _values(alias, array) for alias, array in outputs.items()})})
    sizes = set()
    for alias, array in outputs.items():
        if not array.ndim:
            raise invalid_argument(f"Tensor name: {alias} has no shape information ")
        sizes.add(len(array))
        if len(sizes) > 1:
            raise invalid_argument(f"Tensor name: {alias} has inconsistent batch size: {len(array)}")
    columns = {alias: _values(alias, array) for alias, array in outputs.items()}
    if len(columns) == 1:
        return dumps({"predictions": next(iter(columns.values()))})
    count = sizes.pop() if sizes else 0
    return dumps({"predictions": [{alias: column[i] for alias, column in columns.items()} for i in range(count)]})


def _loads(body: bytes) -> Any:
    if not body:
        raise invalid_argument("JSON Parse error: The document is empty")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as err:
        if b"NaN" in body or b"Inf" in body:
            with contextlib.suppress(ValueError, RecursionError, TypeError):
                return _loads_non_finite(body)
        raise invalid_argument(f"JSON Parse error: {err}") from err


def _loads_non_finite(body: bytes) -> Any:
    """JSON with NaN, Inf and Infinity, which orjson takes for errors and TensorFlow Serving does not."""
    document = json.loads(_INF.sub(lambda found: found[1] or b"Infinity", body).decode())
    orjson.dumps(document)  # raises for what its reader would refuse besides: half surrogate pairs, endless integers
    return document


def _from_rows(instances: list[Any], kinds: Mapping[str, int]) -> Arrays:
    named = _is_named(instances[0])
    if not named and len(kinds) > 1:
        raise invalid_argument(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
            "tensorinfo_map"
        )
    if not named:
        for index, instance in enumerate(instances):
            if _is_named(instance):
                raise invalid_argument(f"Expecting value/list but got object at item {index} of input list")
        ((alias, kind),) = kinds.items()
        return {alias: _to_array(instances, kind, "instances")}
    expected = set(kinds)
    for index, instance in enumerate(instances):
        if not _is_named(instance):
            raise invalid_argument(f"Expecting object but got list at item {index} of input list")
        if instance.keys() != expected:
            raise invalid_argument(
                f"Failed to process element: {index} of 'instances' list. JSON object: {echo(instance)} "
                f"keys must be equal to: {','.join(sorted(expected))}"
            )
    return {alias: _to_array([instance[alias] for instance in instances], kind, alias) for alias, kind in kinds.items()}


def _from_columns(content: Any, kinds: Mapping[str, int]) -> Arrays:
    if not _is_named(content):
        if len(kinds) > 1:
            raise invalid_argument(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        ((alias, kind),) = kinds.items()
        return {alias: _to_array(content, kind, alias)}
    for alias in kinds:
        if alias not in content:
            raise invalid_argument(f"Missing named input: {alias} in 'inputs' object.")
    return {alias: _to_array(content[alias], kind, alias) for alias, kind in kinds.items()}


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and not is_base64(value)


def is_base64(value: Any) -> bool:
    """Whether the JSON value is an object that holds bytes."""
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def to_bytes(value: Any) -> bytes:
    """The bytes of a JSON string, or of an object that ``is_base64``.

    Raises:
        ServingError: INVALID_ARGUMENT, it is not base64.
    """
    try:
        return value.encode() if isinstance(value, str) else base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError) as err:
        raise invalid_argument("Unable to base64 decode") from err


def type_name(value: Any) -> str:
    """The JSON type of a parsed value, as in messages."""
    return _JSON_TYPES.get(type(value), "Number")


def _to_array(value: Any, kind: int, where: str) -> np.ndarray[Any, Any]:
    """One tensor. Numbers go through numpy; strings, and whatever is wrong, value by value."""
    dtype = tensors.numpy_dtype(kind)
    if dtype is None or dtype.kind == "c":
        raise ServingError(Code.UNIMPLEMENTED, f"Conversion of JSON values to type: {tensors.type_name(kind)}")
    shape = _shape(value)
    if dtype.kind != "O":
        array = _numbers(value, dtype)
        if array is not None and array.shape == shape:
            return array
    leaves = list(_leaves(value, shape, 0, where))
    flat: np.ndarray[Any, Any] = np.empty(len(leaves), dtype)
    for index, leaf in enumerate(leaves):
        flat[index] = _scalar(leaf, kind, dtype)
    return flat.reshape(shape)


def _shape(value: Any) -> tuple[int, ...]:
    shape: list[int] = []
    while isinstance(value, list):
        shape.append(len(value))
        if len(shape) > MAX_RANK:
            raise invalid_argument(f"lists are nested deeper than {MAX_RANK} levels")
        if not value:
            break
        value = value[0]
    return tuple(shape)


def _numbers(value: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any] | None:
    """The quick way for clean numbers; None where something needs a closer look."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError):
        return None  # ragged
    if not array.size:
        return array.astype(dtype)
    if dtype.kind == "b":
        return array if array.dtype.kind == "b" else None
    if dtype.kind in "iu":
        if array.dtype.kind not in "iu":
            return None
        limits = np.iinfo(dtype)
        return array.astype(dtype) if limits.min <= array.min() and array.max() <= limits.max else None
    if array.dtype.kind == "f" and dtype.itemsize == 8:
        return array.astype(dtype)
    if array.dtype.kind in "iuf":
        # 2**24 for float: whole numbers beyond it are not exact; a slower look says which one.
        exact = 2.0 ** (np.finfo(dtype).nmant + 1) if array.dtype.kind in "iu" else float(np.finfo(dtype).max)
        wide = array.astype(np.float64)
        return array.astype(dtype) if np.abs(wide[np.isfinite(wide)]).max(initial=0) < exact else None
    return None


def _leaves(value: Any, shape: tuple[int, ...], level: int, where: str) -> Iterator[Any]:
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid_argument(
                f"JSON Value: {echo(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        yield value
        return
    if level >= len(shape):
        raise invalid_argument(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise invalid_argument(
            f"Failed to process {where}: Encountered list at unexpected size: {len(value)} at level: {level} "
            f"expected size: {shape[level]}"
        )
    for item in value:
        yield from _leaves(item, shape, level + 1, where)


def _scalar(value: Any, kind: int, dtype: np.dtype[Any]) -> Any:
    name = tensors.type_name(kind)
    if dtype.kind == "O":
        if isinstance(value, str) or is_base64(value):
            return to_bytes(value)
        if isinstance(value, dict):
            raise invalid_argument(f"JSON Value: {echo(value)} not formatted correctly for base64 data")
    elif dtype.kind == "b" and isinstance(value, bool):
        return value
    elif isinstance(value, int) and not isinstance(value, bool):
        if dtype.kind in "iu" and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return value
        if dtype.kind == "f" or (dtype.itemsize == 2 and dtype.kind == "V"):
            if abs(value) >= 2 ** (np.finfo(dtype).nmant + 1):
                raise invalid_argument(f"Cannot convert JSON value: {value} to {name} without loss of precision.")
            return value
    elif isinstance(value, float) and dtype.kind == "f":
        if np.isfinite(value) and abs(value) > float(np.finfo(dtype).max):
            raise invalid_argument(f"Cannot convert JSON value: {value} to {name} without loss of precision.")
        return value
    raise invalid_argument(f"JSON Value: {echo(value)} Type: {type_name(value)} is not of expected type: {name}")


def echo(value: Any) -> str:
    """The value as JSON for a message, not too long."""
    text = orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    return text if len(text) <= _MAX_ECHO_CHARS else text[:_MAX_ECHO_CHARS] + "…"


def _unwrapped(columns: Mapping[str, Any]) -> Any:
    return columns if len(columns) != 1 else next(iter(columns.values()))


def _values(alias: str, array: np.ndarray[Any, Any]) -> Any:
    if array.dtype.kind == "O":
        return _strings(array, as_bytes=alias.endswith("_bytes"))
    if array.dtype.kind in "fiub" and array.dtype.itemsize <= 8 and array.dtype != np.float16:
        return np.asarray(array, order="C")
    if array.dtype.kind == "c":
        raise invalid_argument(f"Failed to write JSON value for tensor type: {array.dtype}")
    return np.asarray(array, np.float32, order="C")  # float16 and bfloat16 fit exactly


def _strings(array: np.ndarray[Any, Any], as_bytes: bool) -> Any:
    def text(value: Any) -> Any:
        content = value if isinstance(value, bytes) else str(value).encode()
        if not as_bytes:
            try:
                return content.decode()
            except UnicodeDecodeError:
                pass  # no JSON string can hold it
        return {"b64": base64.b64encode(content).decode()}

    return np.frompyfunc(text, 1, 1)(array).tolist() if array.ndim else text(array.item())


def dumps(document: Any) -> bytes:
    """JSON of a document that may hold arrays; NaN and infinities as TensorFlow Serving writes them."""
    if not _all_finite(document):
        return json.dumps(document, default=_plain).encode()
    return orjson.dumps(document, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)


def _all_finite(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind != "f" or bool(np.isfinite(value).all())
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_all_finite(item) for item in value.values())
    return not isinstance(value, list) or all(_all_finite(item) for item in value)


def _plain(value: Any) -> Any:
    """What the JSON writers leave to us: arrays, with float32 in its shortest spelling."""
    if isinstance(value, np.ndarray):
        if value.dtype == np.float32:
            shortest = [float(str(number)) for number in value.reshape(-1)]
            return np.array(shortest).reshape(value.shape).tolist()
        return value.tolist()
    if isinstance(value, np.float32):
        return float(str(value))
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")
