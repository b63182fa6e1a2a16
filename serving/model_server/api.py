"""TensorFlow Serving's services over protocol messages, free of any transport: the same calls serve gRPC and REST."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    input_pb2,
    model_management_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

from serving.model_server import config, examples, tensors
from serving.model_server.errors import ServingError, UsageError, invalid_argument
from serving.model_server.manager import Lease, Manager
from serving.model_server.metrics import Metrics
from serving.model_server.model import DEFAULT_SIGNATURE, Model

_UNMEASURED = nullcontext()
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Inference:
    """Outputs by name, and the version that computed them."""

    version: int
    outputs: Arrays


class Api:
    """The methods of PredictionService and ModelService. Each raises ``ServingError`` with the status to answer."""

    def __init__(
        self, manager: Manager[Model], *, check_method_names: bool = False, metrics: Metrics | None = None
    ) -> None:
        """Answer with what ``manager`` has; ``check_method_names``: see ``examples.classify``."""
        self._manager = manager
        self._check_method_names = check_method_names
        self._metrics = metrics

    def infer(
        self,
        spec: model_pb2.ModelSpec,
        read_inputs: Callable[[meta_graph_pb2.SignatureDef], Arrays],
        output_filter: Sequence[str] = (),
    ) -> Inference:
        """Run the model that ``spec`` names on the arrays that ``read_inputs`` makes of the request."""
        with self._acquire(spec) as lease:
            inputs = read_inputs(lease.servable.signature(spec.signature_name))
            with self._running("Predict", spec.name):
                return Inference(lease.number, lease.servable.run(spec.signature_name, inputs, output_filter))

    def predict(self, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
        """PredictionService/Predict."""
        _require_spec(request)
        result = self.infer(
            request.model_spec,
            lambda _: {alias: tensors.to_array(proto, alias) for alias, proto in request.inputs.items()},
            request.output_filter,
        )
        response = predict_pb2.PredictResponse(model_spec=_answering(request.model_spec, result.version))
        for alias, array in result.outputs.items():
            tensors.fill(response.outputs[alias], array)
        return response

    def classify(self, request: classification_pb2.ClassificationRequest) -> classification_pb2.ClassificationResponse:
        """PredictionService/Classify."""
        _require_spec(request)
        spec = request.model_spec
        with self._acquire(spec) as lease:
            with self._running("Classify", spec.name, request.input):
                result = examples.classify(lease.servable, spec.signature_name, request.input, self._check_method_names)
            return classification_pb2.ClassificationResponse(result=result, model_spec=_answering(spec, lease.number))

    def regress(self, request: regression_pb2.RegressionRequest) -> regression_pb2.RegressionResponse:
        """PredictionService/Regress."""
        _require_spec(request)
        spec = request.model_spec
        with self._acquire(spec) as lease:
            with self._running("Regress", spec.name, request.input):
                result = examples.regress(lease.servable, spec.signature_name, request.input, self._check_method_names)
            return regression_pb2.RegressionResponse(result=result, model_spec=_answering(spec, lease.number))

    def multi_inference(self, request: inference_pb2.MultiInferenceRequest) -> inference_pb2.MultiInferenceResponse:
        """PredictionService/MultiInference: the first task's spec chooses the version."""
        response = inference_pb2.MultiInferenceResponse()
        spec = request.tasks[0].model_spec if request.tasks else model_pb2.ModelSpec()
        with self._acquire(spec) as lease:
            with self._running("MultiInference", spec.name, request.input):
                results = examples.multi_inference(
                    lease.servable, request.tasks, request.input, self._check_method_names
                )
            for task, (_, result) in zip(request.tasks, results, strict=True):
                entry = response.results.add(model_spec=_answering(task.model_spec, lease.number))
                field = "regression_result" if task.method_name == examples.REGRESS_METHOD else "classification_result"
                getattr(entry, field).CopyFrom(result)
        return response

    def get_model_metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """PredictionService/GetModelMetadata: the signatures, the one field there is."""
        _require_spec(request)
        if not request.metadata_field:
            raise invalid_argument("GetModelMetadataRequest must specify at least one metadata_field")
        for name in request.metadata_field:
            if name != "signature_def":
                raise invalid_argument(f"Metadata field {name} is not supported")
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        with self._acquire(request.model_spec) as lease:
            signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=lease.servable.signatures)
            response.model_spec.name = request.model_spec.name
            response.model_spec.version.value = lease.number
        response.metadata["signature_def"].Pack(signatures)
        return response

    def get_model_status(
        self, request: get_model_status_pb2.GetModelStatusRequest
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """ModelService/GetModelStatus."""
        _require_spec(request)
        spec = request.model_spec
        response = get_model_status_pb2.GetModelStatusResponse()
        for version in self._manager.status(spec.name, *_version_choice(spec)):
            entry = response.model_version_status.add(version=version.number, state=int(version.state))
            entry.status.error_code = int(version.status)
            entry.status.error_message = version.message
        return response

    def reload_config(
        self, request: model_management_pb2.ReloadConfigRequest
    ) -> model_management_pb2.ReloadConfigResponse:
        """ModelService/HandleReloadConfigRequest: replaces the whole configuration; answers when it is live."""
        response = model_management_pb2.ReloadConfigResponse()
        try:
            self._manager.reconfigure(config.from_proto(request.config))
        except UsageError as err:
            raise invalid_argument(str(err)) from err
        except ServingError as err:
            response.status.error_code = int(err.status)
            response.status.error_message = err.message
        return response

    def _running(self, method: str, model: str, given: input_pb2.Input | None = None) -> AbstractContextManager[None]:
        if self._metrics is None:
            return _UNMEASURED
        if given is not None:
            self._metrics.read_examples(model, examples.count(given))
        return self._metrics.run(method, model)

    def _acquire(self, spec: model_pb2.ModelSpec) -> Lease[Model]:
        if not spec.name:
            raise invalid_argument("ModelSpec has no name specified.")
        return self._manager.acquire(spec.name, *_version_choice(spec))


def _require_spec(request: Message) -> None:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")


def _answering(asked: model_pb2.ModelSpec, version: int) -> model_pb2.ModelSpec:
    """The spec of an answer: what was asked for, filled in."""
    spec = model_pb2.ModelSpec(name=asked.name, signature_name=asked.signature_name or DEFAULT_SIGNATURE)
    spec.version.value = version
    return spec


def _version_choice(spec: model_pb2.ModelSpec) -> tuple[int | None, str | None]:
    choice = spec.WhichOneof("version_choice")
    return (
        spec.version.value if choice == "version" else None,
        spec.version_label if choice == "version_label" else None,
    )
