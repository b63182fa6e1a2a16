"""The open inference protocol v2 at the gateway: REST with JSON and binary tensors, gRPC, what each refuses."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.protos import open_inference_pb2 as pb
from serving.protos import open_inference_pb2_grpc, upstream_pb2
from tests.conftest import ROOT
from tests.serving.gateway.conftest import HANG_S, Here, eventually, random_images
from tests.serving.gateway.upstream_server import expected_probabilities

MODEL = "/v2/models/digits"
SIZE = "inference-header-content-length"
TOOLS_PYTHON = ROOT / ".tools" / "bin" / "python"


def tensor_of(images_u8: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"name": "images", "datatype": "UINT8", "shape": [len(images_u8), 28, 28], **more}


def infer(here: Here, document: object, path: str = MODEL, **headers: Any) -> httpx.Response:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return here.http.post(f"{path}/infer", content=body, headers=headers)


def infer_binary(here: Here, document: object, data: bytes, **headers: Any) -> httpx.Response:
    head = json.dumps(document).encode()
    return infer(here, head + data, **{SIZE: str(len(head)), **headers})


def error(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    text: str = answer.json()["error"]
    assert "Traceback" not in text
    assert "secret" not in text
    return text


def check_outputs(answer: httpx.Response, images: np.ndarray) -> None:
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert (document["model_name"], document["model_version"]) == ("digits", "3")
    probabilities, digit = document["outputs"]
    assert (probabilities["name"], probabilities["datatype"]) == ("probabilities", "FP32")
    assert probabilities["shape"] == [len(images), 10]
    found = np.float32(probabilities["data"]).reshape(-1, 10)
    np.testing.assert_array_equal(found, expected_probabilities(images))
    assert (digit["name"], digit["datatype"], digit["shape"]) == ("digit", "INT64", [len(images)])
    assert digit["data"] == (images[:, 0] % 10).tolist()


def test_pixels_are_read_flat_and_nested(here: Here) -> None:
    """Both are of the protocol; one image and several; the id comes back."""
    for count in (1, 3):
        images = random_images(count, count)
        nested = images.reshape(-1, 28, 28).tolist()
        for data in (images.ravel().tolist(), nested):
            answer = infer(here, {"id": "mine", "inputs": [tensor_of(images, data=data)]})
            check_outputs(answer, images)
            assert answer.json()["id"] == "mine"
            assert answer.headers["content-type"] == "application/json"
    assert "id" not in infer(here, {"inputs": [tensor_of(images, data=nested)]}).json()


def test_only_the_outputs_asked_for_are_answered(here: Here) -> None:
    """In their order."""
    images = random_images(2)
    document = {"inputs": [tensor_of(images, data=images.ravel().tolist())]}
    answer = infer(here, {**document, "outputs": [{"name": "digit"}, {"name": "probabilities"}]})
    assert [one["name"] for one in answer.json()["outputs"]] == ["digit", "probabilities"]
    answer = infer(here, {**document, "outputs": [{"name": "digit"}]})
    assert [one["name"] for one in answer.json()["outputs"]] == ["digit"]
    for outputs in ([{"name": "nothing"}], [{"name": "digit"}, {"name": "digit"}], [{}]):
        assert "probabilities, digit" in error(infer(here, {**document, "outputs": outputs}), 400)


def test_tensors_travel_as_bytes_after_the_json(here: Here) -> None:
    """The binary tensor data extension, either way alone and both; an output may differ from the others."""
    images = random_images(7, 3)
    given = tensor_of(images, parameters={"binary_data_size": images.size})
    check_outputs(infer_binary(here, {"inputs": [given]}, images.tobytes()), images)

    answer = infer_binary(here, {"inputs": [given], "parameters": {"binary_data_output": True}}, images.tobytes())
    size = int(answer.headers[SIZE])
    assert answer.headers["content-type"] == "application/octet-stream"
    document = json.loads(answer.content[:size])
    assert [one["parameters"]["binary_data_size"] for one in document["outputs"]] == [280, 56]
    assert all("data" not in one for one in document["outputs"])
    rest = answer.content[size:]
    found = np.frombuffer(rest[:280], "<f4").reshape(7, 10)
    np.testing.assert_array_equal(found, expected_probabilities(images))
    assert np.frombuffer(rest[280:], "<i8").tolist() == (images[:, 0] % 10).tolist()

    outputs = [{"name": "probabilities"}, {"name": "digit", "parameters": {"binary_data": True}}]
    answer = infer(here, {"inputs": [tensor_of(images, data=images.ravel().tolist())], "outputs": outputs})
    size = int(answer.headers[SIZE])
    first, second = json.loads(answer.content[:size])["outputs"]
    assert len(first["data"]) == 70
    assert second["parameters"] == {"binary_data_size": 56}
    assert len(answer.content) - size == 56


ONE = random_images(1)
FLAT = ONE.ravel().tolist()


@pytest.mark.parametrize(
    ("document", "part"),
    [
        (b"", "JSON Parse error"),
        (b"[]", "a JSON object"),
        ({}, "inputs: expected a list of objects"),
        ({"inputs": [5]}, "inputs: expected a list of objects"),
        ({"inputs": []}, "came 0 inputs"),
        ({"inputs": [tensor_of(ONE, data=FLAT)] * 2}, "came 2 inputs"),
        ({"inputs": [tensor_of(ONE, data=FLAT, name="pictures")]}, "the one input 'images'"),
        ({"inputs": [tensor_of(ONE, data=FLAT, datatype="FP32")]}, "expected UINT8 [N, 28, 28], came FP32"),
        ({"inputs": [tensor_of(ONE, data=FLAT, shape=[1, 784])]}, "expected UINT8 [N, 28, 28]"),
        ({"inputs": [tensor_of(ONE, data=FLAT, shape=[1, 28, 28.0])]}, "shape: expected [N, 28, 28]"),
        ({"inputs": [tensor_of(ONE, data=FLAT, shape=[True, 28, 28])]}, "shape: expected [N, 28, 28]"),
        ({"inputs": [tensor_of(ONE, data=FLAT, shape="x")]}, "shape: expected [N, 28, 28]"),
        ({"inputs": [tensor_of(ONE, data=FLAT, shape=[0, 28, 28])]}, "came none"),
        ({"inputs": [tensor_of(ONE, data=FLAT, shape=[-1, 28, 28])]}, "came none"),
        ({"inputs": [tensor_of(ONE, data=FLAT, shape=[2, 28, 28])]}, "1,568 values"),
        ({"inputs": [tensor_of(ONE, data=FLAT[1:])]}, "784 values for [1, 28, 28], came 783"),
        ({"inputs": [tensor_of(ONE)]}, "data: expected a list of pixels"),
        ({"inputs": [tensor_of(ONE, data=[256, *FLAT[1:]])]}, "from 0 to 255"),
        ({"inputs": [tensor_of(ONE, data=[0.5, *FLAT[1:]])]}, "from 0 to 255"),
        ({"inputs": [tensor_of(ONE, data=[[FLAT]])]}, "28 rows of 28"),
        ({"inputs": [tensor_of(ONE, data=FLAT, parameters=5)]}, "`parameters` to be an object"),
        ({"inputs": [tensor_of(ONE, data=FLAT)], "parameters": []}, "`parameters` to be an object"),
        ({"inputs": [tensor_of(ONE, data=FLAT)], "id": 5}, "id: expected a string"),
        ({"inputs": [tensor_of(ONE, data=FLAT)], "outputs": 5}, "outputs: expected a list of objects"),
        ({"inputs": [tensor_of(ONE, parameters={"shared_memory_region": "x"})]}, "data: expected a list of pixels"),
    ],
)
def test_a_request_that_is_not_of_the_model_is_refused_before_it_goes_upstream(
    here: Here, document: object, part: str
) -> None:
    """400 with one line that says what was expected; the model server sees nothing of it."""
    assert part in error(infer(here, document), 400)
    assert here.behaviour.batches == []


def test_sizes_that_do_not_add_up_are_refused(here: Here) -> None:
    """Neither a header nor a parameter makes the gateway read what is not there."""
    images = random_images(2)
    data = images.tobytes()
    given = {"inputs": [tensor_of(images, parameters={"binary_data_size": len(data)})]}
    head = json.dumps(given).encode()
    for size in ("-1", "x", str(len(head + data) + 1), "9" * 5000, "0" * 16 + "9" * 5000, "٣", "1e2", ""):
        error(infer(here, head + data, **{SIZE: size.encode()}), 400)
    assert "784 bytes came" in error(infer_binary(here, given, data[:784]), 400)
    assert "1,569 bytes came" in error(infer_binary(here, given, data + b"x"), 400)
    for size in (True, "1568", 1568.0, -1, None):
        odd = {"inputs": [tensor_of(images, parameters={"binary_data_size": size})]}
        error(infer_binary(here, odd, data), 400)
    both = {"inputs": [tensor_of(images, data=[1], parameters={"binary_data_size": len(data)})]}
    assert "came both" in error(infer_binary(here, both, data), 400)
    neither = {"inputs": [tensor_of(images, data=images.ravel().tolist())]}
    assert "after the JSON" in error(infer_binary(here, neither, data), 400)
    assert here.behaviour.batches == []


def test_health_and_metadata_are_told(start: Callable[..., Here]) -> None:
    """And follow the model server; what is not ready is 503 to a prober that looks at the status alone."""
    here = start()
    get = here.http.get
    assert get("/v2").json() == {"name": "digits-gateway", "version": "0.1.0", "extensions": ["binary_tensor_data"]}
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    described = get(MODEL).json()
    assert described == {
        "name": "digits",
        "versions": ["3"],
        "platform": "tensorflow_savedmodel",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 28, 28]}],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "digit", "datatype": "INT64", "shape": [-1]},
        ],
    }
    assert get(f"{MODEL}/versions/3").json() == described
    assert "no version 7" in error(get(f"{MODEL}/versions/7"), 404)
    assert "numbers" in error(get(f"{MODEL}/versions/x"), 404)
    assert get(f"{MODEL}/ready").json() == get(f"{MODEL}/versions/3/ready").json() == {"name": "digits", "ready": True}
    assert get(f"{MODEL}/versions/7/ready").status_code == 503
    for path in ("/v2/models/cats", "/v2/models/cats/ready", "/v2/models/cats/versions/1"):
        assert "no model 'cats'" in error(get(path), 404)
    assert "no model 'cats'" in error(infer(here, {}, "/v2/models/cats"), 404)
    error(get("/v2/nothing"), 404)
    error(get(f"{MODEL}/infer"), 405)
    here.behaviour.state = upstream_pb2.ModelVersionStatus.LOADING
    eventually(lambda: get("/v2/health/ready").status_code == 503)
    assert get(f"{MODEL}/ready").json() == {"name": "digits", "ready": False}
    assert get("/v2/health/live").status_code == 200


def test_a_version_is_asked_for_by_path(here: Here) -> None:
    """It goes to the model server; one that is not there is 404."""
    document = {"inputs": [tensor_of(ONE, data=FLAT)]}
    check_outputs(infer(here, document, f"{MODEL}/versions/3"), ONE)
    assert here.upstream.last_request.model_spec.version.value == 3
    error(infer(here, document, f"{MODEL}/versions/7"), 404)


def test_batches_are_bounded_and_upstream_failures_have_their_status(start: Callable[..., Here]) -> None:
    """413, and 503 without the upstream's words."""
    here = start(max_request_images=3)
    images = random_images(4)
    assert "at most 3" in error(infer(here, {"inputs": [tensor_of(images, data=[0] * 3136)]}), 413)
    here.behaviour.abort = (grpc.StatusCode.UNAVAILABLE, "secret")
    error(infer(here, {"inputs": [tensor_of(ONE, data=FLAT)]}), 503)


