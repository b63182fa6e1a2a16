"""Bytes that nobody should send: pictures, JSON and protobuf, whole, bent and made up. Never a 500, never a crash."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi import checks

from serving.gateway.schema import ROUTES
from serving.protos import digits_pb2, open_inference_pb2
from serving.protos import upstream_pb2 as pb
from tests.serving.gateway.conftest import Here
from tests.serving.gateway.pictures import encode, png, stroke

CASES = 2000
LONG_CASES = 100_000

PIXELS = np.random.default_rng(3).integers(0, 256, (1, 28, 28), np.uint8)
SMALL = Image.fromarray(stroke(40))
PICTURES = [
    png(stroke()),
    png(stroke(33)),
    *(encode(SMALL, kind) for kind in ("JPEG", "GIF", "BMP", "WEBP", "TIFF")),
    png(np.dstack([stroke(30)] * 4)),
    PIXELS.tobytes(),
]
TENSOR = {"name": "images", "datatype": "UINT8", "shape": [1, 28, 28]}
DOCUMENTS: list[Any] = [
    {"instances": PIXELS.tolist()},
    {"instances": [{"images": PIXELS[0].tolist()}], "signature_name": "serving_default"},
    {"inputs": {"images": PIXELS.tolist()}},
    {"inputs": [{**TENSOR, "data": PIXELS.ravel().tolist()}], "id": "x"},
    {"inputs": [{**TENSOR, "data": PIXELS.tolist()}], "outputs": [{"name": "digit"}]},
]


def predict_request() -> pb.PredictRequest:
    request = pb.PredictRequest(model_spec=pb.ModelSpec(name="digits"))
    tensor = request.inputs["images"]
    tensor.dtype = pb.DT_UINT8
    for size in PIXELS.shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = PIXELS.tobytes()
    return request


def infer_request() -> open_inference_pb2.ModelInferRequest:
    request = open_inference_pb2.ModelInferRequest(model_name="digits", raw_input_contents=[PIXELS.tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=PIXELS.shape)
    return request


MESSAGES = [
    digits_pb2.ClassifyRequest(image=PICTURES[0]).SerializeToString(),
    predict_request().SerializeToString(),
    infer_request().SerializeToString(),
    pb.GetModelMetadataRequest(
        model_spec=pb.ModelSpec(name="digits"), metadata_field=("signature_def",)
    ).SerializeToString(),
    open_inference_pb2.ModelReadyRequest(name="digits", version="3").SerializeToString(),
]
METHODS = [
    "/digits.v1.Digits/Classify",
    "/tensorflow.serving.PredictionService/Predict",
    "/tensorflow.serving.PredictionService/GetModelMetadata",
    "/tensorflow.serving.ModelService/GetModelStatus",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelMetadata",
    "/inference.GRPCInferenceService/ModelReady",
]


@st.composite
def bent(draw: Callable[..., Any], seeds: list[bytes]) -> bytes:
    """One of the seeds with up to four pieces changed, dropped, doubled or put in."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from((1, 1, 2, 4, 16, 200))))
        new = draw(st.one_of(st.binary(max_size=8), st.just(data[start:stop] * 2), st.just(b"\xff" * (stop - start))))
        data = data[:start] + new + data[stop:]
    return data


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(
            st.sampled_from(
                ("instances", "inputs", "images", "name", "shape", "datatype", "data", "parameters", "outputs")
            )
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@st.composite
def bent_document(draw: Callable[..., Any]) -> bytes:
    """A sound request with one of its values replaced by anything."""
    document = json.loads(json.dumps(draw(st.sampled_from(DOCUMENTS))))
    place = document
    for _ in range(draw(st.integers(0, 4))):
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key]:
            break
        place = place[key]
    key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = draw(JSON)
    return json.dumps(document).encode(errors="surrogatepass")


FORM = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc\r\n--x--\r\n'
PICTURE_TYPES = (
    "application/octet-stream",
    "image/png",
    "image/jpeg",
    "",
    "multipart/form-data; boundary=x",
    "text/html",
)
picture = st.tuples(
    st.sampled_from(("/classify", "/read")),
    st.sampled_from(PICTURE_TYPES),
    bent(PICTURES) | st.binary(max_size=900) | bent([FORM]),
)
document = st.tuples(
    st.sampled_from(("/v1/models/digits:predict", "/v2/models/digits/infer", "/v2/models/digits/versions/3/infer")),
    st.just("application/json"),
    bent_document()
    | JSON.map(lambda value: json.dumps(value).encode(errors="surrogatepass"))
    | bent([json.dumps(one).encode() for one in DOCUMENTS]),
)
message = st.tuples(st.sampled_from(METHODS), st.just("grpc"), bent(MESSAGES) | st.binary(max_size=300))
case = picture | document | message


EXPECTED = (
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
)


def check(here: Here, what: tuple[str, str, bytes]) -> None:
    target, kind, body = what
    if kind == "grpc":
        call = here.channel.unary_unary(target).future(body, timeout=20)
        assert call.code() in EXPECTED, (call.code(), call.details())
        return
    answer = here.http.post(target, content=body, headers={"content-type": kind} if kind else {})
    assert answer.status_code in (200, 400, 404, 413, 415), (answer.status_code, answer.text)
    found = answer.json()
    if target == "/classify":
        assert ("digit" in found) == (answer.status_code == 200)


quick = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def everything_still_works(here: Here) -> None:
    assert here.log_lines("defect") == []
    assert here.classify(bytes(784)).json()["digit"] == 0
    assert here.metric("digits_requests_in_flight", protocol="rest") == 0


def test_two_thousand_bent_requests_are_refused_or_answered(here: Here) -> None:
    """No internal error, no traceback in the log, nothing left in flight."""
    quick(given(case)(lambda what: check(here, what)))()
    everything_still_works(here)


@pytest.mark.slow
def test_a_hundred_thousand_bent_requests_are_refused_or_answered(here: Here) -> None:
    """The same, new ones each time."""
    settings(quick, max_examples=LONG_CASES, derandomize=False)(given(case)(lambda what: check(here, what)))()
    everything_still_works(here)


CHECKS: list[CheckFunction] = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


def test_the_openapi_document_tells_the_truth(here: Here) -> None:
    """Schemathesis calls every operation with sound and unsound data: each status, header and body is as described."""
    schema = schemathesis.openapi.from_dict(here.http.get("/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == sum(route.listed for route in ROUTES)
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            def call(sent: schemathesis.Case) -> None:
                answer = sent.call(base_url=here.url, timeout=20)
                assert answer.status_code != 500
                sent.validate_response(answer, checks=CHECKS)

            strategy = operation.as_strategy(generation_mode=mode)
            # Where any text will do there is nothing unsound to send.
            with contextlib.suppress(*[Unsatisfiable] if mode.is_negative else []):
                settings(quick, max_examples=3)(given(strategy)(call))()
    everything_still_works(here)
