"""TensorFlow Serving's API at the gateway: REST in both formats, gRPC passed on, what is refused before it goes on."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.protos import upstream_pb2 as pb
from tests.serving.gateway.conftest import Here, eventually, random_images
from tests.serving.gateway.upstream_server import expected_probabilities

PATH = "/v1/models/digits"
PREDICT = "/tensorflow.serving.PredictionService/Predict"
METADATA = "/tensorflow.serving.PredictionService/GetModelMetadata"
STATUS = "/tensorflow.serving.ModelService/GetModelStatus"


def nested(images_u8: np.ndarray) -> list[Any]:
    return images_u8.reshape(-1, 28, 28).tolist()


def predict(here: Here, document: object, path: str = f"{PATH}:predict") -> httpx.Response:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return here.http.post(path, content=body)


def error(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    text: str = answer.json()["error"]
    assert isinstance(text, str)
    assert "Traceback" not in text
    assert "secret" not in text
    return text


@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
def test_rows_and_columns_are_answered_in_their_own_format(here: Here, named: bool) -> None:
    """Row: an object an image. Columnar: a list a tensor. The same float32 values in both."""
    images = random_images(5, 1)
    expected = expected_probabilities(images)
    rows = [{"images": one} for one in nested(images)] if named else nested(images)
    answer = predict(here, {"instances": rows})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    predictions = answer.json()["predictions"]
    assert [one["digit"] for one in predictions] == (images[:, 0] % 10).tolist()
    np.testing.assert_array_equal(np.float32([one["probabilities"] for one in predictions]), expected)

    columns = {"images": nested(images)} if named else nested(images)
    answer = predict(here, {"signature_name": "serving_default", "inputs": columns})
    outputs = answer.json()["outputs"]
    assert outputs["digit"] == (images[:, 0] % 10).tolist()
    np.testing.assert_array_equal(np.float32(outputs["probabilities"]), expected)
    assert here.behaviour.batches == [5, 5]


def test_floats_are_written_as_short_as_their_type_allows(here: Here) -> None:
    """As TensorFlow Serving does: 0.1 of float32 is not 0.10000000149011612."""
    answer = predict(here, {"instances": nested(random_images(1))})
    for text in answer.text.partition("[")[2].partition("[")[2].partition("]")[0].split(","):
        assert len(text) <= 14


def test_a_version_or_label_is_asked_for_by_path(here: Here) -> None:
    """It goes to the model server with the call; one that is not there is 404 in TensorFlow Serving's words."""
    images = {"instances": nested(random_images(1))}
    assert predict(here, images, f"{PATH}/versions/3:predict").status_code == 200
    assert here.upstream.last_request.model_spec.version.value == 3
    assert predict(here, images, f"{PATH}/labels/stable:predict").status_code == 200
    assert here.upstream.last_request.model_spec.version_label == "stable"
    answer = predict(here, images, f"{PATH}/versions/7:predict")
    assert error(answer, 404) == "Servable not found for request: Specific(digits, 7)"
    answer = predict(here, images, f"{PATH}/labels/canary:predict")
    assert error(answer, 400) == "Unrecognized servable version label: canary"
    for number in ("x", "-1", "99999999999999999999", "9223372036854775808", "٣"):
        assert "to numeric" in error(predict(here, images, f"{PATH}/versions/{number}:predict"), 400)


def test_calls_for_different_versions_do_not_go_upstream_together(start: Callable[..., Here]) -> None:
    """What waits is sent by version."""
    here = start(max_upstream_calls=1)

    async def calls() -> None:
        from serving.gateway.upstream import LATEST, Version
        from tests.serving.gateway.test_predictor import far

        here.behaviour.hold = asyncio.Event()
        submit = here.gateway.predictor.submit
        first = submit(bytes(784), 1, far())
        while not here.behaviour.under_way:  # noqa: ASYNC110 - the server knows no events
            await asyncio.sleep(0.001)
        order = [LATEST, LATEST, Version(3), Version(3), Version(3), Version(None, "stable"), LATEST]
        others = [submit(bytes(784), 1, far(), version) for version in order]
        here.behaviour.hold.set()
        await asyncio.gather(first, *others)

    here.thread.run(calls())
    assert here.behaviour.batches == [1, 2, 3, 1, 1]


