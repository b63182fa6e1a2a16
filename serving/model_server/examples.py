"""Classify, Regress and MultiInference: ``tf.Example``s in, labelled scores or values out.

The signatures are TensorFlow's conventional ones: one string input ``inputs``, which takes serialized examples, and
the outputs ``classes`` and/or ``scores`` (to classify) or ``outputs`` (to regress).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import classification_pb2, inference_pb2, input_pb2, regression_pb2

from serving.model_server import tensors
from serving.model_server.errors import Code, ServingError, invalid_argument
from serving.model_server.model import DEFAULT_SIGNATURE, MAX_MESSAGE_CHARS, Model

CLASSIFY_METHOD: Final = "tensorflow/serving/classify"
REGRESS_METHOD: Final = "tensorflow/serving/regress"
INPUTS: Final = "inputs"
CLASSES, SCORES, VALUES = "classes", "scores", "outputs"

Arrays = Mapping[str, np.ndarray[Any, Any]]
Result = Message  # ClassificationResult or RegressionResult


@dataclass(frozen=True, slots=True)
class Method:
    """One of the two ways to read a signature over examples.

    Attributes:
        name: what the signature's ``method_name`` should be.
        noun: for messages.
        outputs: the aliases of the outputs that it reads; a signature has one of them at least and nothing else.
        wrong_count: for messages, of a signature with no outputs or too many.
        missing: for messages, of a signature with other outputs.
        to_result: makes the message of those outputs and the number of examples.
    """

    name: str
    noun: str
    outputs: tuple[str, ...]
    wrong_count: str
    missing: str
    to_result: Callable[[Arrays, int], Result]


def classify(
    model: Model, signature_name: str, examples: input_pb2.Input, check_method: bool = False
) -> classification_pb2.ClassificationResult:
    """Labels and scores of each example.

    Args:
        model: the version that answers.
        signature_name: ``""`` means ``serving_default``.
        examples: at least one.
        check_method: refuse a signature that was not exported for this method, as all of TensorFlow 2's are not.

    Raises:
        ServingError: the signature is no such one, there is no example, or the graph reports it; in TensorFlow
            Serving's words.
    """
    return _one(CLASSIFY, model, signature_name, examples, check_method)


def regress(
    model: Model, signature_name: str, examples: input_pb2.Input, check_method: bool = False
) -> regression_pb2.RegressionResult:
    """One value an example; arguments and errors as for ``classify``."""
    return _one(REGRESS, model, signature_name, examples, check_method)


def multi_inference(
    model: Model,
    tasks: Iterable[inference_pb2.InferenceTask],
    examples: input_pb2.Input,
    check_method: bool = False,
) -> list[tuple[str, Result]]:
    """Several signatures that share their input, in one run of the graph.

    Args:
        model: the version that answers.
        tasks: method and signature of each; their ``model_spec.name`` must agree.
        examples: at least one.
        check_method: see ``classify``.

    Returns:
        Signature name and result of each task, in their order.

    Raises:
        ServingError: see ``classify``.
    """
    methods = _tasks(tasks)
    wanted: dict[str, list[str]] = {}
    for signature_name, method_name in methods.items():
        signature = model.signatures.get(signature_name)
        if signature is None:
            raise invalid_argument(f"Requested signature not found in model graph: {signature_name}")
        if method_name not in METHODS:
            raise ServingError(Code.UNIMPLEMENTED, f"Unsupported signature method_name: {method_name}")
        wanted[signature_name] = _check_signature(METHODS[method_name], signature, check_method)
        first = model.signatures[next(iter(wanted))]
        if signature.inputs[INPUTS].name != first.inputs[INPUTS].name:
            raise invalid_argument("Input tensor must be the same for all Signatures.")
    serialized = serialize(examples)
    outputs = model.run_together(wanted, {INPUTS: serialized})
    return [(name, METHODS[methods[name]].to_result(outputs[name], len(serialized))) for name in wanted]


def count(examples: input_pb2.Input) -> int:
    """How many examples there are."""
    return len(examples.example_list.examples) + len(examples.example_list_with_context.examples)


def serialize(examples: input_pb2.Input) -> np.ndarray[Any, Any]:
    """Examples as a vector of their serialized bytes, each with the context they share: object [N].

    Raises:
        ServingError: INVALID_ARGUMENT, there is none.
    """
    if examples.WhichOneof("kind") == "example_list_with_context":
        # Joining two serialized messages merges them; fields of the example win.
        context = examples.example_list_with_context.context.SerializeToString()
        rows = [context + row.SerializeToString() for row in examples.example_list_with_context.examples]
    else:
        rows = [row.SerializeToString() for row in examples.example_list.examples]
    if not rows:
        raise invalid_argument("Input is empty.")
    return np.array(rows, object)


def _one(method: Method, model: Model, signature_name: str, examples: input_pb2.Input, check_method: bool) -> Any:
    signature_name = signature_name or DEFAULT_SIGNATURE
    signature = model.signatures.get(signature_name)
    if signature is None:
        raise invalid_argument(f"No signature was found with the name: {signature_name}")
    aliases = _check_signature(method, signature, check_method)
    serialized = serialize(examples)
    return method.to_result(model.run(signature_name, {INPUTS: serialized}, aliases), len(serialized))


def _tasks(tasks: Iterable[inference_pb2.InferenceTask]) -> dict[str, str]:
    """Signature name → method name."""
    methods: dict[str, str] = {}
    names = set()
    for task in tasks:
        if not task.model_spec.name:
            raise invalid_argument("Found ModelSpec with an empty model name.")
        names.add(task.model_spec.name)
        if len(names) > 1:
            raise invalid_argument("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        signature_name = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if signature_name in methods:
            raise invalid_argument(f"Duplicate evaluation of signature: {signature_name}")
        methods[signature_name] = task.method_name
    return methods


def _check_signature(method: Method, signature: meta_graph_pb2.SignatureDef, check_method: bool) -> list[str]:
    """The aliases of the outputs to compute."""
    if check_method and signature.method_name != method.name:
        raise invalid_argument(
            f"Expected {method.noun} signature method_name to be {method.name}. Was: {signature.method_name}"
        )
    if len(signature.inputs) != 1:
        raise invalid_argument("Expected one input Tensor.")
    if not 1 <= len(signature.outputs) <= len(method.outputs):
        raise invalid_argument(method.wrong_count.format(len(signature.outputs)))
    if INPUTS not in signature.inputs:
        raise _missing(f"No {method.noun} inputs found in SignatureDef: ", signature)
    aliases = [alias for alias in method.outputs if alias in signature.outputs]
    if not aliases:
        raise _missing(method.missing, signature)
    return aliases


def _missing(what: str, signature: meta_graph_pb2.SignatureDef) -> ServingError:
    return ServingError(Code.FAILED_PRECONDITION, f"{what}{signature}"[:MAX_MESSAGE_CHARS])


def _classifications(outputs: Arrays, count: int) -> classification_pb2.ClassificationResult:
    classes, scores = outputs.get(CLASSES), outputs.get(SCORES)
    for alias, array, kind in ((CLASSES, classes, "object"), (SCORES, scores, "float32")):
        if array is None:
            continue
        if array.ndim != 2:
            raise invalid_argument(f"Expected Tensor shape: [batch_size num_classes] but got {_shape(array)}")
        if array.dtype != kind:
            expected = "DT_STRING" if kind == "object" else "DT_FLOAT"
            raise invalid_argument(f"Expected {alias} Tensor of {expected}. Got: {tensors.enum_name(array)}")
        if len(array) != count:
            raise invalid_argument(f"Expected {alias} output batch size of {count}. Got: {len(array)}")
    if classes is not None and scores is not None and classes.shape[1] != scores.shape[1]:
        raise invalid_argument(
            f"Tensors class and score should match in dim_size(1). Got {classes.shape[1]} vs. {scores.shape[1]}"
        )
    labels = None if classes is None else [[tensors.text(label) for label in row] for row in classes]
    values = None if scores is None else scores.tolist()
    result = classification_pb2.ClassificationResult()
    for index in range(count):
        row = result.classifications.add()
        for place in range(len((labels or values or [])[index])):
            row.classes.add(label=labels[index][place] if labels else "", score=values[index][place] if values else 0.0)
    return result


def _regressions(outputs: Arrays, count: int) -> regression_pb2.RegressionResult:
    values = outputs[VALUES]
    if not (values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)):
        raise invalid_argument(
            f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got {_shape(values)}"
        )
    if len(values) != count:
        raise invalid_argument(f"Input batch size did not match output batch size: {count} vs. {len(values)}")
    if values.dtype != np.float32:
        raise invalid_argument(f"Expected output Tensor of DT_FLOAT.  Got: {tensors.enum_name(values)}")
    return regression_pb2.RegressionResult(
        regressions=[regression_pb2.Regression(value=value) for value in values.reshape(-1).tolist()]
    )


def _shape(array: np.ndarray[Any, Any]) -> str:
    return f"[{','.join(map(str, array.shape))}]"


CLASSIFY: Final = Method(
    CLASSIFY_METHOD,
    "classification",
    (CLASSES, SCORES),
    "Expected one or two output Tensors, found {}",
    f'Expected classification signature outputs to contain at least one of "{CLASSES}" or "{SCORES}". Signature was: ',
    _classifications,
)
REGRESS: Final = Method(
    REGRESS_METHOD,
    "regression",
    (VALUES,),
    "Expected one output Tensor.",
    "No regression outputs found in SignatureDef: ",
    _regressions,
)
METHODS: Final = {CLASSIFY_METHOD: CLASSIFY, REGRESS_METHOD: REGRESS}
