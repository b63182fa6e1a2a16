"""The gRPC face: method paths to the calls of ``api``, and the reflection service."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

# They are not used here, but reflection finds services by their registered descriptors.
from tensorflow_serving.apis import model_service_pb2 as _model_service_pb2  # noqa: F401
from tensorflow_serving.apis import prediction_service_pb2 as _prediction_service_pb2  # noqa: F401

from serving.model_server.api import Api
from serving.model_server.errors import ServingError, invalid_argument
from serving.model_server.metrics import Metrics
from serving.model_server.workers import MOST_READ_BYTES, Workers, end, is_wanted, outcome_of
from serving.transport.grpc_server import Call, GrpcServer

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"

Direct = Callable[[Call, bytes], None]


def add_services(server: GrpcServer, api: Api, workers: Workers, metrics: Metrics | None = None) -> None:
    """Have ``server`` answer with ``api``. To be called in its event loop.

    Args:
        server: where they are added.
        api: what answers.
        workers: where inference is computed. All else has its own threads, so that status answers while all are busy.
        metrics: told of each inference.
    """
    control = ThreadPoolExecutor(4, "control")
    inference: dict[str, tuple[Callable[[Any], Message], type[Message]]] = {
        "Predict": (api.predict, predict_pb2.PredictRequest),
        "Classify": (api.classify, classification_pb2.ClassificationRequest),
        "Regress": (api.regress, regression_pb2.RegressionRequest),
        "MultiInference": (api.multi_inference, inference_pb2.MultiInferenceRequest),
    }
    for name, (answer, request_type) in inference.items():
        measured = _measured(answer, name, metrics) if metrics else answer
        server.add_direct(f"/{PREDICTION_SERVICE}/{name}", _inference(name, measured, request_type, workers))
    others: dict[str, tuple[Callable[[Any], Message], type[Message]]] = {
        f"/{PREDICTION_SERVICE}/GetModelMetadata": (
            api.get_model_metadata, get_model_metadata_pb2.GetModelMetadataRequest,
        ),
        f"/{MODEL_SERVICE}/GetModelStatus": (api.get_model_status, get_model_status_pb2.GetModelStatusRequest),
        f"/{MODEL_SERVICE}/HandleReloadConfigRequest": (api.reload_config, model_management_pb2.ReloadConfigRequest),
    }  # fmt: skip
    for path, (answer, request_type) in others.items():
        server.add_direct(path, _on_thread(answer, request_type, control))
    names = (PREDICTION_SERVICE, MODEL_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), server)


def _inference(name: str, answer: Callable[[Any], Message], request_type: type[Message], workers: Workers) -> Direct:
    def begin(call: Call, content: bytes) -> None:
        if len(content) > MOST_READ_BYTES:
            workers.run(call, None, lambda: answer(_parse(content, request_type)).SerializeToString())
            return
        try:
            request = _parse(content, request_type)
        except ServingError as err:
            call.fail(grpc.StatusCode.INVALID_ARGUMENT, err.message)
            return
        spec = _asked(request, name).model_spec
        kind = (name, spec.name, spec.signature_name, len(content).bit_length())
        workers.run(call, kind, lambda: answer(request).SerializeToString())

    return begin


def _on_thread(answer: Callable[[Any], Message], request_type: type[Message], pool: ThreadPoolExecutor) -> Direct:
    def work(call: Call, content: bytes) -> None:
        outcome = outcome_of(lambda: answer(_parse(content, request_type)).SerializeToString())
        call.connection.loop.call_soon_threadsafe(back, call, outcome)

    def back(call: Call, outcome: Any) -> None:
        if is_wanted(call):
            end(call, outcome)

    return lambda call, content: cast(None, pool.submit(work, call, content))


def _parse(content: bytes, request_type: type[Message]) -> Any:
    try:
        return request_type.FromString(content)
    except DecodeError as err:
        raise invalid_argument(f"the request is no {request_type.DESCRIPTOR.full_name}") from err


def _asked(request: Any, name: str) -> Any:
    """What has the spec of the model that is asked."""
    return request if name != "MultiInference" else next(iter(request.tasks), inference_pb2.InferenceTask())


def _measured(answer: Callable[[Any], Message], name: str, metrics: Metrics) -> Callable[[Any], Message]:
    @functools.wraps(answer)
    def measured(request: Any) -> Message:
        with metrics.request("GRPC", name, _asked(request, name).model_spec.name):
            return answer(request)

    return measured