GOOD = nested(random_images(1))[0]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "JSON Parse error"),
        (b"{", "JSON Parse error"),
        (b'{"instances":[NaN]}', "JSON Parse error"),
        (b'{"instances":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON Parse error"),
        (b'{"instances":' + b"[" * 500 + b"]" * 500 + b"}", "28 rows"),
        (b'{"instances":[' + b"[]," * 100_000 + b"[]]}", "brackets"),
        (b"[1]", "a JSON object"),
        ({}, "Missing 'inputs' or 'instances' key"),
        ({"inputs": [GOOD], "instances": [GOOD]}, "only one of"),
        ({"instances": GOOD[0]}, "28 rows"),
        ({"instances": [GOOD], "signature_name": "other"}, 'Serving signature name: "other" not found'),
        ({"instances": [GOOD], "signature_name": "encoded"}, "trusted callers"),
        ({"instances": [GOOD], "signature_name": 1}, "must be a string"),
        ({"instances": {}}, "Expecting 'instances' to be an list/array"),
        ({"instances": []}, "No values in 'instances' array"),
        ({"inputs": []}, "came none"),
        ({"inputs": 5}, "a list of images"),
        ({"inputs": {"pictures": [GOOD]}}, "keys must be equal to: images"),
        ({"instances": [{"images": GOOD, "more": 1}]}, "keys must be equal to: images"),
        ({"instances": [GOOD, {"images": GOOD}]}, "Expecting value/list but got object at item 1"),
        ({"instances": [{"images": GOOD}, GOOD]}, "Expecting object but got list at item 1"),
        ({"instances": [GOOD[:27]]}, "28 rows of 28 pixels, came a list of 27"),
        ({"instances": [[*GOOD[:27], GOOD[0][:5]]]}, "rows of 28 pixels, came a list of 5"),
        ({"instances": [[*GOOD[:27], 28]]}, "rows of 28 pixels, came a number"),
        ({"instances": [[*GOOD[:27], "x" * 28]]}, "rows of 28 pixels, came a string"),
        ({"instances": [[*GOOD[:27], [256] * 28]]}, "from 0 to 255"),
        ({"instances": [[*GOOD[:27], [-1] * 28]]}, "from 0 to 255"),
        ({"instances": [[*GOOD[:27], [1.0] * 28]]}, "from 0 to 255"),
        ({"instances": [[*GOOD[:27], [True] * 28]]}, "true or false"),
        ({"instances": [[*GOOD[:27], ["1"] * 28]]}, "from 0 to 255"),
        ({"instances": [[*GOOD[:27], [None] * 28]]}, "from 0 to 255"),
        ({"instances": [[*GOOD[:27], [10**30] * 28]]}, "from 0 to 255"),
    ],
)
def test_what_is_no_batch_of_images_is_refused_before_it_goes_upstream(here: Here, body: object, part: str) -> None:
    """400 with one line that says what was expected; the model server sees nothing of it."""
    assert part in error(predict(here, body), 400)
    assert here.behaviour.batches == []


@pytest.mark.filterwarnings("ignore")
def test_body_batch_and_encoding_are_bounded(start: Callable[..., Here]) -> None:
    """413 for both sizes, 415 for a compressed body."""
    here = start(max_request_images=3, max_body_bytes=100_000)
    images = nested(random_images(4))
    assert predict(here, {"instances": images[:3]}).status_code == 200
    assert "at most 3 images" in error(predict(here, {"instances": images}), 413)
    assert "at most 3 images" in error(predict(here, {"inputs": images}), 413)
    assert "bytes" in error(predict(here, b" " * 100_001), 413)
    answer = here.http.post(f"{PATH}:predict", content=b"x", headers={"content-encoding": "gzip"})
    assert "uncompressed" in error(answer, 415)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.UNAVAILABLE, 503),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
        (grpc.StatusCode.INTERNAL, 500),
    ],
)
def test_upstream_failures_have_their_status(here: Here, code: grpc.StatusCode, status: int) -> None:
    """In the protocol's own error body, never in the upstream's words."""
    here.behaviour.abort = (code, "secret inner workings")
    answer = predict(here, {"instances": nested(random_images(1))})
    error(answer, status)
    assert ("retry-after" in answer.headers) == (status == 429)


