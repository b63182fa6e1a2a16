"""gRPC: only translates. Owns the table from errors to gRPC codes; no uncaught exception's text reaches a client."""

import asyncio
import math
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from digits.errors import (
    BadImage,
    BadRequest,
    DigitsError,
    ModelUnavailable,
    NotFound,
    Overloaded,
    PermissionDenied,
    TooLarge,
    Unauthenticated,
    Unimplemented,
    UnsupportedMediaType,
    UpstreamTimeout,
)
from serving.gateway import open_inference, tensorflow_api
from serving.gateway.app import Gateway, request_id_from
from serving.gateway.predictor import TOO_SLOW, Answer, Place
from serving.gateway.tls import server_context
from serving.gateway.tracing import name_upstream, take_up
from serving.gateway.upstream import GET_MODEL_METADATA, GET_MODEL_STATUS, PREDICT, Availability, PassedOn, Version
from serving.protos import digits_pb2 as pb
from serving.protos import open_inference_pb2
from serving.transport.grpc_server import Asked, Call, GrpcServer, Metadata, only_status, packed_status
from serving.transport.http2 import header, packed_string

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Digits"].full_name
PREDICTION_SERVICE: Final = "tensorflow.serving.PredictionService"
MODEL_SERVICE: Final = "tensorflow.serving.ModelService"
INFERENCE_SERVICE: Final = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
HEALTH_NAMES: Final = ("", SERVICE, PREDICTION_SERVICE, MODEL_SERVICE, INFERENCE_SERVICE)
"""What grpc.health.v1 answers for; the empty name is the server as a whole."""

