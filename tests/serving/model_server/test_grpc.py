"""The gRPC API of a real server process, through the stubs of tensorflow-serving-api."""

import io

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)


def predict(server, inputs, *, name="digits", timeout_s=30, **spec):
    """Send arrays, as tensor_content where the type has one."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    request.output_filter.extend(spec.pop("output_filter", []))
    if "version" in spec:
        request.model_spec.version.value = spec.pop("version")
    for key, value in spec.items():
        setattr(request.model_spec, key, value)
    for alias, value in inputs.items():
        proto = value if isinstance(value, tensor_pb2.TensorProto) else tf.make_tensor_proto(value)
        request.inputs[alias].CopyFrom(proto)
    return prediction_service_pb2_grpc.PredictionServiceStub(server.channel).Predict(request, timeout=timeout_s)


def refused(server, inputs, **settings):
    with pytest.raises(grpc.RpcError) as caught:
        predict(server, inputs, **settings)
    return caught.value.code(), caught.value.details()


@pytest.fixture(scope="module")
def loaded(exports):
    """The same SavedModel in this process."""
    return tf.saved_model.load(str(exports[1]))


@pytest.mark.parametrize("count", [1, 7, 512])
def test_predictions_equal_the_saved_model_in_process(served, loaded, count):
    """Same numbers, in the typed fields that clients of TensorFlow Serving read, and the spec that answered."""
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    response = predict(served, {"images": images})
    expected = loaded.signatures["serving_default"](images=tf.constant(images))
    probabilities = response.outputs["probabilities"]
    assert not probabilities.tensor_content
    assert len(probabilities.float_val) == count * 10
    np.testing.assert_allclose(tf.make_ndarray(probabilities), expected["probabilities"], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(response.outputs["digit"].int64_val, np.ones(count))
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("digits", 1, "serving_default")


def test_images_as_int_val_give_the_same_answer(served, images):
    """Clients in other languages fill the typed field."""
    proto = tensor_pb2.TensorProto(dtype=tf.uint8.as_datatype_enum, int_val=images.reshape(-1).tolist())
    for size in images.shape:
        proto.tensor_shape.dim.add(size=size)
    by_field = predict(served, {"images": proto}).outputs["probabilities"]
    by_content = predict(served, {"images": images}).outputs["probabilities"]
    assert by_field == by_content


def test_no_images_give_no_predictions(served):
    """An empty batch is a batch."""
    response = predict(served, {"images": np.zeros((0, 28, 28), np.uint8)})
    assert tf.make_ndarray(response.outputs["probabilities"]).shape == (0, 10)


def test_the_output_filter_limits_the_answer(served, images):
    """Only what was asked for is computed and sent."""
    assert set(predict(served, {"images": images}, output_filter=["digit"]).outputs) == {"digit"}
    assert set(predict(served, {"images": images}).outputs) == {"digit", "probabilities"}


def test_encoded_images_travel_as_strings(served, images):
    """The other signature, and string tensors on the way in."""
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    answer = predict(served, {"image_bytes": np.array(encoded, object)}, signature_name="encoded")
    plain = predict(served, {"images": images})
    assert answer.model_spec.signature_name == "encoded"
    assert answer.outputs["probabilities"] == plain.outputs["probabilities"]


ECHO = {
    "f16": np.array([0.5, -2], np.float16),
    "f32": np.array([np.pi, np.nan], np.float32),
    "f64": np.array([np.e, -np.inf]),
    "i8": np.array([-128, 127], np.int8),
    "i32": np.array([-(2**31), 2**31 - 1], np.int32),
    "i64": np.array([-(2**63), 2**63 - 1]),
    "u8": np.array([0, 255], np.uint8),
    "u32": np.array([0, 2**32 - 1], np.uint32),
    "flag": np.array([True, False]),
    "text": np.array([b"\x00\xff", "käse".encode()], object),
}


@pytest.mark.parametrize("as_content", [True, False])
def test_every_type_comes_back_as_it_went(served, as_content):
    """In tensor_content or in the typed fields, strings always in theirs."""
    inputs = {name: tf.make_tensor_proto(value) for name, value in ECHO.items()}
    if not as_content:
        fields = {"f32": "float_val", "f64": "double_val", "i64": "int64_val", "i32": "int_val", "u8": "int_val",
                  "i8": "int_val", "u32": "uint32_val", "flag": "bool_val"}  # fmt: skip
        for name, field in fields.items():
            inputs[name].ClearField("tensor_content")
            inputs[name].ClearField(field)
            getattr(inputs[name], field).extend(ECHO[name].tolist())
        inputs["f16"].ClearField("tensor_content")
        inputs["f16"].ClearField("half_val")
        inputs["f16"].half_val.extend(ECHO["f16"].view(np.uint16).tolist())
    outputs = predict(served, inputs, signature_name="echo").outputs
    for name, value in ECHO.items():
        assert outputs[name].dtype == tf.as_dtype(value.dtype if value.dtype != object else "string")
        np.testing.assert_array_equal(tf.make_ndarray(outputs[name]), value)


IMAGE = np.zeros((1, 28, 28), np.uint8)
CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("inputs", "settings", "code", "details"),
    [
        ({"images": IMAGE}, {"name": "nobody"}, CODE.NOT_FOUND, "Servable not found for request: Latest(nobody)"),
        ({"images": IMAGE}, {"version": 9}, CODE.NOT_FOUND, "Servable not found for request: Specific(digits, 9)"),
        ({"images": IMAGE}, {"name": ""}, CODE.INVALID_ARGUMENT, "ModelSpec has no name specified."),
        ({"images": IMAGE}, {"version_label": "x"}, CODE.INVALID_ARGUMENT, "Unrecognized servable version label: x"),
        ({"images": IMAGE}, {"signature_name": "x"}, CODE.FAILED_PRECONDITION, 'signature key "x" not found'),
        ({"picture": IMAGE}, {}, CODE.INVALID_ARGUMENT, "input tensor alias not found in signature: picture"),
        ({"images": IMAGE, "x": IMAGE}, {}, CODE.INVALID_ARGUMENT, "input size does not match signature: 2!=1"),
        ({}, {}, CODE.INVALID_ARGUMENT, "Missing but required: {images}"),
        ({"images": IMAGE.astype("f")}, {}, CODE.INVALID_ARGUMENT, "arg[0] to be uint8 but float is provided"),
        ({"images": np.array([b""], object)}, {}, CODE.INVALID_ARGUMENT, "to be uint8 but string is provided"),
        ({"images": IMAGE[0]}, {}, CODE.INVALID_ARGUMENT, "shape [28, 28], the signature expects [?, 28, 28]"),
        ({"images": IMAGE.reshape(1, 14, 56)}, {}, CODE.INVALID_ARGUMENT, "shape [1, 14, 56]"),
        ({"images": IMAGE}, {"output_filter": ["x"]}, CODE.INVALID_ARGUMENT, "output tensor alias not found"),
        ({"images": IMAGE}, {"output_filter": ["digit"] * 2}, CODE.INVALID_ARGUMENT, "duplicate output tensor alias"),
        (
            {"image_bytes": np.array([b"no picture"], object)},
            {"signature_name": "encoded"},
            CODE.INVALID_ARGUMENT,
            "Unknown image file format",
        ),
    ],
)
def test_a_wrong_request_gets_the_status_of_tensorflow_serving(served, inputs, settings, code, details):
    """Code and wording; clients match on both."""
    given_code, given_details = refused(served, inputs, **settings)
    assert given_code == code
    assert details in given_details


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        ([10**6, 10**6, 10**6], {"int_val": [1]}),
        ([2**62, 8], {}),
        ([-1, 28, 28], {"int_val": [1]}),
        ([1, 28, 28], {"tensor_content": b"short"}),
    ],
)
def test_a_tensor_that_does_not_fit_its_shape_is_refused_before_it_takes_memory(served, shape, fields):
    """One value may stand for a whole tensor, but not for terabytes."""
    proto = tensor_pb2.TensorProto(dtype=tf.uint8.as_datatype_enum, **fields)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    code, details = refused(served, {"images": proto})
    assert code == CODE.INVALID_ARGUMENT
    assert "tensor parsing error: images" in details


def test_a_request_that_is_no_message_is_refused(served):
    """Garbage on the wire harms nobody."""
    call = served.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff\xff garbage", timeout=10)
    assert caught.value.code() == CODE.INVALID_ARGUMENT
    assert caught.value.details() == "the request is no tensorflow.serving.PredictRequest"
    assert predict(served, {"images": IMAGE}).outputs


def test_a_call_that_takes_too_long_ends_at_its_deadline(served):
    """The client's deadline holds even while the graph runs."""
    code, _ = refused(served, {"steps": np.int32(100_000)}, signature_name="slow", timeout_s=0.2)
    assert code == CODE.DEADLINE_EXCEEDED


