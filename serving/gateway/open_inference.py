"""The open inference protocol, version 2, without a transport: JSON, binary tensors and messages ↔ images, answers.

As in https://github.com/kserve/open-inference-protocol and its binary tensor data extension: tensors as raw bytes after
the JSON, whose length the header ``Inference-Header-Content-Length`` tells.
"""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import orjson
from google.protobuf.message import DecodeError, Message

from digits import contract
from digits.errors import BadRequest, NotFound
from serving.gateway.images import SHAPE, bytes_of, check_count, load_json, pixels_in
from serving.gateway.metrics import VERSION
from serving.gateway.predictor import Answer
from serving.gateway.upstream import LATEST, Version
from serving.protos import open_inference_pb2 as pb

SERVER_NAME: Final = "digits-gateway"
EXTENSIONS: Final = ("binary_tensor_data",)
PLATFORM: Final = "tensorflow_savedmodel"
INPUTS: Final = ((contract.INPUT_IMAGES, "UINT8", (-1, *SHAPE)),)
"""Name, data type, shape; -1 for a size that varies."""

OUTPUTS: Final = ((contract.OUTPUT_PROBABILITIES, "FP32"), (contract.OUTPUT_DIGIT, "INT64"))
"""Name, data type."""

_OUTPUT_NAMES: Final = tuple(name for name, _ in OUTPUTS)


class Wanted(NamedTuple):
    """An output that was asked for, as JSON or as bytes after it."""

    name: str
    binary: bool


class Infer(NamedTuple):
    """What a request asks. ``raw``: a gRPC answer is to have raw contents."""

    images_u8: bytes
    images: int
    id: str
    outputs: list[Wanted]
    raw: bool = False


class Tensor(NamedTuple):
    """An output."""

    name: str
    datatype: str
    values: np.ndarray[Any, Any]


def version_in(name: str, version: str) -> Version:
    """The model and version that a path or message names; an empty version is the latest.

    Raises:
        NotFound: Another model, or no such version.
    """
    if name != contract.MODEL_NAME:
        raise NotFound(f"there is no model {name[:64]!r} here; the one that is served is {contract.MODEL_NAME!r}")
    if not version:
        return LATEST
    if not (version.isascii() and version.isdecimal() and len(version) < 19):
        raise NotFound(f"model {contract.MODEL_NAME!r} has no version {version[:32]!r}: versions are numbers")
    return Version(int(version))


def is_ready(version: Version, available: Iterable[str]) -> bool:
    """Whether that version, or any if none is named, is among those available."""
    return str(version.number) in available if version.number is not None else bool(tuple(available))


def available(version: Version, versions: tuple[str, ...]) -> tuple[str, ...]:
    """Of the available versions the one that is named, or all if none is.

    Raises:
        NotFound: It is not there.
    """
    if version.number is None:
        return versions
    if str(version.number) not in versions:
        raise NotFound(f"model {contract.MODEL_NAME!r} has no version {version.number} available")
    return (str(version.number),)


def server_metadata() -> dict[str, Any]:
    """Body of ``/v2``."""
    return {"name": SERVER_NAME, "version": VERSION, "extensions": list(EXTENSIONS)}


def model_metadata(versions: Iterable[str], class_count: int) -> dict[str, Any]:
    """Body of ``/v2/models/digits``. A number of classes that is not known is -1, as is any size that varies."""
    shapes = ((-1, class_count), (-1,))
    described = [(*output, shape) for output, shape in zip(OUTPUTS, shapes, strict=True)]
    inputs, outputs = (
        [{"name": name, "datatype": datatype, "shape": list(shape)} for name, datatype, shape in tensors]
        for tensors in (INPUTS, described)
    )
    return {
        "name": contract.MODEL_NAME,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": outputs,
    }


# --- REST ---