def test_status_and_metadata_are_told(here: Here) -> None:
    """In TensorFlow Serving's JSON: numbers of 64 bits as strings; the insides of a failed version are kept back."""
    here.behaviour.broken_version = 4
    ok = {"version": "3", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    answer = here.http.get(PATH)
    first, second = answer.json()["model_version_status"]
    assert first == ok
    assert (second["version"], second["state"], second["status"]["error_code"]) == ("4", "END", "INTERNAL")
    assert "secret" not in answer.text
    here.behaviour.broken_version = 0
    assert here.http.get(f"{PATH}/versions/3").json() == {"model_version_status": [ok]}

    for path in (f"{PATH}/metadata", f"{PATH}/versions/3/metadata", f"{PATH}/labels/stable/metadata"):
        told = here.http.get(path).json()
        assert told["model_spec"] == {"name": "digits", "signature_name": "", "version": "3"}
        signature = told["metadata"]["signature_def"]["signature_def"]["serving_default"]
        images = signature["inputs"]["images"]
        assert images["dtype"] == "DT_UINT8"
        assert [dim["size"] for dim in images["tensor_shape"]["dim"]] == ["-1", "28", "28"]
        assert signature["method_name"] == "tensorflow/serving/predict"
    assert error(here.http.get(f"{PATH}/versions/7"), 404) == "Could not find version 7 of model digits"
    missing = here.http.get(f"{PATH}/versions/7/metadata")
    assert error(missing, 404) == "Servable not found for request: Specific(digits, 7)"
    assert error(here.http.get(f"{PATH}/labels/x"), 400) == "Unrecognized servable version label: x"


def test_other_models_methods_and_paths_have_their_errors(here: Here) -> None:
    """404 for a model that is not there, 400 for what is no path of the API, 501 for what is not offered."""
    for path, text in {
        "/v1/models/cats:predict": "Servable not found for request: Latest(cats)",
        "/v1/models/cats/versions/2:predict": "Servable not found for request: Specific(cats, 2)",
    }.items():
        assert error(here.http.post(path, content=b"{}"), 404) == text
    assert error(here.http.get("/v1/models/cats"), 404) == "Could not find any versions of model cats"
    assert "Latest(cats)" in error(here.http.get("/v1/models/cats/metadata"), 404)
    for path in ("/v1/models", "/v1/models/", "/v1/nothing", "/v1/models/digits/versions", "/v1/models/digits/nothing"):
        assert "Malformed request" in error(here.http.get(path), 400)
    assert "Malformed request" in error(here.http.post("/v1/models/cats", content=b"{}"), 400)
    assert "only :predict" in error(here.http.post(f"{PATH}:classify", content=b"{}"), 501)
    assert error(here.http.get(f"{PATH}:predict"), 405)


def test_the_new_routes_are_counted_by_pattern(start: Callable[..., Here]) -> None:
    """A version that a user names is no label; the version that answered is."""
    here = start()
    for number in range(5, 25):
        predict(here, {"instances": [GOOD]}, f"{PATH}/versions/{number}:predict")
        here.http.get(f"/v1/models/made-up-{number}")
    predict(here, {"instances": [GOOD]})
    labels = {"protocol": "rest", "route": f"{PATH}/versions/{{version}}:predict", "code": "404", "model_version": ""}
    assert here.metric("digits_requests_total", **labels) == 20
    labels = {"protocol": "rest", "route": f"{PATH}:predict", "code": "200", "model_version": "3"}
    assert here.metric("digits_requests_total", **labels) == 1
    assert "made-up" not in here.http.get("/metrics").text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["images", "b64", ""]), inner),
        max_leaves=12,
    ),
    st.sampled_from(["instances", "inputs", "signature_name"]),
)
def test_no_json_leads_to_a_500(here: Here, value: object, key: str) -> None:
    """Whatever stands where images are expected is a 400."""
    body = json.dumps({"instances": [GOOD], key: value} if key == "signature_name" else {key: value})
    answer = here.http.post(f"{PATH}:predict", content=body.encode("utf-8", "surrogatepass"))
    assert answer.status_code == (200 if (key, value) == ("signature_name", "") else 400), answer.text


