"""TensorFlow Serving's formats, without a transport: JSON and messages → images, answers → JSON.

As in https://www.tensorflow.org/tfx/serving/api_rest, for the one model that is served here. Everything is checked here
before it goes upstream: TensorFlow's own checks come after it has set memory aside for what a request declares.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import orjson
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from digits import contract
from digits.errors import BadRequest, NotFound
from serving.gateway.images import SHAPE, check_count, load_json, pixels_in
from serving.gateway.predictor import Answer
from serving.gateway.upstream import GET_MODEL_STATUS, LATEST, PREDICT, Version, no_servable
from serving.protos import upstream_pb2 as pb

MAX_VERSION: Final = 2**63 - 1

_CODES: Final = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
"""Names of the numbers in a version's status."""


class PredictBody(NamedTuple):
    """What a body of ``:predict`` asks."""

    images_u8: bytes
    images: int
    by_row: bool


# --- REST ---


def version_in(fields: dict[str, str]) -> Version:
    """The version that a path names.

    Raises:
        BadRequest: Its number is none.
    """
    number = fields.get("version")
    if number is not None:
        if not (number.isascii() and number.isdecimal() and len(number) < 20 and int(number) <= MAX_VERSION):
            raise BadRequest(f"Failed to convert version: {number[:32]} to numeric.")
        return Version(int(number))
    return Version(None, fields["label"]) if "label" in fields else LATEST