def test_a_large_batch_passes_the_message_limits(served):
    """10,000 images are 7.8 MB, twice gRPC's default limit."""
    response = predict(served, {"images": np.zeros((10_000, 28, 28), np.uint8)})
    assert len(response.outputs["digit"].int64_val) == 10_000


def test_metadata_holds_the_signatures(served, exports):
    """As in the SavedModel: types, shapes, tensor names."""
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "digits"
    response = prediction_service_pb2_grpc.PredictionServiceStub(served.channel).GetModelMetadata(request)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert response.model_spec.version.value == 1
    images = signatures.signature_def["serving_default"].inputs["images"]
    assert images.dtype == tf.uint8.as_datatype_enum
    assert [dim.size for dim in images.tensor_shape.dim] == [-1, 28, 28]
    assert {"serving_default", "encoded"} <= set(signatures.signature_def)
    assert signatures.signature_def["encoded"].method_name == "tensorflow/serving/predict"


def test_metadata_of_another_kind_is_refused(served):
    """There is one field."""
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["weights"])
    request.model_spec.name = "digits"
    with pytest.raises(grpc.RpcError, match="Metadata field weights is not supported"):
        prediction_service_pb2_grpc.PredictionServiceStub(served.channel).GetModelMetadata(request)


def status(server, name="digits", version=None):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    if version is not None:
        request.model_spec.version.value = version
    return model_service_pb2_grpc.ModelServiceStub(server.channel).GetModelStatus(request)