# --- gRPC ---


def request_of(images_u8: np.ndarray, **spec: Any) -> pb.PassedPredictRequest:
    request = pb.PassedPredictRequest(model_spec=pb.ModelSpec(**{"name": "digits", **spec}))
    tensor = request.inputs["images"]
    tensor.dtype = pb.DT_UINT8
    for size in (len(images_u8), 28, 28):
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = images_u8.tobytes()
    return request


def call(here: Here, path: str, message: Any, **more: Any) -> bytes:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    answer: bytes = here.channel.unary_unary(path)(data, **{"timeout": 20, **more})
    return answer


def refused(here: Here, path: str, message: Any, **more: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(here, path, message, **more)
    assert "secret" not in caught.value.details()
    return caught.value


def test_a_predict_request_is_passed_on_as_it_came(here: Here) -> None:
    """Its answer too, with the request id beside it."""
    images = random_images(4, 2)
    answer = pb.PredictResponseOfFloats.FromString(call(here, PREDICT, request_of(images)))
    found = np.float32(answer.outputs["probabilities"].float_val).reshape(4, 10)
    np.testing.assert_array_equal(found, expected_probabilities(images))
    assert answer.model_spec.version.value == 3
    request = request_of(images, version=pb.Version(value=3), signature_name="serving_default")
    request_filter = pb.PredictRequest.FromString(request.SerializeToString())
    request_filter.output_filter.append("probabilities")
    call(here, PREDICT, request_filter)
    assert here.upstream.last_request == request_filter


def _changed(change: Callable[[pb.PassedPredictRequest], object]) -> bytes:
    request = request_of(random_images(2))
    change(request)
    return request.SerializeToString()


def _tensor(request: pb.PassedPredictRequest) -> Any:
    return request.inputs["images"]


INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("message", "code", "part"),
    [
        (b"\xff\xff\xff", INVALID, "not a tensorflow.serving.PredictRequest"),
        (b"", INVALID, "Missing ModelSpec"),
        (_changed(lambda r: setattr(r.model_spec, "name", "cats")), NOT_FOUND, "Latest(cats)"),
        (_changed(lambda r: setattr(r.model_spec, "signature_name", "encoded")), INVALID, "trusted callers"),
        (_changed(lambda r: setattr(r.model_spec, "signature_name", "x")), INVALID, 'signature name: "x" not found'),
        (_changed(lambda r: r.inputs["more"]), INVALID, "the one input 'images'"),
        (_changed(lambda r: r.inputs.clear()), INVALID, "the one input 'images'"),
        (_changed(lambda r: setattr(_tensor(r), "dtype", 1)), INVALID, "expected DT_UINT8 [N, 28, 28]"),
        (_changed(lambda r: _tensor(r).tensor_shape.dim.pop()), INVALID, "expected DT_UINT8 [N, 28, 28]"),
        (_changed(lambda r: setattr(_tensor(r).tensor_shape.dim[1], "size", 29)), INVALID, "[2, 29, 28]"),
        (_changed(lambda r: setattr(_tensor(r).tensor_shape.dim[0], "size", 0)), INVALID, "came none"),
        (_changed(lambda r: setattr(_tensor(r).tensor_shape.dim[0], "size", -1)), INVALID, "came none"),
        (_changed(lambda r: setattr(_tensor(r).tensor_shape.dim[0], "size", 2**62)), INVALID, "at most 4,096 images"),
        (_changed(lambda r: setattr(_tensor(r), "tensor_content", b"x")), INVALID, "1,568 bytes"),
        (_changed(lambda r: setattr(_tensor(r), "tensor_content", b"")), INVALID, "1 to 1,568 values, came 0"),
        (
            _changed(lambda r: (setattr(_tensor(r), "tensor_content", b""), _tensor(r).int_val.append(256))),
            INVALID,
            "from 0 to 255",
        ),
    ],
)
def test_a_predict_request_that_is_no_batch_of_images_is_not_passed_on(
    here: Here, message: bytes, code: grpc.StatusCode, part: str
) -> None:
    """Name, signature, type, shape and size are looked at here: the model server sees nothing of it."""
    err = refused(here, PREDICT, message)
    assert err.code() is code
    assert part in err.details()
    assert here.behaviour.batches == []


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNKNOWN,
    ],
)
def test_the_upstreams_code_is_kept_and_its_words_are_not(here: Here, code: grpc.StatusCode) -> None:
    """And the call is counted under it."""
    here.behaviour.abort = (code, "secret inner workings")
    labels = {"protocol": "grpc", "route": "Predict", "code": code.name, "model_version": ""}
    before = here.metric("digits_requests_total", **labels)
    assert refused(here, PREDICT, request_of(random_images(1))).code() is code
    eventually(lambda: here.metric("digits_requests_total", **labels) == before + 1)


