"""The REST face: TensorFlow Serving's paths to the calls of ``api``, statuses to HTTP codes."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from urllib.parse import unquote

import orjson
import structlog
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    regression_pb2,
)

from serving.model_server import json_examples, json_tensors
from serving.model_server.api import Api
from serving.model_server.errors import Code, ServingError, invalid_argument
from serving.model_server.metrics import CONTENT_TYPE, Metrics

log = structlog.get_logger()

_MODEL = r"/v1/models/(?P<model>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_INFERENCE = re.compile(_MODEL + r":(?P<method>classify|regress|predict)", re.IGNORECASE)
_ABOUT = re.compile(_MODEL + r"(?P<metadata>/metadata)?", re.IGNORECASE)

HTTP_STATUS = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.UNKNOWN: 500,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DATA_LOSS: 500,
    Code.UNAUTHENTICATED: 401,
}
_CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST, GET",
    "Access-Control-Allow-Headers": "Content-Type",
}


class _TooLarge(Exception):
    """The body is over the limit; HTTP has a code for it that the serving statuses have not."""


def create_app(
    api: Api,
    pool: ThreadPoolExecutor,
    *,
    timeout_s: float,
    max_body_bytes: int,
    cors: bool = False,
    metrics: Metrics | None = None,
    metrics_path: str = "",
) -> Starlette:
    """The REST API as an ASGI application.

    Args:
        api: what answers.
        pool: threads on which it answers; the event loop only moves bytes.
        timeout_s: limit for a whole call, its body included; 504 after it.
        max_body_bytes: larger bodies get 413.
        cors: allow browsers' cross-origin requests.
        metrics: told of each inference, and offered at ``metrics_path``.
        metrics_path: where.
    """

    async def metrics_page(_request: Request) -> Response:
        assert metrics is not None
        page = await asyncio.get_running_loop().run_in_executor(None, metrics.text)
        return Response(page, headers={"content-type": CONTENT_TYPE})

    async def endpoint(request: Request) -> Response:
        headers = _CORS if cors else None
        if cors and request.method == "OPTIONS":
            return Response(status_code=200, headers=headers)
        try:
            async with asyncio.timeout(timeout_s):
                body = await _body(request, max_body_bytes)
                answer = await asyncio.get_running_loop().run_in_executor(
                    pool, _answer, api, request.method, request.scope["raw_path"].decode("latin-1"), body, metrics
                )
            return Response(answer, media_type="application/json", headers=headers)
        except ServingError as err:
            return _error(HTTP_STATUS[err.status], err.message, headers)
        except _TooLarge:
            return _error(413, f"the body is larger than {max_body_bytes} bytes", headers, close=True)
        except TimeoutError:
            return _error(504, f"no answer within {timeout_s:g} s", headers, close=True)
        except ClientDisconnect:
            return _error(499, "the client left", headers)
        except Exception:
            log.exception("internal_error", method="rest")
            return _error(500, "internal error", headers)

    routes = [Route("/{path:path}", endpoint, methods=["GET", "POST", "OPTIONS"])]
    if metrics is not None:
        routes.insert(0, Route(metrics_path, metrics_page, methods=["GET"]))
    return Starlette(routes=routes)


def error_body(message: str) -> bytes:
    """TensorFlow Serving's error body."""
    return orjson.dumps({"error": message})


def _error(status: int, message: str, headers: dict[str, str] | None, close: bool = False) -> Response:
    if close:  # a body may still be on its way
        headers = {**(headers or {}), "Connection": "close"}
    return Response(error_body(message), status, media_type="application/json", headers=headers)


async def _body(request: Request, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _TooLarge
        chunks.append(chunk)
    return b"".join(chunks)


def _answer(api: Api, method: str, path: str, body: bytes, metrics: Metrics | None) -> bytes:
    path = path.partition("?")[0]
    if method == "POST" and (match := _INFERENCE.fullmatch(path)):
        name = match["method"].lower()
        with metrics.request("REST", name.title(), unquote(match["model"])) if metrics else nullcontext():
            return _INFER[name](api, _spec(match), body)
    if method == "GET" and (match := _ABOUT.fullmatch(path)):
        return (_metadata if match["metadata"] else _status)(api, _spec(match))
    if path.lower().startswith("/v1/"):
        raise invalid_argument(f"Malformed request: {method} {path}")
    raise ServingError(Code.NOT_FOUND, f"no such path: {path}; the API is under /v1/models/")


def _spec(match: re.Match[str]) -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=unquote(match["model"]))
    if match["version"]:
        if int(match["version"]) > 2**63 - 1:
            raise invalid_argument(f"Failed to convert version: {match['version']} to numeric.")
        spec.version.value = int(match["version"])
    elif match["label"]:
        spec.version_label = unquote(match["label"])
    return spec


def _predict(api: Api, spec: model_pb2.ModelSpec, body: bytes) -> bytes:
    request = json_tensors.parse(body)
    spec.signature_name = request.signature_name
    result = api.infer(spec, lambda signature: json_tensors.read_inputs(request, signature))
    return json_tensors.dump(result.outputs, request.row_format)


def _classify(api: Api, spec: model_pb2.ModelSpec, body: bytes) -> bytes:
    spec.signature_name, given = json_examples.parse(body)
    request = classification_pb2.ClassificationRequest(model_spec=spec, input=given)
    return json_examples.dump_classifications(api.classify(request).result)


def _regress(api: Api, spec: model_pb2.ModelSpec, body: bytes) -> bytes:
    spec.signature_name, given = json_examples.parse(body)
    request = regression_pb2.RegressionRequest(model_spec=spec, input=given)
    return json_examples.dump_regressions(api.regress(request).result)


_INFER = {"predict": _predict, "classify": _classify, "regress": _regress}


def _status(api: Api, spec: model_pb2.ModelSpec) -> bytes:
    response = api.get_model_status(get_model_status_pb2.GetModelStatusRequest(model_spec=spec))
    return _pretty(_to_dict(response))


def _metadata(api: Api, spec: model_pb2.ModelSpec) -> bytes:
    request = get_model_metadata_pb2.GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"])
    response = api.get_model_metadata(request)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    return _pretty({"model_spec": _to_dict(response.model_spec), "metadata": {"signature_def": _to_dict(signatures)}})


def _to_dict(message: Message) -> dict[str, object]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _pretty(document: object) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2)