def test_status_tells_each_version(served):
    """AVAILABLE, with an OK status."""
    (version,) = status(served).model_version_status
    assert version.version == 1
    assert version.state == get_model_status_pb2.ModelVersionStatus.AVAILABLE
    assert (version.status.error_code, version.status.error_message) == (0, "")


@pytest.mark.parametrize(
    ("name", "version", "details"),
    [
        ("nobody", None, "Could not find any versions of model nobody"),
        ("digits", 9, "Could not find version 9 of model digits"),
    ],
)
def test_status_of_what_is_not_there_is_not_found(served, name, version, details):
    """With TensorFlow Serving's wording."""
    with pytest.raises(grpc.RpcError) as caught:
        status(served, name, version)
    assert (caught.value.code(), caught.value.details()) == (CODE.NOT_FOUND, details)


def test_what_is_not_offered_is_unimplemented(served):
    """The debugging service of the original, for one."""
    with pytest.raises(grpc.RpcError) as caught:
        served.channel.unary_unary("/tensorflow.serving.SessionService/SessionRun")(b"", timeout=10)
    assert caught.value.code() == CODE.UNIMPLEMENTED


@pytest.mark.parametrize("service", ["", "digits", "tensorflow.serving.PredictionService"])
def test_health_is_serving(served, service):
    """For the whole server, for the service and for the model."""
    stub = health_pb2_grpc.HealthStub(served.channel)
    assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service_is_not_found(served):
    """As the protocol says."""
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(served.channel).Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() == CODE.NOT_FOUND


def test_reflection_lists_the_services(served):
    """Tools such as grpcurl and its like work without proto files."""
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="tensorflow.serving.PredictionService"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests), timeout=20)
    assert {"tensorflow.serving.PredictionService", "tensorflow.serving.ModelService", "grpc.health.v1.Health"} <= {
        service.name for service in listed.list_services_response.service
    }
    assert described.file_descriptor_response.file_descriptor_proto


def test_status_answers_while_all_inference_threads_are_busy(served):
    """Probes must not wait behind predictions."""
    steps = tf.make_tensor_proto(np.int32(150_000))
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "digits", "slow"
    request.inputs["steps"].CopyFrom(steps)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(served.channel)
    calls = [stub.Predict.future(request, timeout=60) for _ in range(40)]
    try:
        assert status(served).model_version_status
        assert not all(call.done() for call in calls)
    finally:
        for call in calls:
            call.cancel()
