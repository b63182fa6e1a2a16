"""REST: only translates, and owns the HTTP error table. Plain ASGI, so that ``/classify`` costs little over nothing."""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, cast

import grpc
import numpy as np
import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from digits import contract
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
from digits.number import choose
from serving.gateway import open_inference, tensorflow_api
from serving.gateway.app import Gateway, request_id_from
from serving.gateway.docs import CSS, render_docs
from serving.gateway.lean import LeanRequest, classify_body
from serving.gateway.page_files import PageFile, read_page
from serving.gateway.predictor import Answer
from serving.gateway.schema import ROUTES, PassedThroughError, Route, openapi_document
from serving.gateway.tracing import name_upstream, take_up
from serving.gateway.upstream import GET_MODEL_METADATA, GET_MODEL_STATUS, LATEST, PassedOn, Version

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

ON_DISCONNECT: Final = "digits.on_disconnect"
"""Key of the scope under which a request leaves what is to be called when its client hangs up."""


CORK: Final = "digits.cork"
"""Key of the scope under which the server leaves its transport's ``hold`` and ``release``, if it has them."""


class MethodNotAllowed(DigitsError):
    """The route does not know this method."""

    code = "method_not_allowed"

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class BodyTooSlow(DigitsError):
    """The body did not arrive in time."""

    code = "request_timeout"


STATUS: Final[dict[type[DigitsError], int]] = {
    BadRequest: 400,
    BadImage: 400,
    Unauthenticated: 401,
    PermissionDenied: 403,
    NotFound: 404,
    MethodNotAllowed: 405,
    BodyTooSlow: 408,
    TooLarge: 413,
    UnsupportedMediaType: 415,
    Overloaded: 429,
    Unimplemented: 501,
    ModelUnavailable: 503,
    UpstreamTimeout: 504,
}
"""The error table of HTTP. Anything else is a defect: 500."""

_PASSED_ON: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: UpstreamTimeout,
    grpc.StatusCode.UNAVAILABLE: ModelUnavailable,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
}
"""What a code that the model server gave to a request passed on to it is here."""

JSON: Final = (b"content-type", b"application/json")
NO_SNIFF: Final = (b"x-content-type-options", b"nosniff")

PAGE_HEADERS: Final[Headers] = [
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        b"frame-ancestors 'none'",
    ),
    NO_SNIFF,
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"geolocation=(), microphone=(), camera=()"),
]
"""On everything that a browser shows."""


class Response(NamedTuple):
    """Status, headers (content-length and x-request-id are added) and body."""

    status: int
    headers: Headers
    body: bytes
    model_version: str = ""


class _ClientGone(Exception):
    """The client has hung up: there is nobody to answer."""


class Request:
    """What a handler needs of a request."""

    __slots__ = (
        "content_length",
        "content_type",
        "fields",
        "id",
        "method",
        "path",
        "path_fields",
        "receive",
        "route",
        "scope",
        "started",
    )

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.started = time.monotonic()
        self.scope = scope
        self.receive = receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.route: Route | None = None
        self.path_fields: dict[str, str] = {}
        self.fields: dict[str, object] = {}
        self.content_type = b""
        self.content_length: bytes | None = None
        sent_id = traceparent = None
        for name, value in scope["headers"]:
            if name == b"content-type":
                self.content_type = value
            elif name == b"content-length":
                self.content_length = value
            elif name == b"x-request-id":
                sent_id = value.decode("latin-1")
            elif name == b"traceparent":
                traceparent = value
        self.id = request_id_from(sent_id)
        if traceparent is not None and (trace_id := take_up(traceparent, self.id)):
            self.fields["trace_id"] = trace_id

    def header(self, wanted: bytes) -> str:
        """A header's value, or nothing."""
        return next((value.decode("latin-1") for name, value in self.scope["headers"] if name == wanted), "")


