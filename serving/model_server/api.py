"""TensorFlow Serving's services over protocol messages, free of any transport: the same calls serve gRPC and REST."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_pb2,
    predict_pb2,
)

from serving.model_server import config, tensors
from serving.model_server.errors import Code, ServingError, UsageError, invalid_argument
from serving.model_server.manager import Lease, Manager
from serving.model_server.saved_model import DEFAULT_SIGNATURE, SavedModel

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Inference:
    """Outputs by name, and what computed them."""

    version: int
    signature_name: str
    outputs: Arrays


class Api:
    """The methods of PredictionService and ModelService. Each raises ``ServingError`` with the status to answer."""

    def __init__(self, manager: Manager[SavedModel]) -> None:
        self._manager = manager

    def infer(
        self,
        spec: model_pb2.ModelSpec,
        read_inputs: Callable[[meta_graph_pb2.SignatureDef], Arrays],
        output_filter: Sequence[str] = (),
    ) -> Inference:
        """Run the model that ``spec`` names on the arrays that ``read_inputs`` makes of the request."""
        with self._acquire(spec) as lease:
            signature_name = spec.signature_name or DEFAULT_SIGNATURE
            inputs = read_inputs(lease.servable.signature(signature_name))
            return Inference(lease.number, signature_name, lease.servable.run(signature_name, inputs, output_filter))

    def predict(self, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
        """PredictionService/Predict."""
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
        result = self.infer(
            request.model_spec,
            lambda _: {alias: tensors.to_array(proto, alias) for alias, proto in request.inputs.items()},
            request.output_filter,
        )
        response = predict_pb2.PredictResponse()
        response.model_spec.name = request.model_spec.name
        response.model_spec.version.value = result.version
        response.model_spec.signature_name = result.signature_name
        for alias, array in result.outputs.items():
            tensors.fill(response.outputs[alias], array)
        return response

    def get_model_metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """PredictionService/GetModelMetadata: the signatures, the one field there is."""
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
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
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
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

    def unimplemented(self, _request: Message) -> Message:
        """Classify, Regress and MultiInference: known, not offered."""
        raise ServingError(Code.UNIMPLEMENTED, "only Predict is offered; send the tensors of a Predict signature")

    def _acquire(self, spec: model_pb2.ModelSpec) -> Lease[SavedModel]:
        if not spec.name:
            raise invalid_argument("ModelSpec has no name specified.")
        return self._manager.acquire(spec.name, *_version_choice(spec))


def _version_choice(spec: model_pb2.ModelSpec) -> tuple[int | None, str | None]:
    choice = spec.WhichOneof("version_choice")
    return (
        spec.version.value if choice == "version" else None,
        spec.version_label if choice == "version_label" else None,
    )