def test_routes_are_counted_by_pattern(here: Here) -> None:
    """Never by a version or name that a user made up."""
    labels = {"protocol": "rest", "route": f"{MODEL}/versions/{{version}}/infer", "code": "404", "model_version": ""}
    before = here.metric("digits_requests_total", **labels)
    for number in range(5, 15):
        infer(here, {"inputs": [tensor_of(ONE, data=FLAT)]}, f"{MODEL}/versions/{number}")
        here.http.get(f"/v2/models/made-up-{number}")
    assert here.metric("digits_requests_total", **labels) == before + 10
    assert "made-up" not in here.http.get("/metrics").text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["name", "datatype", "shape", "data", "parameters"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=8,
    ),
)
def test_no_json_leads_to_a_500(here: Here, key: str, value: object) -> None:
    """A field of the input replaced by anything: refused, or it was one that is ignored."""
    body = json.dumps({"inputs": [{**tensor_of(ONE, data=FLAT), key: value}]})
    answer = infer(here, body.encode("utf-8", "surrogatepass"))
    assert answer.status_code in (200 if key == "parameters" else 400, 400, 413), answer.text


# --- gRPC ---


def stub(here: Here) -> open_inference_pb2_grpc.GRPCInferenceServiceStub:
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(here.channel)


def request_of(images_u8: np.ndarray, *, raw: bool = True, **more: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(**{"model_name": "digits", **more})
    tensor = request.inputs.add(name="images", datatype="UINT8", shape=[len(images_u8), 28, 28])
    if raw:
        request.raw_input_contents.append(images_u8.tobytes())
    else:
        tensor.contents.uint_contents.extend(images_u8.ravel().tolist())
    return request


def test_grpc_infers_raw_and_typed_contents(here: Here) -> None:
    """Answered in the form they came in."""
    images = random_images(5, 4)
    expected = expected_probabilities(images)
    answer = stub(here).ModelInfer(request_of(images, id="mine"))
    assert (answer.model_name, answer.model_version, answer.id) == ("digits", "3", "mine")
    assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [
        ("probabilities", "FP32", [5, 10]),
        ("digit", "INT64", [5]),
    ]
    found = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(5, 10)
    np.testing.assert_array_equal(found, expected)
    assert np.frombuffer(answer.raw_output_contents[1], "<i8").tolist() == (images[:, 0] % 10).tolist()

    answer = stub(here).ModelInfer(request_of(images, raw=False, model_version="3"))
    assert not answer.raw_output_contents
    np.testing.assert_array_equal(np.float32(answer.outputs[0].contents.fp32_contents).reshape(5, 10), expected)
    assert list(answer.outputs[1].contents.int64_contents) == (images[:, 0] % 10).tolist()
    request = request_of(images)
    request.outputs.add(name="digit")
    assert [one.name for one in stub(here).ModelInfer(request).outputs] == ["digit"]


def _changed(change: Callable[[pb.ModelInferRequest], object]) -> pb.ModelInferRequest:
    request = request_of(random_images(2))
    change(request)
    return request


INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("request_", "code", "part"),
    [
        (pb.ModelInferRequest(), NOT_FOUND, "no model ''"),
        (_changed(lambda r: setattr(r, "model_name", "cats")), NOT_FOUND, "no model 'cats'"),
        (_changed(lambda r: setattr(r, "model_version", "x")), NOT_FOUND, "versions are numbers"),
        (_changed(lambda r: setattr(r, "model_version", "7")), NOT_FOUND, "Specific(digits, 7)"),
        (_changed(lambda r: r.inputs.pop()), INVALID, "came 0 inputs"),
        (_changed(lambda r: r.inputs.add()), INVALID, "came 2 inputs"),
        (_changed(lambda r: setattr(r.inputs[0], "datatype", "FP32")), INVALID, "expected UINT8 [N, 28, 28]"),
        (_changed(lambda r: r.inputs[0].shape.pop()), INVALID, "expected UINT8 [N, 28, 28]"),
        (_changed(lambda r: r.raw_input_contents.append(b"")), INVALID, "one raw_input_contents"),
        (_changed(lambda r: r.raw_input_contents.pop()), INVALID, "came 0"),
        (_changed(lambda r: r.inputs[0].contents.uint_contents.append(1)), INVALID, "no contents beside it"),
        (_changed(lambda r: r.outputs.add(name="x")), INVALID, "probabilities, digit"),
        (request_of(np.full((1, 784), 256), raw=False), INVALID, "from 0 to 255"),
    ],
)
def test_grpc_refuses_what_is_not_of_the_model(
    here: Here, request_: pb.ModelInferRequest, code: grpc.StatusCode, part: str
) -> None:
    """With the code and one line; nothing reaches the model."""
    with pytest.raises(grpc.RpcError) as caught:
        stub(here).ModelInfer(request_, timeout=20)
    assert caught.value.code() is code
    assert part in caught.value.details()
    assert here.behaviour.batches == []


