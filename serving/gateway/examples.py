"""What the documents show by way of example: a command for each route, and an answer for each shape.

They go into the OpenAPI document, and from there to ``/docs`` and ``docs/api.md``. A test runs the commands and
compares the answers.
"""

from typing import Any, Final

_SEVEN: Final = [0.0001, 0.0, 0.0, 0.0001, 0.0, 0.0, 0.0, 0.9997, 0.0, 0.0001]
_FOUR: Final = [0.0, 0.0001, 0.0, 0.0, 0.9989, 0.0, 0.0, 0.0, 0.0, 0.001]
_ID: Final = "1f0c8a52d97e4b36a0e4"
_UNMATCHED: Final = "Servable not found for request: Specific(digits, 99)"
_DESCRIBED: Final = {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}
_SIGNATURE: Final = {
    "inputs": {"images": {"name": "images:0", "dtype": "DT_UINT8"}},
    "outputs": {"digit": {"name": "digit:0", "dtype": "DT_INT64"}},
    "method_name": "tensorflow/serving/predict",
}

ANSWERS: Final[dict[str, dict[str, Any]]] = {
    "ClassifyAnswer": {
        "digit": 7,
        "confidence": 0.9997,
        "probabilities": _SEVEN,
        "model_version": "1",
        "request_id": _ID,
    },
    "ReadAnswer": {
        "number": "74",
        "digits": [
            {"digit": 7, "confidence": 0.9997, "probabilities": _SEVEN, "box": [12, 20, 55, 88]},
            {"digit": 4, "confidence": 0.9989, "probabilities": _FOUR, "box": [80, 18, 60, 91]},
        ],
        "model_version": "1",
        "request_id": _ID,
    },
    "ErrorAnswer": {
        "error": {
            "code": "bad_image",
            "message": (
                "a digit was expected, but the picture is blank (contrast 0 of 255 grey levels): draw one darker or "
                "lighter than its paper"
            ),
            "request_id": _ID,
        }
    },
    "PassedThroughError": {"error": _UNMATCHED},
    "Health": {"status": "alive"},
    "Readiness": {"ready": True, "model": "digits", "versions": ["1"], "reason": ""},
    "StatusAnswer": {
        "model_version_status": [
            {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    },
    "MetadataAnswer": {
        "model_spec": {"name": "digits", "signature_name": "", "version": "1"},
        "metadata": {"signature_def": {"signature_def": {"serving_default": _SIGNATURE}}},
    },
    "PredictAnswer": {"predictions": [{"probabilities": _SEVEN, "digit": 7}]},
    "ServerMetadata": {"name": "digits-gateway", "version": "0.1.0", "extensions": ["binary_tensor_data"]},
    "Live": {"live": True},
    "Ready": {"ready": True},
    "ModelReady": {"name": "digits", "ready": True},
    "ModelMetadata": {
        "name": "digits",
        "versions": ["1"],
        "platform": "tensorflow_savedmodel",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 28, 28]}],
        "outputs": [_DESCRIBED, {"name": "digit", "datatype": "INT64", "shape": [-1]}],
    },
    "InferAnswer": {
        "model_name": "digits",
        "model_version": "1",
        "id": "my-own",
        "outputs": [{"name": "digit", "datatype": "INT64", "shape": [1], "data": [7]}],
    },
}
"""An answer as it may come, by the name of its shape."""

_PICTURE: Final = """curl -s --data-binary @docs/seven.png -H 'Content-Type: image/png' localhost:8080%s
curl -s -F image=@docs/seven.png localhost:8080%s"""
_PIXELS: Final = """python -c 'import json, numpy, PIL.Image as p; print(json.dumps(BODY))' |
  curl -s --data-binary @- localhost:8080%s"""
_PREDICT: Final = _PIXELS.replace("BODY", '{"instances": [numpy.array(p.open("docs/seven.png")).tolist()]}')
_INFER: Final = _PIXELS.replace(
    "BODY",
    '{"id": "my-own", "outputs": [{"name": "digit"}], "inputs": [\n'
    '    {"name": "images", "datatype": "UINT8", "shape": [1, 28, 28],\n'
    '     "data": [numpy.array(p.open("docs/seven.png")).tolist()]}]}',
)


def command(method: str, path: str) -> str:
    """A command for the shell, in the repository's folder, that asks this route of a gateway on this machine."""
    asked = path.replace("{version}", "1").replace("{label}", "stable")
    if method == "GET":
        return f"curl -s localhost:8080{asked}"
    shape = _PREDICT if path.endswith(":predict") else _INFER if path.endswith("/infer") else _PICTURE
    return shape.replace("%s", asked)