def test_the_callers_deadline_goes_with_the_call(here: Here) -> None:
    """A model server that is slower than it is left; the place is free again."""
    here.behaviour.delay_s = 20
    err = refused(here, PREDICT, request_of(random_images(1)), timeout=0.3)
    assert err.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: here.behaviour.under_way == 0)


def test_calls_passed_on_are_bounded(start: Callable[..., Here]) -> None:
    """More are refused at once with a code that says so."""
    here = start(max_passed_calls=2)

    async def hold() -> None:
        here.behaviour.hold = asyncio.Event()

    here.thread.run(hold())
    method = here.channel.unary_unary(PREDICT)
    message = request_of(random_images(1)).SerializeToString()
    held = [method.future(message) for _ in range(2)]
    eventually(lambda: here.behaviour.under_way == 2)
    err = refused(here, PREDICT, message)
    assert err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert here.metric("digits_shed_total", reason="passed_calls_full") == 1
    here.thread.call(here.behaviour.hold.set)
    assert all(one.result() for one in held)
    assert call(here, PREDICT, message)


def test_metadata_and_status_are_passed_on(here: Here) -> None:
    """Of this model only; the texts of a failed version's error stay behind."""
    spec = pb.ModelSpec(name="digits")
    request = pb.GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"])
    answer = pb.GetModelMetadataResponse.FromString(call(here, METADATA, request))
    assert answer.model_spec.version.value == 3
    assert "serving_default" in pb.SignatureDefMap.FromString(answer.metadata["signature_def"].value).signature_def

    here.behaviour.broken_version = 4
    status = pb.GetModelStatusResponse.FromString(call(here, STATUS, pb.GetModelStatusRequest(model_spec=spec)))
    assert [(one.version, one.state, one.status.error_code) for one in status.model_version_status] == [
        (3, 30, 0),
        (4, 50, 13),
    ]
    assert "secret" not in str(status)
    cats = pb.ModelSpec(name="cats")
    assert refused(here, METADATA, pb.GetModelMetadataRequest(model_spec=cats)).code() is NOT_FOUND
    assert refused(here, STATUS, pb.GetModelStatusRequest(model_spec=cats)).code() is NOT_FOUND
    assert refused(here, METADATA, b"\xff").code() is INVALID
    missing = pb.ModelSpec(name="digits", version=pb.Version(value=7))
    err = refused(here, METADATA, pb.GetModelMetadataRequest(model_spec=missing))
    assert (err.code(), err.details()) == (NOT_FOUND, "Servable not found for request: Specific(digits, 7)")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 1600))
def test_no_bytes_lead_to_an_internal_error(here: Here, noise: bytes, at: int) -> None:
    """Noise put into a good message: it is refused, or it was still one."""
    whole = request_of(random_images(2)).SerializeToString()
    try:
        call(here, PREDICT, whole[:at] + noise + whole[at:])
    except grpc.RpcError as err:
        assert err.code() in (INVALID, NOT_FOUND), err  # noqa: PT017 - it may as well succeed