def read_body(body: bytes, json_size: str, max_images: int) -> Infer:
    """An inference request, with or without binary tensors after its JSON.

    Args:
        body: The whole body.
        json_size: ``Inference-Header-Content-Length``: bytes of JSON at the body's beginning; empty for all.
        max_images: Most images that are taken.

    Raises:
        BadRequest: It is none, or not of this model.
        TooLarge: More than ``max_images``.
    """
    is_number = json_size.isascii() and json_size.isdecimal() and len(json_size) < 16
    if json_size and not (is_number and int(json_size) <= len(body)):
        raise BadRequest(
            f"Inference-Header-Content-Length: expected at most the body's {len(body):,} bytes, came {json_size[:16]!r}"
        )
    size = int(json_size) if json_size else len(body)
    document = load_json(body[:size])
    rest = memoryview(body)[size:]
    inputs = _list_of_objects(document, "inputs")
    if len(inputs) != 1:
        raise BadRequest(f"expected the one input {contract.INPUT_IMAGES!r}, came {len(inputs)} inputs")
    shape = inputs[0].get("shape")
    if not isinstance(shape, list) or not all(type(one) is int for one in shape):
        raise BadRequest("inputs[0].shape: expected [N, 28, 28]")
    count = _check_input(inputs[0].get("name"), inputs[0].get("datatype"), shape, max_images)
    binary_size = _parameters(inputs[0], "inputs[0]").get("binary_data_size")
    if binary_size is not None:
        if "data" in inputs[0]:
            raise BadRequest("inputs[0]: expected `data` or the parameter `binary_data_size`, came both")
        if type(binary_size) is not int or binary_size != len(rest):
            raise BadRequest(f"inputs[0]: binary_data_size says {binary_size!r:.32}, but {len(rest):,} bytes came")
        images_u8 = _check_size(bytes(rest), count)
    else:
        if rest:
            raise BadRequest(f"{len(rest):,} bytes came after the JSON, but no input has a `binary_data_size`")
        images_u8 = _pixels(inputs[0].get("data"), count, max_images)
    name = document.get("id", "")
    if not isinstance(name, str):
        raise BadRequest("id: expected a string")
    return Infer(images_u8, count, name, _wanted(document))


def dump_body(request: Infer, answers: list[Answer]) -> tuple[bytes, int | None]:
    """The answer's body and, if binary tensors follow its JSON, the bytes of JSON."""
    outputs = []
    parts = []
    tensors = {tensor.name: tensor for tensor in _tensors(answers)}
    for name, binary in request.outputs:
        tensor = tensors[name]
        output: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": tensor.values.shape}
        if binary:
            parts.append(tensor.values.tobytes())
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            output["data"] = tensor.values.ravel()
        outputs.append(output)
    document = {
        "model_name": contract.MODEL_NAME,
        "model_version": answers[0].model_version,
        **({"id": request.id} if request.id else {}),
        "outputs": outputs,
    }
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join((head, *parts)), len(head) if parts else None


