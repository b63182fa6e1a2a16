"""The REST API of a real server process."""

import base64
import http.client
import io
import json
import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

PREDICT = "/v1/models/digits:predict"


@pytest.fixture(scope="module")
def expected(exports, images):
    """What the same SavedModel answers in this process."""
    outputs = tf.saved_model.load(str(exports[1])).signatures["serving_default"](images=tf.constant(images))
    return {name: value.numpy() for name, value in outputs.items()}


@pytest.mark.parametrize("path", [PREDICT, "/v1/models/digits/versions/1:predict", "/V1/Models/digits:Predict"])
def test_row_format_gives_one_prediction_an_instance(served, images, expected, path):
    """``instances`` in, ``predictions`` out; the paths' fixed parts are in any case, as in the original."""
    status, answer = served.rest(path, {"instances": images.tolist()})
    assert status == 200
    assert [row["digit"] for row in answer["predictions"]] == [1] * len(images)
    np.testing.assert_allclose(
        [row["probabilities"] for row in answer["predictions"]], expected["probabilities"], rtol=1e-5
    )


def test_named_instances_are_the_same(served, images):
    """Each instance an object of its inputs."""
    plain = served.rest(PREDICT, {"instances": images.tolist()})
    named = served.rest(PREDICT, {"instances": [{"images": image.tolist()} for image in images]})
    assert named == plain


@pytest.mark.parametrize("named", [True, False])
def test_columnar_format_gives_one_array_an_output(served, images, expected, named):
    """``inputs`` in, ``outputs`` out."""
    inputs = {"images": images.tolist()} if named else images.tolist()
    status, answer = served.rest(PREDICT, {"inputs": inputs, "signature_name": "serving_default"})
    assert status == 200
    np.testing.assert_allclose(answer["outputs"]["probabilities"], expected["probabilities"], rtol=1e-5)
    assert answer["outputs"]["digit"] == [1] * len(images)


@pytest.mark.parametrize("row_format", [True, False])
def test_bytes_travel_as_base64_objects(served, images, expected, row_format):
    """``{"b64": …}`` wherever a string tensor is expected."""
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, "PNG")
    value = {"b64": base64.b64encode(buffer.getvalue()).decode()}
    body = {"instances": [{"image_bytes": value}]} if row_format else {"inputs": [value]}
    status, answer = served.rest(PREDICT, {"signature_name": "encoded", **body})
    assert status == 200, answer
    row = answer["predictions"][0] if row_format else {k: v[0] for k, v in answer["outputs"].items()}
    np.testing.assert_allclose(row["probabilities"], expected["probabilities"][0], rtol=1e-5)


def test_every_type_has_its_json_form(served):
    """Floats keep their shortest spelling and a decimal point, NaN and infinities pass, ``_bytes`` become base64."""
    inputs = {
        "f16": [0.5, 2], "f32": [0.1, math.nan], "f64": [1, -math.inf], "i8": [-128, 127], "i32": [1, 2],
        "i64": [-(2**63), 2**63 - 1], "u8": [0, 255], "u32": [0, 2**32 - 1], "flag": [True, False],
        "text": ["käse", {"b64": "AP8="}],
    }  # fmt: skip
    status, answer = served.rest(PREDICT, {"signature_name": "echo", "inputs": inputs})
    assert status == 200, answer
    outputs = answer["outputs"]
    assert outputs["f32"][0] == 0.1
    assert math.isnan(outputs["f32"][1])
    assert outputs["f64"] == [1.0, -math.inf]
    assert isinstance(outputs["f64"][0], float)
    assert outputs["text"] == ["käse", {"b64": "AP8="}]
    assert outputs["text_bytes"] == [{"b64": base64.b64encode("käse".encode()).decode()}, {"b64": "AP8="}]
    for name in ("f16", "i8", "i32", "i64", "u8", "u32", "flag"):
        assert outputs[name] == inputs[name]