class RestApp:
    """The ASGI application.

    Args:
        gateway: What it translates for.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.lean = gateway.guard is None
        """Whether ``lean.py`` may answer /classify. A feature that has to see every request sets it to False."""
        self._gateway = gateway
        self._settings = gateway.settings
        self._exact: dict[str, dict[str, Route]] = {}
        self._patterns: dict[re.Pattern[str], dict[str, Route]] = {}
        for route in ROUTES:
            if "{" in route.path:
                self._patterns.setdefault(_pattern(route.path), {})[route.method] = route
            else:
                self._exact.setdefault(route.path, {})[route.method] = route
        self._page: dict[str, PageFile] = read_page()
        self._reading: dict[asyncio.Task[Any], float] = {}
        self._sweeping = False
        self._openapi = b""
        self._in_flight = 0
        gateway.metrics.watch_requests("rest", lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        self._in_flight += 1
        try:
            response = await self._respond(request)
        except _ClientGone:
            self._gone(request)
            return
        except asyncio.CancelledError:
            self._gone(request)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return  # only the wait was cancelled, by a client that hung up
        except Exception as err:  # noqa: BLE001 - the edge: the traceback is for the log, not for the client
            response = self.translated(request, err)
        finally:
            self._in_flight -= 1
        headers = [
            *response.headers,
            (b"content-length", b"%d" % len(response.body)),
            (b"x-request-id", request.id.encode()),
        ]
        if self._gateway.draining:
            headers.append((b"connection", b"close"))
        cork = scope.get(CORK)
        if cork is not None:
            cork.hold()
        try:
            await send({"type": "http.response.start", "status": response.status, "headers": headers})
            await send({"type": "http.response.body", "body": response.body})
        finally:
            if cork is not None:
                cork.release()
        self._finished(request, response)

    # --- routing ---

    async def _respond(self, request: Request) -> Response:
        by_method = self._exact.get(request.path) or self._find_pattern(request)
        if by_method is None:
            raise NotFound("there is no such route; see /docs")
        method = "GET" if request.method == "HEAD" else request.method
        route = by_method.get(method)
        if route is None:
            request.route = next(iter(by_method.values()))
            allowed = ", ".join(sorted({*by_method, *(["HEAD"] if "GET" in by_method else [])}))
            raise MethodNotAllowed(f"this route takes {allowed}, not {request.method[:16]}", allowed)
        request.route = route
        if self._gateway.guard is not None and route.guarded:
            self._admit(request)
        if route.handler == "classify":
            return await self.classify(request)
        handler: Callable[[Request], Response | Awaitable[Response]] = getattr(self, route.handler)
        response = handler(request)
        return response if isinstance(response, Response) else await response

    def _admit(self, request: Request) -> None:
        """Whose key is it, and has the caller something left? Said before the body is read."""
        guard = self._gateway.guard
        assert guard is not None
        client = request.scope.get("client")
        caller = guard.admit(request.scope["headers"], client[0] if client else "")
        if caller:
            request.fields["caller"] = caller

    def _find_pattern(self, request: Request) -> dict[str, Route] | None:
        for pattern, routes in self._patterns.items():
            if found := pattern.fullmatch(request.path):
                request.path_fields = found.groupdict()
                return routes
        return None

    # --- handlers ---

    async def classify(self, request: Request) -> Response:
        """POST /classify."""
        gateway = self._gateway
        deadline = request.started + self._settings.timeout_s
        data = await self._body(request)
        declared = request.content_type
        if declared != b"application/octet-stream":
            data = _picture_in(data, declared)
        image_u8 = gateway.pictures.read_at_once(data)
        if image_u8 is None:
            image_u8 = await gateway.pictures.read(data)
        waiting = gateway.predictor.submit(image_u8, 1, deadline)
        request.scope[ON_DISCONNECT] = waiting.cancel
        answer = (await waiting)[0]
        return Response(200, [JSON], classify_body(answer, request.id), answer.model_version)

    async def read(self, request: Request) -> Response:
        """POST /read."""
        gateway = self._gateway
        data = _picture_in(await self._body(request), request.content_type)
        proposal = await gateway.pictures.read_number(data)
        images_u8 = proposal.images_u8.tobytes()
        answers = await self._predict(request, images_u8, len(proposal.images_u8), trial=True)
        _require_digits(answers[0])
        chosen = choose(proposal, np.array([answer.probabilities for answer in answers], np.float32))
        read = [answers[at] for at in chosen]
        version = answers[0].model_version
        confidences = np.array([answer.confidence for answer in read], np.float32)
        gateway.metrics.predictions(
            np.array([answer.digit for answer in read]),
            confidences,
            version,
            len(contract.DIGITS),
            sum(answer.unsure for answer in read),
        )
        digits = [
            {
                "digit": answer.digit,
                "confidence": answer.confidence,
                "probabilities": answer.probabilities,
                "box": proposal.boxes[at].tolist(),
                **({"unsure": True} if answer.unsure else {}),
            }
            for at, answer in zip(chosen, read, strict=True)
        ]
        body = {
            "number": "".join(str(answer.digit) for answer in read),
            "digits": digits,
            "model_version": version,
            "request_id": request.id,
        }
        return Response(200, [JSON], orjson.dumps(body), version)

    # TensorFlow Serving's API

    async def tensorflow_predict(self, request: Request) -> Response:
        """POST /v1/models/digits[/versions/N|/labels/L]:predict."""
        version = tensorflow_api.version_in(request.path_fields)
        body = await self._json_body(request)
        asked = tensorflow_api.read_predict(body, self._settings.max_request_images)
        answers = await self._predict(request, asked.images_u8, asked.images, version)
        return Response(200, [JSON], tensorflow_api.dump_predict(answers, asked.by_row), answers[0].model_version)

    async def tensorflow_status(self, request: Request) -> Response:
        """GET /v1/models/digits[/versions/N|/labels/L]."""
        version = tensorflow_api.version_in(request.path_fields)
        answer = await self._pass_on(request, GET_MODEL_STATUS, tensorflow_api.status_request(version), version)
        return Response(200, [JSON, _NO_STORE], tensorflow_api.dump_status(answer))

    async def tensorflow_metadata(self, request: Request) -> Response:
        """GET /v1/models/digits[/versions/N|/labels/L]/metadata."""
        version = tensorflow_api.version_in(request.path_fields)
        answer = await self._pass_on(request, GET_MODEL_METADATA, tensorflow_api.metadata_request(version), version)
        return Response(200, [JSON, _NO_STORE], tensorflow_api.dump_metadata(answer))

    def tensorflow_unknown(self, request: Request) -> Response:
        """What else is below /v1/models/: another model, a method that is not offered, or no path of the API."""
        found = _TENSORFLOW_PATH.fullmatch(request.path)
        if found is None or (request.method == "POST") != (found["call"] not in (None, "/metadata")):
            raise BadRequest(f"Malformed request: {request.method[:16]} {request.path[:128]}")
        fields = {name: found[name] for name in ("version", "label") if found[name] is not None}
        if found["model"] != contract.MODEL_NAME:
            raise tensorflow_api.unknown_model(found["model"], fields, status=found["call"] is None)
        raise Unimplemented("only :predict is offered; send the tensors of a Predict signature")

    # The open inference protocol

    def inference_server(self, _: Request) -> Response:
        """GET /v2."""
        return Response(200, [JSON], orjson.dumps(open_inference.server_metadata()))

    def inference_live(self, _: Request) -> Response:
        """GET /v2/health/live."""
        return Response(200, [JSON, _NO_STORE], b'{"live":true}')

    def inference_ready(self, _: Request) -> Response:
        """GET /v2/health/ready."""
        ready = not self._gateway.why_not_ready()
        return Response(200 if ready else 503, [JSON, _NO_STORE], orjson.dumps({"ready": ready}))

    def inference_model(self, request: Request) -> Response:
        """GET /v2/models/digits[/versions/N]."""
        available = self._gateway.upstream.availability.versions
        version = self._inference_version(request)
        versions = open_inference.available(version, available)
        body = open_inference.model_metadata(versions, self._gateway.upstream.classes(version).count)
        return Response(200, [JSON, _NO_STORE], orjson.dumps(body))

    def inference_model_ready(self, request: Request) -> Response:
        """GET /v2/models/digits[/versions/N]/ready."""
        version = self._inference_version(request)
        versions = self._gateway.upstream.availability.versions
        ready = not self._gateway.why_not_ready() and open_inference.is_ready(version, versions)
        body = orjson.dumps({"name": contract.MODEL_NAME, "ready": ready})
        return Response(200 if ready else 503, [JSON, _NO_STORE], body)

    async def inference_infer(self, request: Request) -> Response:
        """POST /v2/models/digits[/versions/N]/infer."""
        version = self._inference_version(request)
        body = await self._json_body(request)
        json_size = request.header(b"inference-header-content-length")
        asked = open_inference.read_body(body, json_size, self._settings.max_request_images)
        answers = await self._predict(request, asked.images_u8, asked.images, version)
        answer, json_bytes = open_inference.dump_body(asked, answers)
        if json_bytes is None:
            return Response(200, [JSON], answer, answers[0].model_version)
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", b"%d" % json_bytes),
        ]
        return Response(200, headers, answer, answers[0].model_version)

    def inference_unknown(self, request: Request) -> Response:
        """What else is below /v2: another model, or no path of the protocol."""
        parts = request.path.split("/")
        if len(parts) > 3 and parts[2] == "models":
            open_inference.version_in(parts[3], "")
        raise NotFound(f"the open inference protocol has no {request.method[:16]} {request.path[:128]} here")

    def _inference_version(self, request: Request) -> Version:
        return open_inference.version_in(contract.MODEL_NAME, request.path_fields.get("version", ""))

    # health and documents

    def healthz(self, _: Request) -> Response:
        """GET /healthz."""
        return Response(200, [JSON, _NO_STORE], b'{"status":"alive"}')

    def readyz(self, _: Request) -> Response:
        """GET /readyz."""
        reason = self._gateway.why_not_ready()
        body = orjson.dumps(
            {
                "ready": not reason,
                "model": contract.MODEL_NAME,
                "versions": self._gateway.upstream.availability.versions,
                "reason": reason,
            }
        )
        return Response(503 if reason else 200, [JSON, _NO_STORE], body)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: of all workers, whichever of them is asked."""
        control = self._gateway.control
        totals = None if control is None else await control.all_metrics()
        body, content_type = self._gateway.metrics.exposition(request.header(b"accept"), totals)
        return Response(200, [(b"content-type", content_type.encode()), _NO_STORE], body)

    def openapi(self, _: Request) -> Response:
        """GET /openapi.json."""
        self._openapi = self._openapi or orjson.dumps(openapi_document())
        return Response(200, [JSON], self._openapi)

    def docs(self, _: Request) -> Response:
        """GET /docs."""
        return Response(200, [_HTML, *PAGE_HEADERS], render_docs(openapi_document()).encode())

    def docs_css(self, _: Request) -> Response:
        """GET /docs.css."""
        return Response(200, [(b"content-type", b"text/css; charset=utf-8"), *PAGE_HEADERS], CSS.encode())

    def page(self, request: Request) -> Response:
        """GET /."""
        return self._file(request, "index.html")

    def static(self, request: Request) -> Response:
        """GET /static/…."""
        return self._file(request, request.path.removeprefix("/static/"))

    def _file(self, request: Request, name: str) -> Response:
        file = self._page.get(name)
        if file is None:
            raise NotFound("there is no such file")
        headers: Headers = [(b"etag", file.etag), (b"cache-control", b"no-cache"), *PAGE_HEADERS]
        if request.header(b"if-none-match").encode() == file.etag:
            return Response(304, headers, b"")
        return Response(200, [(b"content-type", file.content_type), *headers], file.body)

    # --- what handlers share ---

    async def _predict(
        self, request: Request, images_u8: bytes, count: int, version: Version = LATEST, *, trial: bool = False
    ) -> list[Answer]:
        """Answers for ``count`` images; a client that hangs up leaves its place."""
        deadline = request.started + self._settings.timeout_s
        waiting = self._gateway.predictor.submit(images_u8, count, deadline, version, trial=trial)
        request.scope[ON_DISCONNECT] = waiting.cancel
        return await waiting

    async def _pass_on(self, request: Request, path: str, message: bytes, version: Version) -> bytes:
        deadline = request.started + self._settings.timeout_s
        name_upstream(request.id)
        try:
            return await self._gateway.upstream.pass_on(path, message, version, deadline)
        except PassedOn as err:
            kind = _PASSED_ON.get(err.status)
            raise (kind(str(err)) if kind else err) from err

    # --- the body ---

    async def _json_body(self, request: Request) -> bytes:
        """The body of a protocol whose clients do not all declare JSON. Compressed ones are not read."""
        if request.header(b"content-encoding").lower() not in ("", "identity"):
            raise UnsupportedMediaType("expected a body without Content-Encoding: send it uncompressed")
        return await self._body(request)

    async def _body(self, request: Request) -> bytes:
        limit = self._settings.max_body_bytes
        length = request.content_length
        if length is not None and int(length) > limit:
            raise _too_large(limit)
        # One sweep over those that read costs less than a timer for each of thousands of requests a second.
        task = asyncio.current_task()
        assert task is not None
        self._reading[task] = request.started + self._settings.body_timeout_s
        if not self._sweeping:
            self._sweep()
        try:
            message = await request.receive()
            body: bytes = message.get("body", b"")
            if message["type"] == "http.request" and not message.get("more_body") and len(body) <= limit:
                return body
            return await _long_body(message, request.receive, limit)
        except asyncio.CancelledError:
            if task not in self._reading and task.uncancel() == 0:
                raise BodyTooSlow(f"the body did not arrive within {self._settings.body_timeout_s:g} s") from None
            raise
        finally:
            self._reading.pop(task, None)

    def _sweep(self) -> None:
        now = time.monotonic()
        for task in [task for task, deadline in self._reading.items() if deadline <= now]:
            del self._reading[task]
            task.cancel()
        self._sweeping = bool(self._reading)
        if self._sweeping:
            tick_s = min(0.5, self._settings.body_timeout_s / 4)
            asyncio.get_running_loop().call_later(tick_s, self._sweep)

    # --- the lean way ---

    def lean_began(self, request: LeanRequest) -> None:
        """``lean.py`` has begun to answer."""
        request.protocol.lean = request
        request.protocol.cycle = cast(Any, request)
        self._in_flight += 1

    def lean_ended(self, request: LeanRequest, status: int, model_version: str = "") -> None:
        """``lean.py`` has answered, or its client has gone."""
        self._in_flight -= 1
        self._finished(request, Response(status, [], b"", model_version))

    def translated(self, request: Request | LeanRequest, err: Exception) -> Response:
        """The answer to a request that failed."""
        if isinstance(err, DigitsError):
            request.fields["error"] = err.code
            return self._error(request, err)
        request.fields["error"] = "internal"
        self._gateway.log.error("defect", request_id=request.id, exc_info=err)
        return self._error_response(request, 500, "internal", "internal error", [])

    # --- endings ---

    def _error(self, request: Request | LeanRequest, err: DigitsError) -> Response:
        status = next((STATUS[kind] for kind in type(err).__mro__ if kind in STATUS), 500)
        if status == 500:
            self._gateway.log.error("defect", request_id=request.id, exc_info=err)
            return self._error_response(request, 500, "internal", "internal error", [])
        headers: Headers = []
        if isinstance(err, Overloaded | ModelUnavailable) and err.retry_after_s:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(err.retry_after_s))))
        elif isinstance(err, Unauthenticated):
            headers.append((b"www-authenticate", b'Bearer realm="digits"'))
        elif isinstance(err, MethodNotAllowed):
            headers.append((b"allow", err.allowed.encode()))
        return self._error_response(request, status, err.code, str(err), headers)

    def _error_response(
        self, request: Request | LeanRequest, status: int, code: str, message: str, headers: Headers
    ) -> Response:
        error: object = {"code": code, "message": message, "request_id": request.id}
        if request.route is not None and request.route.error_model is PassedThroughError:
            error = message
        # surrogateescape and the like never reach orjson: messages quote only what was decoded
        return Response(status, [JSON, _NO_STORE, NO_SNIFF, *headers], orjson.dumps({"error": error}))

    def _finished(self, request: Request | LeanRequest, response: Response) -> None:
        route = request.route.path if request.route else "unmatched"
        self._gateway.finished(
            "rest",
            route,
            str(response.status),
            request.started,
            request.id,
            failed=response.status >= 500,
            model_version=response.model_version,
            **request.fields,
        )

    def _gone(self, request: Request) -> None:
        self._finished(request, Response(499, [], b""))