def _list_of_objects(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = document.get(key)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadRequest(f"{key}: expected a list of objects")
    return value


def _parameters(holder: dict[str, Any], where: str) -> dict[str, Any]:
    value = holder.get("parameters", {})
    if not isinstance(value, dict):
        raise BadRequest(f"{where}: expected `parameters` to be an object")
    return value


def _pixels(data: Any, count: int, max_images: int) -> bytes:
    if not isinstance(data, list) or not data:
        raise BadRequest("inputs[0].data: expected a list of pixels, flat or nested as the shape is")
    if not isinstance(data[0], list):
        return _check_size(bytes_of(data, "inputs[0].data"), count)
    return _check_size(pixels_in(data, "inputs[0].data", max_images), count)


def _wanted(document: dict[str, Any]) -> list[Wanted]:
    all_binary = _parameters(document, "request").get("binary_data_output", False) is True
    if not document.get("outputs"):
        return [Wanted(name, all_binary) for name in _OUTPUT_NAMES]
    outputs = _list_of_objects(document, "outputs")
    wanted = []
    for at, output in enumerate(outputs):
        binary = _parameters(output, f"outputs[{at}]").get("binary_data", all_binary) is True
        wanted.append(Wanted(str(output.get("name")), binary))
    return _check_wanted(wanted)


# --- gRPC ---


def read_message(message: bytes, max_images: int) -> tuple[Infer, Version]:
    """A ModelInferRequest's bytes → what it asks, and of which version.

    Raises:
        BadRequest, NotFound, TooLarge: As ``read_body`` and ``version_in``.
    """
    request = parse(pb.ModelInferRequest, message)
    version = version_in(request.model_name, request.model_version)
    if len(request.inputs) != 1:
        raise BadRequest(f"expected the one input {contract.INPUT_IMAGES!r}, came {len(request.inputs)} inputs")
    tensor = request.inputs[0]
    count = _check_input(tensor.name, tensor.datatype, list(tensor.shape), max_images)
    raw = bool(request.raw_input_contents)
    if raw:
        if len(request.raw_input_contents) != 1 or tensor.HasField("contents"):
            raise BadRequest("expected one raw_input_contents and no contents beside it")
        images_u8 = request.raw_input_contents[0]
    else:
        images_u8 = bytes_of(tensor.contents.uint_contents, f"{contract.INPUT_IMAGES}.contents.uint_contents")
    wanted = [Wanted(one.name, raw) for one in request.outputs] or [Wanted(name, raw) for name in _OUTPUT_NAMES]
    return Infer(_check_size(images_u8, count), count, request.id, _check_wanted(wanted), raw), version


def dump_message(request: Infer, answers: list[Answer]) -> bytes:
    """A ModelInferResponse's bytes; raw contents for raw contents."""
    response = pb.ModelInferResponse(
        model_name=contract.MODEL_NAME, model_version=answers[0].model_version, id=request.id
    )
    tensors = {tensor.name: tensor for tensor in _tensors(answers)}
    for name, _ in request.outputs:
        tensor = tensors[name]
        output = response.outputs.add(name=name, datatype=tensor.datatype, shape=tensor.values.shape)
        if request.raw:
            response.raw_output_contents.append(tensor.values.tobytes())
        elif tensor.datatype == "FP32":
            output.contents.fp32_contents.extend(tensor.values.ravel().tolist())
        else:
            output.contents.int64_contents.extend(tensor.values.ravel().tolist())
    return response.SerializeToString()


def parse(kind: type[Message], message: bytes) -> Any:
    """Bytes → a message of that kind.

    Raises:
        BadRequest: They are none.
    """
    try:
        return kind.FromString(message)
    except DecodeError as err:
        raise BadRequest(f"the message is not an inference.{kind.DESCRIPTOR.name}") from err


def model_metadata_message(versions: Iterable[str], class_count: int) -> bytes:
    """A ModelMetadataResponse's bytes."""
    return pb.ModelMetadataResponse(**model_metadata(versions, class_count)).SerializeToString()


# --- both ---


def _check_input(name: Any, datatype: Any, shape: list[int], max_images: int) -> int:
    """How many images an input declares."""
    if name != contract.INPUT_IMAGES:
        raise BadRequest(f"expected the one input {contract.INPUT_IMAGES!r}, came {str(name)[:64]!r}")
    if datatype != "UINT8" or len(shape) != 3 or tuple(shape[1:]) != SHAPE:
        came = f"{str(datatype)[:16]} {shape[:8]!r:.100}"
        raise BadRequest(f"{contract.INPUT_IMAGES}: expected UINT8 [N, 28, 28], came {came}")
    check_count(shape[0], max_images)
    return shape[0]


def _check_size(images_u8: bytes, count: int) -> bytes:
    size = count * contract.IMAGE_BYTES
    if len(images_u8) != size:
        raise BadRequest(
            f"{contract.INPUT_IMAGES}: expected {size:,} values for [{count}, 28, 28], came {len(images_u8):,}"
        )
    return images_u8


def _check_wanted(wanted: list[Wanted]) -> list[Wanted]:
    names = [one.name for one in wanted]
    unknown = set(names) - set(_OUTPUT_NAMES)
    if unknown or len(set(names)) != len(names):
        raise BadRequest(f"outputs: expected some of {', '.join(_OUTPUT_NAMES)}, each once")
    return wanted


def _tensors(answers: list[Answer]) -> list[Tensor]:
    probabilities = np.array([answer.probabilities for answer in answers], "<f4")  # (N, C)
    digits = np.array([answer.digit for answer in answers], "<i8")  # (N,)
    return [
        Tensor(name, datatype, values)
        for (name, datatype), values in zip(OUTPUTS, (probabilities, digits), strict=True)
    ]