def test_status_has_the_shape_of_the_original(served):
    """Numbers as strings, states by name."""
    expected = {
        "model_version_status": [
            {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    }
    assert served.rest("/v1/models/digits") == (200, expected)
    assert served.rest("/v1/models/digits/versions/1") == (200, expected)


def test_metadata_has_the_shape_of_the_original(served):
    """model_spec, then the signatures two levels down."""
    status, answer = served.rest("/v1/models/digits/metadata")
    assert status == 200
    assert answer["model_spec"] == {"name": "digits", "signature_name": "", "version": "1"}
    images = answer["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]["images"]
    assert images["dtype"] == "DT_UINT8"
    assert [dim["size"] for dim in images["tensor_shape"]["dim"]] == ["-1", "28", "28"]


IMAGE = np.zeros((28, 28), int).tolist()


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/models/nobody:predict", {"instances": [IMAGE]}, 404, "Servable not found for request: Latest(nobody)"),
        ("/v1/models/digits/versions/9:predict", {"instances": [IMAGE]}, 404, "request: Specific(digits, 9)"),
        ("/v1/models/digits/labels/x:predict", {"instances": [IMAGE]}, 400, "Unrecognized servable version label: x"),
        ("/v1/models/nobody", None, 404, "Could not find any versions of model nobody"),
        ("/v1/models/digits/versions/9", None, 404, "Could not find version 9 of model digits"),
        ("/v1/models/digits/versions/99999999999999999999", None, 400, "Failed to convert version"),
        ("/v1/models/digits:predict", None, 400, "Malformed request: GET /v1/models/digits:predict"),
        ("/v1/models/digits", {}, 400, "Malformed request: POST /v1/models/digits"),
        ("/v1/models/digits:explain", {}, 400, "Malformed request"),
        ("/v1/models/digits:classify", {"examples": [{"x": 1}]}, 400, "No classification inputs found"),
        ("/v1/models/digits/labels/x:regress", {"examples": [{"x": 1}]}, 400, "Unrecognized servable version label: x"),
        ("/elsewhere", None, 404, "/elsewhere"),
        (PREDICT, {"instances": [IMAGE], "signature_name": "x"}, 400, 'Serving signature key "x" not found.'),
        (PREDICT, {"instances": [IMAGE], "signature_name": 1}, 400, "'signature_name' key must be a string value"),
        (PREDICT, {}, 400, "Missing 'inputs' or 'instances' key"),
        (PREDICT, {"instances": [IMAGE], "inputs": [IMAGE]}, 400, "only one of 'inputs' or 'instances'"),
        (PREDICT, {"instances": IMAGE[0][0]}, 400, "to be an list/array"),
        (PREDICT, {"instances": []}, 400, "No values in 'instances' array"),
        (PREDICT, [1], 400, "Is not object"),
        (PREDICT, b"", 400, "JSON Parse error: The document is empty"),
        (PREDICT, b'{"instances": [[', 400, "JSON Parse error"),
        (PREDICT, b"\xff\xfe\x00", 400, "JSON Parse error"),
        (PREDICT, {"instances": [[IMAGE[0]] * 27]}, 400, "shape [1, 27, 28]"),
        (PREDICT, {"instances": [[*IMAGE[:27], IMAGE[0][:5]]]}, 400, "unexpected size: 5 at level: 2"),
        (PREDICT, {"instances": [IMAGE, IMAGE[0]]}, 400, "incorrect level"),
        (PREDICT, {"instances": [[[0.5] * 28] * 28]}, 400, "Type: Number is not of expected type: uint8"),
        (PREDICT, {"instances": [[[256] * 28] * 28]}, 400, "256"),
        (PREDICT, {"instances": [[["7"] * 28] * 28]}, 400, 'JSON Value: "7" Type: String is not of expected type'),
        (PREDICT, {"instances": [[[None] * 28] * 28]}, 400, "Type: Null"),
        (PREDICT, {"instances": [{"picture": IMAGE}]}, 400, "keys must be equal to: images"),
        (PREDICT, {"instances": [IMAGE, {"images": IMAGE}]}, 400, "Expecting value/list but got object at item 1"),
        (PREDICT, {"instances": [{"images": IMAGE}, IMAGE]}, 400, "Expecting object but got list at item 1"),
        (PREDICT, {"inputs": {"picture": IMAGE}}, 400, "Missing named input: images in 'inputs' object."),
        (PREDICT, {"inputs": [{"b64": "%%%"}], "signature_name": "encoded"}, 400, "Unable to base64 decode"),
        (
            PREDICT,
            {
                "signature_name": "echo",
                "inputs": {
                    "f32": [math.nan, 1e39],
                    **{name: [1] for name in ("f16", "f64", "i8", "i32", "i64")},
                    "u8": [1],
                    "u32": [1],
                    "flag": [True],
                    "text": ["x"],
                },
            },
            400,
            "Cannot convert JSON value: 1e+39 to float without loss of precision.",
        ),
        (PREDICT, {"inputs": [[1]], "signature_name": "echo"}, 400, "multiple input tensors required"),
    ],
)
def test_a_wrong_request_gets_the_status_and_body_of_tensorflow_serving(served, path, body, status, says):
    """``{"error": …}`` and the HTTP code that belongs to its status."""
    given, answer = served.rest(path, body)
    assert given == status, answer
    assert list(answer) == ["error"]
    assert says in answer["error"]


@pytest.mark.parametrize("opening", [b"[", b'{"instances":', b'{"inputs":[', b'{"inputs":[NaN,['])
def test_deeply_nested_json_is_refused_and_harms_nothing(served, opening):
    """The original's server can be crashed this way."""
    status, answer = served.rest(PREDICT, opening * (1_900_000 // len(opening)))
    assert status == 400
    assert "JSON Parse error" in answer["error"]
    assert served.rest("/v1/models/digits")[0] == 200


def test_a_list_nested_deeper_than_any_tensor_is_refused(served):
    """It parses, but no tensor has such a rank."""
    nested = 1
    for _ in range(200):
        nested = [nested]
    status, answer = served.rest(PREDICT, {"inputs": nested})
    assert status == 400
    assert "nested deeper" in answer["error"]


def test_a_body_over_the_limit_is_refused(served):
    """413, whether its length was declared or not."""
    assert served.rest(PREDICT, b" " * 2_000_001)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", served.rest_port, timeout=20)
    connection.request("POST", PREDICT, (b" " * 100_000 for _ in range(21)), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    response = connection.getresponse()
    assert response.status == 413
    assert "2000000" in json.loads(response.read())["error"]
    connection.close()


def test_scalars_go_in_and_out_in_columnar_format_only(served):
    """The row format needs a first dimension."""
    body = {"signature_name": "slow", "inputs": {"steps": 3}}
    assert served.rest(PREDICT, body) == (200, {"outputs": {"steps": 3, "sum": 64.0}})
    status, answer = served.rest(PREDICT, {"signature_name": "slow", "instances": [{"steps": 3}]})
    assert status == 400
    assert "shape" in answer["error"]