_NO_STORE: Final = (b"cache-control", b"no-store")
_HTML: Final = (b"content-type", b"text/html; charset=utf-8")
_TENSORFLOW_PATH: Final = re.compile(
    r"/v1/models/(?P<model>[^/:]+)(?:/versions/(?P<version>[^/:]+)|/labels/(?P<label>[^/:]+))?"
    r"(?P<call>/metadata|:predict|:classify|:regress)?"
)
_UNDECLARED: Final = frozenset({b"", b"application/octet-stream", b"application/x-www-form-urlencoded"})
"""The bytes decide. The last is what curl declares when it is told nothing."""


def _pattern(path: str) -> re.Pattern[str]:
    """``/a/{name}:b`` → a pattern whose names stand for one part of a path, ``{rest}`` for all that is left."""
    parts = re.split(r"\{(\w+)\}", path)
    for at, part in enumerate(parts):
        kind = ".*" if part == "rest" else "[^/:]+"
        parts[at] = f"(?P<{part}>{kind})" if at % 2 else re.escape(part)
    return re.compile("".join(parts), re.DOTALL)


def _require_digits(answer: Answer) -> None:
    """Raises Unimplemented unless the classes of the model that gave this answer are the ten digits."""
    count = len(answer.probabilities)
    if answer.label or count != len(contract.DIGITS):
        example = f", such as {answer.label!r}" if answer.label else ""
        raise Unimplemented(
            f"a number is read with a model of the ten digits; the one that is served tells {count} classes "
            f"apart{example}: use /classify"
        )


