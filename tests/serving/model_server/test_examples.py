"""Classify, Regress and MultiInference of a TensorFlow 1 export, over real gRPC and REST."""

import math

import grpc
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from tests.serving.model_server.conftest import export_classic

CODE = grpc.StatusCode
CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    """Serves ``classic``, whose graph has two tags and several signatures."""
    folder = tmp_path_factory.mktemp("classic")
    export_classic(folder / "staging", ["serve", "cpu"])
    (folder / "staging").rename(folder / "3")
    server = start_server("--model_name=classic", f"--model_base_path={folder}", "--saved_model_tags=serve,cpu")
    server.wait_for("version_available", model="classic", version=3)
    return server


def example(**features):
    lists = {name: tf.train.Feature(float_list=tf.train.FloatList(value=value)) for name, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=lists))


def rows(*examples, context=None):
    if context is None:
        return input_pb2.Input(example_list=input_pb2.ExampleList(examples=examples))
    return input_pb2.Input(
        example_list_with_context=input_pb2.ExampleListWithContext(context=context, examples=examples)
    )


TWO = rows(example(x=[1, 2]), example(x=[-3, 1]))


def ask(server, request, given=TWO, *, name="classic", signature="", **spec):
    request.input.CopyFrom(given)
    request.model_spec.name, request.model_spec.signature_name = name, signature
    if "version" in spec:
        request.model_spec.version.value = spec["version"]
    if "label" in spec:
        request.model_spec.version_label = spec["label"]
    stub = prediction_service_pb2_grpc.PredictionServiceStub(server.channel)
    call = stub.Classify if isinstance(request, classification_pb2.ClassificationRequest) else stub.Regress
    return call(request, timeout=30)


def classify(server, given=TWO, **spec):
    return ask(server, classification_pb2.ClassificationRequest(), given, **spec)


def regress(server, given=TWO, **spec):
    return ask(server, regression_pb2.RegressionRequest(), given, **spec)


def multi_inference(server, *tasks, given=TWO):
    request = inference_pb2.MultiInferenceRequest(input=given)
    for name, signature, method in tasks:
        task = request.tasks.add(method_name=method)
        task.model_spec.name, task.model_spec.signature_name = name, signature
    return prediction_service_pb2_grpc.PredictionServiceStub(server.channel).MultiInference(request, timeout=30)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def pairs(row):
    return [(each.label, pytest.approx(each.score, abs=1e-6)) for each in row.classes]


def test_classify_labels_and_scores_each_example(server):
    """One list of classes an example, in the graph's order; the answer names what answered."""
    response = classify(server)
    first, second = response.result.classifications
    assert pairs(first) == [("minus", sigmoid(-3)), ("plus", sigmoid(3))]
    assert pairs(second) == [("minus", sigmoid(2)), ("plus", sigmoid(-2))]
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("classic", 3, "serving_default")


def test_classify_takes_classes_alone_and_scores_alone(server):
    """What a signature does not give stays empty."""
    assert pairs(classify(server, signature="only_classes").result.classifications[0]) == [("minus", 0), ("plus", 0)]
    assert pairs(classify(server, signature="only_scores").result.classifications[1]) == [
        ("", sigmoid(2)),
        ("", sigmoid(-2)),
    ]


@pytest.mark.parametrize("signature", ["regress", "regress_column"])
def test_regress_gives_one_value_an_example(server, signature):
    """From [N] and from [N, 1]."""
    response = regress(server, signature=signature, version=3)
    assert [each.value for each in response.result.regressions] == [3, -2]
    assert response.model_spec.signature_name == signature


def test_a_context_is_part_of_every_example(server):
    """And what an example says itself wins."""
    given = rows(example(x=[1, 2]), example(x=[1, 2], bias=[1]), context=example(bias=[10]))
    values = [each.value for each in regress(server, given, signature="regress").result.regressions]
    assert values == [13, 4]