CODES: Final[dict[type[DigitsError], grpc.StatusCode]] = {
    BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
    BadImage: grpc.StatusCode.INVALID_ARGUMENT,
    TooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    UnsupportedMediaType: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    ModelUnavailable: grpc.StatusCode.UNAVAILABLE,
    UpstreamTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""The error table of gRPC. Anything else is a defect: INTERNAL."""

STREAM_WINDOW: Final = 32
"""Requests of one stream under way at once; a client that sends more waits."""

MESSAGE_SLACK: Final = 1024
"""Bytes that a message may be longer than the picture in it."""

PLAIN_METADATA: Final = frozenset({"user-agent", "x-request-id"})
"""Metadata that a direct Classify knows what to do with."""

_REQUEST_ID_NAME: Final = header(b"x-request-id", b"")[:-1]
"""A header's packed beginning; the packed value follows."""

_EXHAUSTED: Final = grpc.StatusCode.RESOURCE_EXHAUSTED.name

_SERVER_FAULTS: Final = frozenset(
    {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
)


Work = Callable[[bytes, float, str], Awaitable[tuple[bytes, str]]]
"""``(message, deadline, request id) -> (answer, model version)``: a method without its transport."""


class Calls:
    """What every method shares: deadline, request id, error table, and what a call leaves behind."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.in_flight = 0
        self.direct = gateway.guard is None
        """Whether Classify may go without a task. A feature that has to see every call sets it to False."""
        self.timeout_s = gateway.settings.timeout_s
        gateway.metrics.watch_requests("grpc", lambda: self.in_flight)

    def unary(self, name: str, work: Work) -> Any:
        """The handler of a method: bytes in, bytes out."""

        async def call(message: bytes, context: Any) -> bytes:
            started = time.monotonic()
            fields: dict[str, object] = {}
            request_id = _request_id(context.invocation_metadata(), fields)
            self.in_flight += 1
            try:
                if self.gateway.guard is not None:
                    self.admit(context, fields)
                answer, model_version = await work(message, self.deadline(context, started), request_id)
            except asyncio.CancelledError:
                self.finished(name, grpc.StatusCode.CANCELLED, started, request_id, **fields)
                raise
            except Exception as err:  # noqa: BLE001 - the edge: every exception is translated once, here
                code, error, text, more = self.translate(err, request_id)
                self.finished(name, code, started, request_id, error=error, **fields)
                await context.abort(code, text, (("x-request-id", request_id), *more))
            finally:
                self.in_flight -= 1
            context.set_trailing_metadata((("x-request-id", request_id),))
            self.finished(name, grpc.StatusCode.OK, started, request_id, model_version, **fields)
            return answer

        return grpc.unary_unary_rpc_method_handler(call)

    def admit(self, context: Any, fields: dict[str, object]) -> None:
        """Whose key is it, and has the caller something left? The key's name goes to the log's fields."""
        guard = self.gateway.guard
        assert guard is not None
        caller = guard.admit(context.invocation_metadata(), _address(context))
        if caller:
            fields["caller"] = caller

    def deadline(self, context: Any, started: float) -> float:
        """The caller's deadline, or our own where it has none: ``time.monotonic()`` seconds."""
        remaining_s = context.time_remaining()
        return started + (self.timeout_s if remaining_s is None else remaining_s)

    def translate(
        self, err: Exception, request_id: str
    ) -> tuple[grpc.StatusCode, str, str, tuple[tuple[str, str], ...]]:
        """Code, machine-readable name, text and trailing metadata."""
        if isinstance(err, PassedOn):
            return err.status, err.code, str(err), (("x-error-code", err.code),)
        code = next((CODES[kind] for kind in type(err).__mro__ if kind in CODES), None)
        if code is None or not isinstance(err, DigitsError):
            self.gateway.log.error("defect", request_id=request_id, exc_info=err)
            return grpc.StatusCode.INTERNAL, "internal", "internal error", (("x-error-code", "internal"),)
        more: tuple[tuple[str, str], ...] = (("x-error-code", err.code),)
        if isinstance(err, Overloaded | ModelUnavailable) and err.retry_after_s:
            more = (*more, ("grpc-retry-pushback-ms", str(max(1, math.ceil(err.retry_after_s * 1000)))))
        return code, err.code, str(err), more

    def finished(
        self,
        method: str,
        code: grpc.StatusCode,
        started: float,
        request_id: str,
        model_version: str = "",
        /,
        **fields: object,
    ) -> None:
        """Count a call that has ended and write its line."""
        failed = code in _SERVER_FAULTS
        self.gateway.finished(
            "grpc", method, code.name, started, request_id, failed=failed, model_version=model_version, **fields
        )


class DigitsService:
    """``digits.v1.Digits`` on the gateway."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._gateway = calls.gateway
        self._shed_ends: dict[float, bytes] = {}
        """By whole seconds to come back after, sixty at most: how a refusal ends, but for its id."""

    async def classify(self, message: bytes, deadline: float, request_id: str) -> tuple[bytes, str]:
        """ClassifyRequest → ClassifyResponse."""
        answer = await self._gateway.classify(_image(message), deadline)
        return _response(answer, request_id).SerializeToString(), answer.model_version

    def shed(self, asked: Asked) -> bytes | None:
        """What ends a Classify that lasting overload leaves no room for, before its picture is looked at.

        In a storm only some are told more than the code: words for each take the time in which others are answered.
        """
        if not self._calls.direct:
            return None
        retry_after_s = self._gateway.predictor.sheds()
        if not retry_after_s:
            return None
        now = time.monotonic()
        if not self._gateway.has_words(now):
            self._gateway.shed_without_words("grpc", "Classify", _EXHAUSTED)
            return b""
        request_id = _request_id(asked.metadata, {})
        end = self._shed_ends.get(retry_after_s)
        if end is None:
            code, _, text, more = self._calls.translate(Overloaded(TOO_SLOW, retry_after_s), request_id)
            end = self._shed_ends[retry_after_s] = only_status(packed_status(code, text, more)) + _REQUEST_ID_NAME
        self._gateway.shed("grpc", "Classify", _EXHAUSTED, now, request_id)
        return end + packed_string(request_id.encode())

    def classify_directly(self, call: Call, message: bytes) -> None:
        """Classify without a task, for a picture that is decoded at once."""
        gateway, calls = self._gateway, self._calls
        request_id = _request_id(call.asked.metadata, {})
        place = _DirectPlace(calls, call, request_id)
        image_u8 = None
        try:
            if calls.direct:
                gateway.predictor.check_room(place.deadline)
                image_u8 = gateway.pictures.read_at_once(_image(message))
            if image_u8 is None:
                call.start(message)
                return
            calls.in_flight += 1
            place.images_u8 = image_u8
            gateway.predictor.enter(place)
            call.on_leave(place.left)
        except Exception as err:  # noqa: BLE001 - the edge: every exception is translated once
            if not place.images_u8:
                calls.in_flight += 1
            place.refused(err)

    async def classify_stream(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """ClassifyStream: answers in the order of the requests, several of them under way at once."""
        started = time.monotonic()
        fields: dict[str, object] = {}
        request_id = _request_id(context.invocation_metadata(), fields)
        caller = ""
        code = grpc.StatusCode.CANCELLED
        count = 0
        if self._gateway.guard is not None:
            try:
                caller = self._gateway.guard.identify(context.invocation_metadata())
            except DigitsError as err:
                code, error, text, more = self._calls.translate(err, request_id)
                self._calls.finished("ClassifyStream", code, started, request_id, error=error)
                await context.abort(code, text, (("x-request-id", request_id), *more))
            if caller:
                fields["caller"] = caller
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(STREAM_WINDOW)
        reader = asyncio.create_task(self._read_stream(messages, answers, request_id, context, caller))
        self._calls.in_flight += 1
        try:
            while (answer := await answers.get()) is not None:
                count += 1
                yield await answer
            code = grpc.StatusCode.OK
        finally:
            self._calls.in_flight -= 1
            reader.cancel()
            while not answers.empty():
                if (left := answers.get_nowait()) is not None:
                    left.cancel()
            context.set_trailing_metadata((("x-request-id", request_id),))
            self._calls.finished("ClassifyStream", code, started, request_id, messages=count, **fields)

    async def _read_stream(
        self, messages: AsyncIterator[bytes], answers: "asyncio.Queue[Any]", request_id: str, context: Any, caller: str
    ) -> None:
        count = 0
        try:
            async for message in messages:
                count += 1
                answer = asyncio.create_task(self._one_of_stream(message, f"{request_id}.{count}", context, caller))
                try:
                    await answers.put(answer)
                except asyncio.CancelledError:
                    answer.cancel()
                    raise
        finally:
            await answers.put(None)

    async def _one_of_stream(self, message: bytes, request_id: str, context: Any, caller: str) -> bytes:
        try:
            if self._gateway.guard is not None:
                self._gateway.guard.count(caller, _address(context))
            answer = await self._gateway.classify(_image(message), self._calls.deadline(context, time.monotonic()))
        except Exception as err:  # noqa: BLE001 - told in the stream, which goes on
            _, name, text, _ = self._calls.translate(err, request_id)
            error = pb.ClassifyError(code=name, message=text, request_id=request_id)
            return pb.ClassifyStreamResponse(error=error).SerializeToString()
        return pb.ClassifyStreamResponse(answer=_response(answer, request_id)).SerializeToString()


class _DirectPlace(Place):
    """A Classify that has no task: what it leaves behind when it ends."""

    __slots__ = ("call", "calls", "request_id")

    def __init__(self, calls: Calls, call: Call, request_id: str) -> None:
        timeout_s = call.asked.timeout_s
        super().__init__(b"", 1, call.started + (calls.timeout_s if timeout_s is None else timeout_s))
        self.calls = calls
        self.call = call
        self.request_id = request_id

    def answered(self, answers: list[Answer]) -> None:
        answer = answers[0]
        self.call.answer(
            _response(answer, self.request_id).SerializeToString(), header(b"x-request-id", self.request_id.encode())
        )
        self._finished(grpc.StatusCode.OK, answer.model_version)

    def refused(self, err: Exception) -> None:
        code, name, text, more = self.calls.translate(err, self.request_id)
        self.call.fail_packed(packed_status(code, text, more) + header(b"x-request-id", self.request_id.encode()))
        self._finished(code, error=name)

    def left(self) -> None:
        if not self.over:
            self.calls.gateway.predictor.leave(self)
            self._finished(grpc.StatusCode.CANCELLED)

    def _finished(self, code: grpc.StatusCode, model_version: str = "", **fields: object) -> None:
        self.calls.in_flight -= 1
        self.calls.finished("Classify", code, self.call.started, self.request_id, model_version, **fields)


class TensorFlowService:
    """``tensorflow.serving.PredictionService`` and ``ModelService``: looked at, then passed on as they came."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._max_images = gateway.settings.max_request_images
        self._max_calls = gateway.settings.max_passed_calls
        self._calls = 0

    async def predict(self, message: bytes, deadline: float, request_id: str) -> tuple[bytes, str]:
        """PredictRequest → PredictResponse."""
        version = tensorflow_api.check_predict(message, self._max_images)
        answer = await self._pass_on(PREDICT, message, version, deadline, request_id)
        return answer, tensorflow_api.version_of(answer)

    async def get_model_metadata(self, message: bytes, deadline: float, request_id: str) -> tuple[bytes, str]:
        """GetModelMetadataRequest → GetModelMetadataResponse."""
        version = tensorflow_api.check_metadata(message)
        return await self._pass_on(GET_MODEL_METADATA, message, version, deadline, request_id), ""

    async def get_model_status(self, message: bytes, deadline: float, request_id: str) -> tuple[bytes, str]:
        """GetModelStatusRequest → GetModelStatusResponse."""
        version = tensorflow_api.check_status(message)
        answer = await self._pass_on(GET_MODEL_STATUS, message, version, deadline, request_id)
        return tensorflow_api.plain_status(answer), ""

    async def _pass_on(self, path: str, message: bytes, version: Version, deadline: float, request_id: str) -> bytes:
        if self._calls >= self._max_calls:
            self._gateway.metrics.shed("passed_calls_full")
            raise Overloaded(f"{self._calls} calls are being passed on already; try again later")
        self._calls += 1
        name_upstream(request_id)
        try:
            return await self._gateway.upstream.pass_on(path, message, version, deadline)
        finally:
            self._calls -= 1


class InferenceService:
    """``inference.GRPCInferenceService``: the open inference protocol. Bytes → bytes and the version that answered."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._max_images = gateway.settings.max_request_images

    async def server_live(self, message: bytes, _: float, __: str) -> tuple[bytes, str]:
        """ServerLive."""
        open_inference.parse(open_inference_pb2.ServerLiveRequest, message)
        return open_inference_pb2.ServerLiveResponse(live=True).SerializeToString(), ""

    async def server_ready(self, message: bytes, _: float, __: str) -> tuple[bytes, str]:
        """ServerReady."""
        open_inference.parse(open_inference_pb2.ServerReadyRequest, message)
        ready = not self._gateway.why_not_ready()
        return open_inference_pb2.ServerReadyResponse(ready=ready).SerializeToString(), ""

    async def model_ready(self, message: bytes, _: float, __: str) -> tuple[bytes, str]:
        """ModelReady."""
        asked = open_inference.parse(open_inference_pb2.ModelReadyRequest, message)
        version = open_inference.version_in(asked.name, asked.version)
        versions = self._gateway.upstream.availability.versions
        ready = not self._gateway.why_not_ready() and open_inference.is_ready(version, versions)
        return open_inference_pb2.ModelReadyResponse(ready=ready).SerializeToString(), ""

    async def server_metadata(self, message: bytes, _: float, __: str) -> tuple[bytes, str]:
        """ServerMetadata."""
        open_inference.parse(open_inference_pb2.ServerMetadataRequest, message)
        answer = open_inference_pb2.ServerMetadataResponse(**open_inference.server_metadata())
        return answer.SerializeToString(), ""

    async def model_metadata(self, message: bytes, _: float, __: str) -> tuple[bytes, str]:
        """ModelMetadata."""
        asked = open_inference.parse(open_inference_pb2.ModelMetadataRequest, message)
        version = open_inference.version_in(asked.name, asked.version)
        versions = open_inference.available(version, self._gateway.upstream.availability.versions)
        class_count = self._gateway.upstream.classes(version).count
        return open_inference.model_metadata_message(versions, class_count), ""

    async def model_infer(self, message: bytes, deadline: float, _: str) -> tuple[bytes, str]:
        """ModelInfer."""
        asked, version = open_inference.read_message(message, self._max_images)
        answers = await self._gateway.predictor.submit(asked.images_u8, asked.images, deadline, version)
        return open_inference.dump_message(asked, answers), answers[0].model_version


class RpcServer:
    """The gRPC port: Digits, health that follows readiness, reflection.

    Args:
        gateway: What it translates for.
        listener: A bound socket.
    """

    def __init__(self, gateway: Gateway, listener: socket.socket) -> None:
        settings = gateway.settings
        self._gateway = gateway
        self._listener = listener
        self._server = GrpcServer(
            settings.max_body_bytes + MESSAGE_SLACK,
            settings.header_timeout_s,
            settings.body_timeout_s,
            lambda err: gateway.log.error("defect", exc_info=err),
            settings.max_connections,
            lambda: gateway.metrics.shed("connections_full"),
        )
        calls = Calls(gateway)
        service = DigitsService(calls)
        tensorflow = TensorFlowService(gateway)
        inference = InferenceService(gateway)
        handlers = {
            SERVICE: {
                "Classify": calls.unary("Classify", service.classify),
                "ClassifyStream": grpc.stream_stream_rpc_method_handler(service.classify_stream),
            },
            PREDICTION_SERVICE: {
                "Predict": calls.unary("Predict", tensorflow.predict),
                "GetModelMetadata": calls.unary("GetModelMetadata", tensorflow.get_model_metadata),
            },
            INFERENCE_SERVICE: {
                "ServerLive": calls.unary("ServerLive", inference.server_live),
                "ServerReady": calls.unary("ServerReady", inference.server_ready),
                "ModelReady": calls.unary("ModelReady", inference.model_ready),
                "ServerMetadata": calls.unary("ServerMetadata", inference.server_metadata),
                "ModelMetadata": calls.unary("ModelMetadata", inference.model_metadata),
                "ModelInfer": calls.unary("ModelInfer", inference.model_infer),
            },
            MODEL_SERVICE: {"GetModelStatus": calls.unary("GetModelStatus", tensorflow.get_model_status)},
        }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(name, methods) for name, methods in handlers.items()]
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, INFERENCE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(names), self._server
        )
        self._server.add_direct(f"/{SERVICE}/Classify", service.classify_directly, PLAIN_METADATA, service.shed)
        self.port: int = listener.getsockname()[1]
        self._changes: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Accept calls; health follows the model server from here on."""
        await self._set_health(self._gateway.upstream.availability)
        self._gateway.upstream.on_change(self._on_change)
        await self._server.start(self._listener, server_context(self._gateway.settings, "h2"))

    async def not_serving(self) -> None:
        """Tell balancers that this process is about to go."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, finish those under way within ``grace_s``."""
        await self._server.stop(grace_s)

    def _on_change(self, availability: Availability) -> None:
        task = asyncio.get_running_loop().create_task(self._set_health(availability))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def _set_health(self, availability: Availability) -> None:
        status = health_pb2.HealthCheckResponse
        state = status.SERVING if availability.ready else status.NOT_SERVING
        for name in HEALTH_NAMES:
            await self._health.set(name, state)


def _image(message: bytes) -> bytes:
    try:
        return pb.ClassifyRequest.FromString(message).image
    except DecodeError as err:
        raise BadRequest("the message is not a digits.v1.ClassifyRequest") from err


def _response(answer: Answer, request_id: str) -> pb.ClassifyResponse:
    return pb.ClassifyResponse(
        digit=answer.digit,
        confidence=answer.confidence,
        probabilities=answer.probabilities,
        model_version=answer.model_version,
        request_id=request_id,
        label=answer.label,
        unsure=answer.unsure,
    )


def _address(context: Any) -> str:
    """``ipv4:127.0.0.1:50000`` → ``127.0.0.1``, ``ipv6:[::1]:50000`` → ``[::1]``."""
    peer: str = context.peer()
    return peer.partition(":")[2].rpartition(":")[0]


def _request_id(metadata: Metadata, fields: dict[str, object]) -> str:
    """The call's id, its own or a new one. A trace that it belongs to is taken up and goes to the log's fields."""
    sent_id = traceparent = None
    for name, value in metadata:
        if name == "x-request-id":
            sent_id = value if isinstance(value, str) else None
        elif name == "traceparent":
            traceparent = value
    request_id = request_id_from(sent_id)
    if traceparent is not None and (trace_id := take_up(traceparent, request_id)):
        fields["trace_id"] = trace_id
    return request_id