def test_grpc_tells_health_and_metadata(here: Here) -> None:
    """The same as REST."""
    client = stub(here)
    assert client.ServerLive(pb.ServerLiveRequest()).live
    assert client.ServerReady(pb.ServerReadyRequest()).ready
    assert client.ModelReady(pb.ModelReadyRequest(name="digits")).ready
    assert client.ModelReady(pb.ModelReadyRequest(name="digits", version="3")).ready
    assert not client.ModelReady(pb.ModelReadyRequest(name="digits", version="7")).ready
    assert client.ServerMetadata(pb.ServerMetadataRequest()).extensions == ["binary_tensor_data"]
    model = client.ModelMetadata(pb.ModelMetadataRequest(name="digits"))
    assert (model.versions, model.platform) == (["3"], "tensorflow_savedmodel")
    assert [(one.name, one.datatype, one.shape) for one in model.inputs] == [("images", "UINT8", [-1, 28, 28])]
    for call in (
        lambda: client.ModelMetadata(pb.ModelMetadataRequest(name="cats")),
        lambda: client.ModelReady(pb.ModelReadyRequest(name="cats")),
        lambda: client.ModelMetadata(pb.ModelMetadataRequest(name="digits", version="7")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is NOT_FOUND


def test_a_client_without_the_proto_file_learns_it_by_reflection(here: Here) -> None:
    """And can call with what it learnt."""
    database = ProtoReflectionDescriptorDatabase(here.channel)
    assert "inference.GRPCInferenceService" in database.get_services()
    pool = DescriptorPool(database)
    method = pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")
    request = GetMessageClass(method.input_type).FromString(request_of(ONE).SerializeToString())
    call = here.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    answer = GetMessageClass(method.output_type).FromString(call(request.SerializeToString()))
    assert answer.model_version == "3"


def test_bytes_that_are_no_message_are_an_invalid_argument(here: Here) -> None:
    """On every method."""
    for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"):
        with pytest.raises(grpc.RpcError) as caught:
            here.channel.unary_unary(f"/inference.GRPCInferenceService/{name}")(b"\xff")
        assert caught.value.code() is INVALID
        assert "the message is not an inference." in caught.value.details()


def test_a_published_client_works_unchanged(here: Here) -> None:
    """`tritonclient` from the package index: health, metadata, inference over REST (binary, JSON) and gRPC."""
    if not (ROOT / ".tools" / "bin" / "python").exists():
        pytest.skip("needs the tools' own environment: `make tools` (make test builds it)")
    images = random_images(5)
    script = Path(__file__).with_name("published_client.py")
    rest = here.running.rest_address
    done = subprocess.run(
        [TOOLS_PYTHON, script, rest, here.grpc_address], input=images.tobytes(), capture_output=True, check=False,
        timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    for way in ("rest_binary", "rest_json", "grpc"):
        one = said[way]
        assert (one["live"], one["ready"], one["model_ready"]) == (True, True, True), way
        assert one["digit"] == (images[:, 0] % 10).tolist()
        np.testing.assert_array_equal(np.float32(one["probabilities"]), expected_probabilities(images))
    for metadata in (said["rest_metadata"], said["grpc_metadata"]):
        assert metadata["name"] == "digits"
        assert [one["name"] for one in metadata["outputs"]] == ["probabilities", "digit"]
    assert said["rest_refusal"][0] == "404"
    assert said["grpc_refusal"][0] == "StatusCode.NOT_FOUND"
