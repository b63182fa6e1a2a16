"""JSON bodies of ``:classify`` and ``:regress`` ↔ ``tf.Example``s and results.

``{"context": {…}, "examples": [{"feature": value or list, …}, …]}`` → ``{"results": […]}``: a list of
``[label, score]`` pairs an example, or one value an example.
"""

from typing import Any, Final

import numpy as np
from tensorflow.core.example import example_pb2, feature_pb2
from tensorflow_serving.apis import classification_pb2, input_pb2, regression_pb2

from serving.model_server import json_tensors
from serving.model_server.errors import invalid_argument

_INT64: Final = range(-(2**63), 2**63)
_KINDS: Final = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64"}


def parse(body: bytes) -> tuple[str, input_pb2.Input]:
    """Signature name and examples of a body.

    Raises:
        ServingError: INVALID_ARGUMENT, in TensorFlow Serving's words where clients may match on them.
    """
    document, signature_name = json_tensors.load(body)
    examples = document.get("examples")
    if "examples" not in document:
        raise _format_error(document, "When method is classify, key 'examples' is expected and was not found")
    if not isinstance(examples, list):
        raise _format_error(document, "Expecting 'examples' value to be an list/array")
    if not examples:
        raise _format_error(document, "'examples' value is an empty array")
    rows = [_example(row) for row in examples]
    if "context" not in document:
        return signature_name, input_pb2.Input(example_list=input_pb2.ExampleList(examples=rows))
    with_context = input_pb2.ExampleListWithContext(context=_example(document["context"]), examples=rows)
    return signature_name, input_pb2.Input(example_list_with_context=with_context)


def dump_classifications(result: classification_pb2.ClassificationResult) -> bytes:
    """The body of an answer to ``:classify``."""
    rows = [[[each.label, _shortest(each.score)] for each in row.classes] for row in result.classifications]
    return json_tensors.dumps({"results": rows})


def dump_regressions(result: regression_pb2.RegressionResult) -> bytes:
    """The body of an answer to ``:regress``."""
    return json_tensors.dumps({"results": [_shortest(each.value) for each in result.regressions]})


def _shortest(value: float) -> float:
    """The double whose shortest spelling is that of the float32 ``value``."""
    return float(str(np.float32(value)))


def _example(value: Any) -> example_pb2.Example:
    if not isinstance(value, dict):
        raise invalid_argument(f"Example must be JSON object but got JSON {json_tensors.type_name(value)}")
    example = example_pb2.Example()
    for name, content in value.items():
        feature = example.features.feature[name]
        for item in content if isinstance(content, list) else [content]:
            _add(feature, name, item)
    return example


def _add(feature: feature_pb2.Feature, name: str, value: Any) -> None:
    """Append to the feature's list, whose kind the first value decides."""
    item: bytes | int | float
    if isinstance(value, str) or json_tensors.is_base64(value):
        field, item = "bytes_list", json_tensors.to_bytes(value)
    elif isinstance(value, bool | int):
        if value not in _INT64:
            raise invalid_argument(f"Feature: {name} has uint64 element. Only int64 is supported.")
        field, item = "int64_list", int(value)
    elif isinstance(value, float):
        if np.isfinite(value) and abs(value) > float(np.finfo(np.float32).max):
            raise invalid_argument(f"Cannot convert JSON value: {value} to float without loss of precision.")
        field, item = "float_list", value
    else:
        raise invalid_argument(
            f"Feature: {name} has element with unexpected JSON type: {json_tensors.type_name(value)}"
        )
    given = feature.WhichOneof("kind")
    if given not in (None, field):
        raise invalid_argument(f"Unexpected element type in feature: {name} expecting type: {_KINDS[given]}")
    getattr(feature, field).value.append(item)


def _format_error(document: Any, reason: str) -> Exception:
    return invalid_argument(f"JSON Value: {json_tensors.echo(document)} {reason}")