def read_predict(body: bytes, max_images: int) -> PredictBody:
    """The images in the body of ``:predict``, in row format (``instances``) or columnar (``inputs``).

    Raises:
        BadRequest: In TensorFlow Serving's words where it has them.
        TooLarge: More than ``max_images``.
    """
    document = load_json(body)
    _check_signature(document.get("signature_name", ""))
    if "instances" in document and "inputs" in document:
        raise BadRequest("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
    if "inputs" in document:
        inputs = document["inputs"]
        if isinstance(inputs, dict):
            inputs = _named_input(inputs, "'inputs' object")
        if not isinstance(inputs, list):
            raise BadRequest("inputs: expected a list of images, 28 rows of 28 pixels each")
        return PredictBody(pixels_in(inputs, "inputs", max_images), len(inputs), by_row=False)
    if "instances" not in document:
        raise BadRequest("Missing 'inputs' or 'instances' key")
    instances = document["instances"]
    if not isinstance(instances, list):
        raise BadRequest("Expecting 'instances' to be an list/array")
    if not instances:
        raise BadRequest("No values in 'instances' array")
    check_count(len(instances), max_images)
    named = isinstance(instances[0], dict)
    for at, instance in enumerate(instances):
        if isinstance(instance, dict) != named:
            came, wanted = ("list", "object") if named else ("object", "value/list")
            raise BadRequest(f"Expecting {wanted} but got {came} at item {at} of input list")
    if named:
        instances = [_named_input(one, f"element: {at} of 'instances' list") for at, one in enumerate(instances)]
    return PredictBody(pixels_in(instances, "instances", max_images), len(instances), by_row=True)


def dump_predict(answers: list[Answer], by_row: bool) -> bytes:
    """The answer of ``:predict``; floats in the shortest spelling that is the same float32."""
    probabilities = np.array([answer.probabilities for answer in answers], np.float32)  # (N, C)
    if by_row:
        rows = [
            {contract.OUTPUT_PROBABILITIES: row, contract.OUTPUT_DIGIT: answer.digit}
            for row, answer in zip(probabilities, answers, strict=True)
        ]
        return _dumps({"predictions": rows})
    digits = [answer.digit for answer in answers]
    return _dumps({"outputs": {contract.OUTPUT_PROBABILITIES: probabilities, contract.OUTPUT_DIGIT: digits}})


def dump_status(answer: bytes) -> bytes:
    """GetModelStatusResponse → JSON. What a version failed of is the operator's to read, at the model server."""
    statuses = pb.GetModelStatusResponse.FromString(answer).model_version_status
    rows = []
    for one in statuses:
        code = one.status.error_code
        rows.append(
            {
                "version": str(one.version),
                "state": pb.ModelVersionStatus.State.Name(one.state),
                "status": {
                    "error_code": _CODES[code] if 0 <= code < len(_CODES) else "UNKNOWN",
                    "error_message": "see the model server's log" if code else "",
                },
            }
        )
    return _dumps({"model_version_status": rows})


def dump_metadata(answer: bytes) -> bytes:
    """GetModelMetadataResponse → JSON."""
    response = pb.GetModelMetadataResponse.FromString(answer)
    spec = response.model_spec
    signatures = pb.SignatureDefMap.FromString(response.metadata["signature_def"].value)
    return _dumps(
        {
            "model_spec": {"name": spec.name, "signature_name": "", "version": str(spec.version.value)},
            "metadata": {
                "signature_def": MessageToDict(
                    signatures, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
                )
            },
        }
    )


def model_spec(version: Version) -> pb.ModelSpec:
    """This model in that version."""
    spec = pb.ModelSpec(name=contract.MODEL_NAME)
    if version.number is not None:
        spec.version.value = version.number
    elif version.label:
        spec.version_label = version.label
    return spec


def metadata_request(version: Version) -> bytes:
    """Asks for the signatures."""
    request = pb.GetModelMetadataRequest(model_spec=model_spec(version), metadata_field=("signature_def",))
    return request.SerializeToString()


def status_request(version: Version) -> bytes:
    """Asks for the states of the versions."""
    return pb.GetModelStatusRequest(model_spec=model_spec(version)).SerializeToString()


def unknown_model(name: str, fields: dict[str, str], *, status: bool) -> NotFound:
    """The error for a model that is not served here, when its ``status`` was asked or something else of it."""
    return NotFound(no_servable(name[:64], version_in(fields), GET_MODEL_STATUS if status else PREDICT))


# --- gRPC: what is looked at before a message is passed on ---


def check_predict(message: bytes, max_images: int) -> Version:
    """Look at a PredictRequest's bytes; returns the version it asks for.

    Raises:
        BadRequest: No such message, another signature, or not uint8 [N, 28, 28] under the one name.
        NotFound: Another model.
        TooLarge: More than ``max_images``.
    """
    try:
        request = pb.PassedPredictRequest.FromString(message)
    except DecodeError as err:
        raise BadRequest("the message is not a tensorflow.serving.PredictRequest") from err
    version = _check_spec(request.model_spec)
    _check_signature(request.model_spec.signature_name)
    if set(request.inputs) != {contract.INPUT_IMAGES}:
        raise BadRequest(
            f"expected the one input {contract.INPUT_IMAGES!r}, came {len(request.inputs)} inputs or another"
        )
    tensor = request.inputs[contract.INPUT_IMAGES]
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    if tensor.dtype != pb.DT_UINT8 or len(shape) != 3 or shape[1:] != SHAPE or tensor.tensor_shape.unknown_rank:
        raise BadRequest(
            f"{contract.INPUT_IMAGES}: expected DT_UINT8 [N, 28, 28], came data type {tensor.dtype} {[*shape]}"
        )
    check_count(shape[0], max_images)
    size = shape[0] * contract.IMAGE_BYTES
    if tensor.tensor_content:
        if len(tensor.tensor_content) != size:
            raise BadRequest(
                f"{contract.INPUT_IMAGES}: expected {size:,} bytes of tensor_content for {shape[0]} images, "
                f"came {len(tensor.tensor_content):,}"
            )
    elif not 1 <= len(tensor.int_val) <= size:  # fewer: the last stands for all that follow
        raise BadRequest(f"{contract.INPUT_IMAGES}: expected 1 to {size:,} values, came {len(tensor.int_val):,}")
    elif not 0 <= min(tensor.int_val) <= max(tensor.int_val) <= 255:
        raise BadRequest(f"{contract.INPUT_IMAGES}: expected values from 0 to 255 (uint8)")
    return version


def version_of(answer: bytes) -> str:
    """The version that gave a PredictResponse."""
    return str(pb.PredictResponse.FromString(answer).model_spec.version.value)


def check_metadata(message: bytes) -> Version:
    """Look at a GetModelMetadataRequest's bytes; errors as ``check_predict``."""
    try:
        request = pb.GetModelMetadataRequest.FromString(message)
    except DecodeError as err:
        raise BadRequest("the message is not a tensorflow.serving.GetModelMetadataRequest") from err
    return _check_spec(request.model_spec)


def check_status(message: bytes) -> Version:
    """Look at a GetModelStatusRequest's bytes; errors as ``check_predict``."""
    try:
        request = pb.GetModelStatusRequest.FromString(message)
    except DecodeError as err:
        raise BadRequest("the message is not a tensorflow.serving.GetModelStatusRequest") from err
    return _check_spec(request.model_spec, GET_MODEL_STATUS)


def plain_status(answer: bytes) -> bytes:
    """GetModelStatusResponse without the texts of its errors: they name files and more of the server's insides."""
    response = pb.GetModelStatusResponse.FromString(answer)
    for one in response.model_version_status:
        if one.status.error_code:
            one.status.error_message = "see the model server's log"
    return response.SerializeToString()


def _check_spec(spec: pb.ModelSpec, path: str = PREDICT) -> Version:
    if not spec.name:
        raise BadRequest("Missing ModelSpec")
    version = Version(spec.version.value) if spec.HasField("version") else Version(None, spec.version_label)
    if spec.name != contract.MODEL_NAME:
        raise NotFound(no_servable(spec.name[:64], version, path))
    return version


def _check_signature(name: Any) -> None:
    if not isinstance(name, str):
        raise BadRequest("JSON Value not formatted correctly. 'signature_name' key must be a string value.")
    if name == contract.ENCODED_SIGNATURE:
        raise BadRequest(f"the signature {name!r} is for trusted callers and not offered here: use POST /classify")
    if name not in ("", contract.SIGNATURE):
        raise BadRequest(f'Serving signature name: "{name[:64]}" not found in signature def')


def _named_input(named: dict[str, Any], where: str) -> Any:
    if named.keys() != {contract.INPUT_IMAGES}:
        raise BadRequest(f"Failed to process {where}: keys must be equal to: {contract.INPUT_IMAGES}")
    return named[contract.INPUT_IMAGES]


def _dumps(document: object) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
