"""The gRPC face: method paths to the calls of ``api``, statuses to gRPC codes, and the reflection service."""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from grpc_reflection.v1alpha import reflection, reflection_pb2
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

log = structlog.get_logger()

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"

Request = TypeVar("Request", bound=Message)
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def handlers(api: Api, control: ThreadPoolExecutor, metrics: Metrics | None = None) -> list[grpc.GenericRpcHandler]:
    """The services, for a synchronous gRPC server.

    Args:
        api: what answers.
        control: threads for everything but inference, so that status answers while all others are at work.
        metrics: told of each inference.
    """
    inference: dict[str, tuple[Callable[[Any], Message], Any]] = {
        "Predict": (api.predict, predict_pb2.PredictRequest),
        "Classify": (api.classify, classification_pb2.ClassificationRequest),
        "Regress": (api.regress, regression_pb2.RegressionRequest),
        "MultiInference": (api.multi_inference, inference_pb2.MultiInferenceRequest),
    }
    prediction = {
        **{
            name: _unary(_measured(answer, name, metrics) if metrics else answer, request_type)
            for name, (answer, request_type) in inference.items()
        },
        "GetModelMetadata": _unary(api.get_model_metadata, get_model_metadata_pb2.GetModelMetadataRequest, control),
    }
    models = {
        "GetModelStatus": _unary(api.get_model_status, get_model_status_pb2.GetModelStatusRequest, control),
        "HandleReloadConfigRequest": _unary(api.reload_config, model_management_pb2.ReloadConfigRequest, control),
    }
    return [
        grpc.method_handlers_generic_handler(PREDICTION_SERVICE, prediction),
        grpc.method_handlers_generic_handler(MODEL_SERVICE, models),
        _reflection(control),
    ]


def _unary(
    answer: Callable[[Request], Message], request_type: type[Request], pool: ThreadPoolExecutor | None = None
) -> grpc.RpcMethodHandler:
    """A method whose statuses are the ServingErrors of ``answer``; anything else is logged and is "internal error"."""

    def behavior(content: bytes, context: grpc.ServicerContext) -> Message | None:
        try:
            return answer(_parse(content, request_type))
        except ServingError as err:
            context.set_code(_CODES[int(err.status)])
            context.set_details(err.message)
        except Exception:
            log.exception("internal_error", method=answer.__name__)
            context.set_code(grpc.StatusCode.INTERNAL)
            context.set_details("internal error")
        return None

    if pool is not None:
        behavior.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return grpc.unary_unary_rpc_method_handler(behavior, None, _serialize)


def _parse(content: bytes, request_type: type[Request]) -> Request:
    """Here and not in grpc, which calls what it cannot parse an internal error and logs a traceback."""
    try:
        return request_type.FromString(content)
    except DecodeError as err:
        raise invalid_argument(f"the request is no {request_type.DESCRIPTOR.full_name}") from err


def _measured(answer: Callable[[Request], Message], name: str, metrics: Metrics) -> Callable[[Request], Message]:
    @functools.wraps(answer)
    def measured(request: Any) -> Message:
        asked = request if name != "MultiInference" else next(iter(request.tasks), inference_pb2.InferenceTask())
        with metrics.request("GRPC", name, asked.model_spec.name):
            return answer(request)

    return measured


def _serialize(message: Message | None) -> bytes:
    return b"" if message is None else message.SerializeToString()


def _reflection(control: ThreadPoolExecutor) -> grpc.GenericRpcHandler:
    servicer = reflection.ReflectionServicer(
        (PREDICTION_SERVICE, MODEL_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    )

    def info(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        return servicer.ServerReflectionInfo(requests, context)

    info.experimental_thread_pool = control  # type: ignore[attr-defined]
    handler = grpc.stream_stream_rpc_method_handler(
        info,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, {"ServerReflectionInfo": handler})