def test_multi_inference_answers_each_task_in_order(server):
    """Classification and regression of the same examples in one call."""
    response = multi_inference(server, ("classic", "regress", REGRESS), ("classic", "", CLASSIFY))
    regression, classification = response.results
    assert [each.value for each in regression.regression_result.regressions] == [3, -2]
    assert pairs(classification.classification_result.classifications[0]) == [
        ("minus", sigmoid(-3)),
        ("plus", sigmoid(3)),
    ]
    assert [result.model_spec.signature_name for result in response.results] == ["regress", "serving_default"]
    assert {result.model_spec.version.value for result in response.results} == {3}


@pytest.mark.parametrize(
    ("call", "settings", "code", "details"),
    [
        (classify, {"name": "nobody"}, CODE.NOT_FOUND, "Servable not found for request: Latest(nobody)"),
        (classify, {"name": ""}, CODE.INVALID_ARGUMENT, "ModelSpec has no name specified."),
        (regress, {"version": 4}, CODE.NOT_FOUND, "Servable not found for request: Specific(classic, 4)"),
        (classify, {"label": "x"}, CODE.INVALID_ARGUMENT, "Unrecognized servable version label: x"),
        (classify, {"signature": "x"}, CODE.INVALID_ARGUMENT, "No signature was found with the name: x"),
        (regress, {}, CODE.INVALID_ARGUMENT, "Expected one output Tensor."),
        (classify, {"signature": "regress"}, CODE.FAILED_PRECONDITION, 'at least one of "classes" or "scores"'),
        (regress, {"signature": "only_scores"}, CODE.FAILED_PRECONDITION, "No regression outputs found in"),
        (classify, {"signature": "flat_scores"}, CODE.INVALID_ARGUMENT, "[batch_size num_classes] but got [2]"),
        (regress, {"signature": "regress_pair"}, CODE.INVALID_ARGUMENT, "or [batch_size, 1] but got [2,2]"),
        (regress, {"signature": "plain"}, CODE.INVALID_ARGUMENT, "to be float but string is provided"),
        (classify, {"given": rows()}, CODE.INVALID_ARGUMENT, "Input is empty."),
        (classify, {"given": rows(context=example(x=[1, 2]))}, CODE.INVALID_ARGUMENT, "Input is empty."),
        (classify, {"given": rows(example(bias=[1]))}, CODE.INVALID_ARGUMENT, "Feature: x (data type: float)"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_the_status_of_tensorflow_serving(server, call, settings, code, details):
    """Code and wording; clients match on both."""
    with pytest.raises(grpc.RpcError) as caught:
        call(server, **settings)
    assert caught.value.code() == code
    assert details in caught.value.details()


@pytest.mark.parametrize(
    ("tasks", "code", "details"),
    [
        ([], CODE.INVALID_ARGUMENT, "ModelSpec has no name specified."),
        ([("nobody", "", CLASSIFY)], CODE.NOT_FOUND, "Servable not found for request: Latest(nobody)"),
        ([("classic", "x", CLASSIFY)], CODE.INVALID_ARGUMENT, "Requested signature not found in model graph: x"),
        ([("classic", "", "tensorflow/serving/predict")], CODE.UNIMPLEMENTED, "Unsupported signature method_name"),
        ([("classic", "", CLASSIFY)] * 2, CODE.INVALID_ARGUMENT, "Duplicate evaluation of signature: serving_default"),
        ([("classic", "", CLASSIFY), ("", "", REGRESS)], CODE.INVALID_ARGUMENT, "an empty model name"),
        ([("classic", "", CLASSIFY), ("other", "", REGRESS)], CODE.INVALID_ARGUMENT, "must access the same model name"),
        (
            [("classic", "", CLASSIFY), ("classic", "plain", REGRESS)],
            CODE.INVALID_ARGUMENT,
            "Input tensor must be the same for all Signatures.",
        ),
    ],
)  # fmt: skip
def test_a_wrong_multi_inference_gets_the_status_of_tensorflow_serving(server, tasks, code, details):
    """Code and wording; clients match on both."""
    with pytest.raises(grpc.RpcError) as caught:
        multi_inference(server, *tasks)
    assert caught.value.code() == code
    assert details in caught.value.details()


@pytest.mark.parametrize("path", ["/v1/models/classic", "/v1/models/classic/versions/3"])
def test_rest_classify_gives_pairs_and_rest_regress_values(server, path):
    """``results`` holds one list of [label, score] an example, or one value."""
    body = {"examples": [{"x": [1.0, 2.0]}, {"x": [-3.0, 1.0]}]}
    status, answer = server.rest(f"{path}:classify", body)
    assert status == 200, answer
    assert answer["results"][0] == [["minus", pytest.approx(sigmoid(-3))], ["plus", pytest.approx(sigmoid(3))]]
    status, answer = server.rest(f"{path}:regress", {"signature_name": "regress", **body, "context": {"bias": 0.5}})
    assert (status, answer) == (200, {"results": [3.5, -1.5]})


def test_rest_features_may_be_not_finite(server):
    """NaN and infinities in and out, in the long and the short spelling."""
    body = b'{"signature_name": "regress", "examples": [{"x": [NaN, 1.0]}, {"x": [Infinity, 1.0]}, {"x": [-Inf, 1.0]}]}'
    status, answer = server.rest("/v1/models/classic:regress", body)
    assert status == 200, answer
    assert math.isnan(answer["results"][0])
    assert answer["results"][1:] == [math.inf, -math.inf]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "When method is classify, key 'examples' is expected and was not found"),
        ({"examples": {}}, "Expecting 'examples' value to be an list/array"),
        ({"examples": []}, "'examples' value is an empty array"),
        ({"examples": [1]}, "Example must be JSON object but got JSON Number"),
        ({"examples": [{"x": [1.0]}], "context": []}, "Example must be JSON object but got JSON Array"),
        ({"examples": [{"x": None}]}, "Feature: x has element with unexpected JSON type: Null"),
        ({"examples": [{"x": [[1.0]]}]}, "Feature: x has element with unexpected JSON type: Array"),
        ({"examples": [{"x": {"y": 1}}]}, "Feature: x has element with unexpected JSON type: Object"),
        ({"examples": [{"x": [1, 1.5]}]}, "Unexpected element type in feature: x expecting type: int64"),
        ({"examples": [{"x": ["a", True]}]}, "Unexpected element type in feature: x expecting type: bytes"),
        ({"examples": [{"x": 2**63}]}, "Feature: x has uint64 element. Only int64 is supported."),
        ({"examples": [{"x": 1e39}]}, "to float without loss of precision."),
        ({"examples": [{"x": {"b64": "%"}}]}, "Unable to base64 decode"),
        ({"examples": [{"x": [1, 2]}]}, "Data type: int64 but expected type: float"),
        ({"examples": [{"x": [1.0, 2.0]}], "signature_name": "x"}, "No signature was found with the name: x"),
    ],
)
def test_a_wrong_rest_body_gets_the_words_of_tensorflow_serving(server, body, says):
    """400 and ``{"error": …}``."""
    status, answer = server.rest("/v1/models/classic:classify", body)
    assert status == 400
    assert list(answer) == ["error"]
    assert says in answer["error"]


def test_method_names_and_tags_are_checked_on_demand(start_server, server, tmp_path):
    """TensorFlow 2 exports every signature for Predict, so the first check is off unless asked for. A graph whose tags
    are not those of the flag is not loaded, and the status tells which tags it has.
    """
    assert regress(server, signature="regress_column").result.regressions
    export_classic(tmp_path / "1", ["serve"])
    export_classic(tmp_path / "2", ["serve", "cpu"])
    strict = start_server(
        f"--model_base_path={tmp_path}", "--model_name=classic", "--enable_signature_method_name_check"
    )
    strict.wait_for("version_available", model="classic", version=1)
    assert "{'cpu', 'serve'}" in strict.wait_for("version_failed", version=2)["reason"].replace(
        "serve', 'cpu", "cpu', 'serve"
    )
    assert regress(strict, signature="regress").result.regressions
    with pytest.raises(grpc.RpcError) as caught:
        regress(strict, signature="regress_column")
    assert "to be tensorflow/serving/regress. Was: tensorflow/serving/predict" in caught.value.details()
