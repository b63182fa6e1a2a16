"""Whatever arrives, the server answers with a status that blames the caller, and goes on: JSON and bytes."""

import http.client
import json

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    predict_pb2,
    regression_pb2,
)

from tests.serving.model_server.conftest import request_for

QUICK, LONG = 150, 20_000

IMAGE = np.zeros((28, 28), int).tolist()
BLAMES_THE_CALLER = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.OUT_OF_RANGE,
}

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.builds(lambda text: {"b64": text}, st.text("AQ+/= %", max_size=8)), st.just(IMAGE),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["images", "x", "b64", "f32"]), inner),
    max_leaves=12,
)
names = st.sampled_from(["serving_default", "encoded", "echo", "", "unknown"]) | values
documents = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("instances", "inputs", "examples", "context", "more"), values) | {"signature_name": names},
)
paths = st.sampled_from(
    [
        f"/v1/models/{model}{version}:{method}"
        for model in ("digits", "%00", "nobody")
        for version in ("", "/versions/1", "/versions/9", "/labels/x")
        for method in ("predict", "classify", "regress")
    ]
)


@st.composite
def damaged(draw, originals):
    """Bytes that were a message once: cut, doubled, overwritten."""
    content = bytearray(draw(originals))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 12)))
        change = draw(st.sampled_from(["cut", "double", "overwrite", "insert"]))
        content[start:end] = {
            "cut": b"",
            "double": content[start:end] * 2,
            "overwrite": draw(st.binary(min_size=end - start, max_size=end - start)),
            "insert": draw(st.binary(max_size=6)) + content[start:end],
        }[change]
    return bytes(content)


bodies = (
    st.builds(lambda document: json.dumps(document).encode(), documents)
    | damaged(st.builds(lambda document: json.dumps(document).encode(), documents))
    | st.binary(max_size=64)
)


def messages():
    """Method → a valid message of it."""
    predict = request_for("digits")
    echo = request_for(
        "digits", "echo",
        f16=np.zeros(1, np.float16), f32=np.ones(1, np.float32), f64=np.ones(1), i8=np.ones(1, np.int8),
        i32=np.ones(1, np.int32), i64=np.ones(1, np.int64), u8=np.ones(1, np.uint8), u32=np.ones(1, np.uint32),
        flag=np.ones(1, bool), text=np.array([b"x"], object),
    )  # fmt: skip
    classify = classification_pb2.ClassificationRequest(model_spec=predict.model_spec)
    classify.input.example_list.examples.add().features.feature["x"].float_list.value.append(1)
    regress = regression_pb2.RegressionRequest(model_spec=predict.model_spec)
    regress.input.example_list_with_context.examples.add()
    regress.input.example_list_with_context.context.features.feature["x"].bytes_list.value.append(b"x")
    several = inference_pb2.MultiInferenceRequest(input=classify.input)
    several.tasks.add(model_spec=predict.model_spec, method_name="tensorflow/serving/classify")
    metadata = get_model_metadata_pb2.GetModelMetadataRequest(
        model_spec=predict.model_spec, metadata_field=["signature_def"]
    )
    status = get_model_status_pb2.GetModelStatusRequest(model_spec=predict.model_spec)
    service, models = "/tensorflow.serving.PredictionService", "/tensorflow.serving.ModelService"
    return [
        (f"{service}/Predict", predict),
        (f"{service}/Predict", echo),
        (f"{service}/Predict", predict_pb2.PredictRequest()),
        (f"{service}/Classify", classify),
        (f"{service}/Regress", regress),
        (f"{service}/MultiInference", several),
        (f"{service}/GetModelMetadata", metadata),
        (f"{models}/GetModelStatus", status),
    ]


def still_well(server):
    status, answer = server.rest("/v1/models/digits:predict", {"instances": [IMAGE]})
    assert (status, answer["predictions"][0]["digit"]) == (200, 1)
    assert server.process.poll() is None
    assert not any(line["event"] == "internal_error" for line in server.log())


def settings_for(count):
    return settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
    )


def fuzz_rest(server, count):
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=30)

    @settings_for(count)
    @given(paths, bodies)
    @example("/v1/models/digits:classify", b'{"examples": [{"x": 1e39}]}')  # warned on stderr in plain text once
    @example("/v1/models/digits:predict", b'{"signature_name": "echo", "inputs": {"f32": [NaN, 1e39]}}')
    def ask(path, body):
        connection.request("POST", path, body)
        response = connection.getresponse()
        content = response.read()
        assert response.status in (200, 400, 404, 501), content
        answer = json.loads(content)
        assert response.status == 200 or (list(answer) == ["error"] and answer["error"])

    ask()
    connection.close()
    still_well(server)


def fuzz_grpc(server, count):
    originals = [(method, message.SerializeToString()) for method, message in messages()]
    calls = {method: server.channel.unary_unary(method) for method, _ in originals}
    cases = st.sampled_from(originals).flatmap(
        lambda original: st.tuples(st.just(original[0]), damaged(st.just(original[1])))
    )

    @settings_for(count)
    @given(cases | st.tuples(st.sampled_from(sorted(calls)), st.binary(max_size=200)))
    def ask(case):
        method, content = case
        call = calls[method].future(content, timeout=30)
        assert call.code() in BLAMES_THE_CALLER, (call.code(), call.details())
        assert call.code() is grpc.StatusCode.OK or call.details()

    ask()
    still_well(server)


def test_no_json_body_is_an_internal_error(served):
    """Near-valid documents, damaged ones, and bytes."""
    fuzz_rest(served, QUICK)


def test_no_bytes_on_a_grpc_method_are_an_internal_error(served):
    """Damaged messages, and bytes that never were one."""
    fuzz_grpc(served, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_rest, fuzz_grpc])
def test_no_request_among_many_is_an_internal_error(served, fuzz):
    """The same, 20,000 times each."""
    fuzz(served, LONG)