async def _long_body(message: dict[str, Any], receive: Receive, limit: int) -> bytes:
    """The body in several messages, counted as it comes: never more than ``limit`` bytes and one message are held."""
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise _ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"a body may have {limit:,} bytes; send a smaller picture")


def _picture_in(body: bytes, content_type: bytes) -> bytes:
    """The picture's bytes in a body of this content type."""
    kind = content_type.partition(b";")[0].strip().lower()
    if kind.startswith(b"image/") or kind in _UNDECLARED:
        return body
    if kind == b"multipart/form-data":
        return _image_field(body, content_type)
    raise UnsupportedMediaType(
        "expected a picture (Content-Type image/png, image/jpeg, …), multipart/form-data with a field `image`, or 784 "
        "raw bytes as application/octet-stream"
    )


def _image_field(body: bytes, content_type: bytes) -> bytes:
    """The field ``image`` of a multipart body."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadRequest("the multipart content type names no boundary")
    form = _Form()
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as err:
        raise BadRequest("the multipart body is malformed") from err
    if not form.ended:
        raise BadRequest("the multipart body is cut off: its last boundary is missing")
    if len(form.images) != 1:
        raise BadRequest(f"expected one multipart field `image`, came {len(form.images)}")
    return form.images[0]


class _Form:
    """Gathers the parts named ``image`` while the parser runs."""

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self.ended = False
        self._header = b""
        self._value = b""
        self._name = b""
        self._data: list[bytes] = []

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._name, self._data = b"", []

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._name = parse_options_header(self._value)[1].get(b"name", b"")
        self._header = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == b"image":
            self._data.append(data[start:end])

    def _part_end(self) -> None:
        if self._name == b"image":
            self.images.append(b"".join(self._data))

    def _end(self) -> None:
        self.ended = True
