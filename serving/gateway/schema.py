"""The REST API described: what each route takes and answers, and the OpenAPI document made from that."""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from serving.gateway import examples
from serving.gateway.metrics import VERSION


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class ClassifyAnswer(_Model):
    """One digit that was read, or for a model of other classes one of those."""

    digit: Annotated[int, Field(ge=0)]
    """0 to 9: the most probable digit. For a model of other classes, the number of the most probable one."""
    confidence: Annotated[float, Field(ge=0, le=1)]
    """Its probability."""
    probabilities: Annotated[list[float], Field(min_length=2)]
    """One for each class, ten for the digits 0 to 9; they sum to 1."""
    model_version: str
    """The version of the model that answered."""
    request_id: str
    """Also in the header ``x-request-id``."""
    label: str = ""
    """What that class is called. Absent where classes are digits."""
    unsure: bool = False
    """True where the answer had better not be used: the model is less certain of it than its threshold. Else absent."""


class NumberDigit(_Model):
    """One digit of a number."""

    digit: Annotated[int, Field(ge=0, le=9)]
    """The most probable digit."""
    confidence: Annotated[float, Field(ge=0, le=1)]
    """Its probability."""
    probabilities: Annotated[list[float], Field(min_length=10, max_length=10)]
    """Of the digits 0 to 9; they sum to 1."""
    box: Annotated[list[int], Field(min_length=4, max_length=4)]
    """Where it is: x, y, width and height in the picture's pixels, the picture upright."""
    unsure: bool = False
    """True where the model is less certain of it than its threshold. Else absent."""


class ReadAnswer(_Model):
    """A number that was read."""

    number: str
    """Its digits, left to right; leading zeros are kept."""
    digits: list[NumberDigit]
    """Each of them, left to right."""
    model_version: str
    """The version of the model that answered."""
    request_id: str
    """Also in the header ``x-request-id``."""


class ErrorDetail(_Model):
    """What went wrong."""

    code: str
    """Stable and made for machines."""
    message: str
    """For people: what was expected, what came, what to do. It may change."""
    request_id: str
    """To be quoted when asking about it."""


class ErrorAnswer(_Model):
    """Every error of the gateway's own endpoints."""

    error: ErrorDetail


class PassedThroughError(_Model):
    """An error of the endpoints that speak TensorFlow Serving's or the open inference protocol."""

    error: str


class Health(_Model):
    """The process is alive."""

    status: str


class Readiness(_Model):
    """Whether digits can be read now."""

    ready: bool
    model: str
    versions: list[str]
    """Versions that the model server has available."""
    reason: str
    """Why not, when not ready."""


class VersionState(_Model):
    """The last thing that went wrong with a version."""

    error_code: str
    error_message: str


class VersionStatus(_Model):
    """One version of the model."""

    version: str
    state: str
    """START, LOADING, AVAILABLE, UNLOADING or END."""
    status: VersionState


class StatusAnswer(_Model):
    """TensorFlow Serving's model status."""

    model_version_status: list[VersionStatus]


class ModelSpec(_Model):
    """What was described."""

    name: str
    signature_name: str
    version: str


class MetadataAnswer(_Model):
    """TensorFlow Serving's model metadata."""

    model_spec: ModelSpec
    metadata: dict[str, Any]
    """``signature_def``: the signatures with their inputs and outputs."""


class Prediction(_Model):
    """One image's answer."""

    probabilities: Annotated[list[float], Field(min_length=2)]
    digit: Annotated[int, Field(ge=0)]


class Columns(_Model):
    """All images' answers, a list a tensor."""

    probabilities: list[Annotated[list[float], Field(min_length=2)]]
    digit: list[Annotated[int, Field(ge=0)]]


class PredictAnswer(_Model):
    """TensorFlow Serving's answer: ``predictions`` to ``instances``, ``outputs`` to ``inputs``."""

    predictions: list[Prediction] | None = None
    outputs: Columns | None = None


class ServerMetadata(_Model):
    """The open inference protocol's server metadata."""

    name: str
    version: str
    extensions: list[str]


class Live(_Model):
    """The process answers."""

    live: bool


class Ready(_Model):
    """Whether inference requests can be answered now."""

    ready: bool


class ModelReady(_Model):
    """Whether the model (and version) can answer now."""

    name: str
    ready: bool


class TensorMetadata(_Model):
    """A tensor: its shape has -1 for a size that varies."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Model):
    """The open inference protocol's model metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class OutputTensor(_Model):
    """One output: ``probabilities`` FP32 [N, C] for C classes or ``digit`` INT64 [N]."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float] | list[int] | None = None
    """Row by row. Absent when the values follow the JSON as bytes."""
    parameters: dict[str, Any] | None = None


class InferAnswer(_Model):
    """The open inference protocol's answer."""

    model_name: str
    model_version: str
    id: str | None = None
    """As it was sent."""
    outputs: list[OutputTensor]


PICTURE_TYPES: Final = ("image/png", "image/jpeg", "image/gif", "image/bmp", "image/webp", "image/tiff")

_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}

CLASSIFY_BODY: Final[dict[str, Any]] = {
    "required": True,
    "description": (
        "A picture of one digit, of any size and polarity, as the body or as the multipart field `image`; or, as "
        "`application/octet-stream`, exactly 784 bytes: 28 x 28, row by row, ink 255 on paper 0."
    ),
    "content": {
        **dict.fromkeys(PICTURE_TYPES, _BINARY),
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "string", "format": "binary"}},
            }
        },
    },
}

_ROW: Final = {
    "type": "array",
    "minItems": 28,
    "maxItems": 28,
    "items": {"type": "integer", "minimum": 0, "maximum": 255},
}
_IMAGE: Final = {"type": "array", "minItems": 28, "maxItems": 28, "items": _ROW}
_NAMED_IMAGE: Final = {"type": "object", "required": ["images"], "properties": {"images": _IMAGE}}
_IMAGES: Final = {"type": "array", "minItems": 1, "items": _IMAGE}
_SIGNATURE_NAME: Final = {"type": "string", "enum": ["", "serving_default"]}

PREDICT_BODY: Final[dict[str, Any]] = {
    "required": True,
    "description": (
        "Canonical images: 28 rows of 28 whole numbers, ink 255 on paper 0. As `instances`, one element an image, bare "
        'or as `{"images": …}`; or as `inputs`, all in one list, bare or as `{"images": …}`.'
    ),
    "content": {
        "application/json": {
            "schema": {
                "oneOf": [
                    {
                        "type": "object",
                        "required": ["instances"],
                        "properties": {
                            "signature_name": _SIGNATURE_NAME,
                            "instances": {
                                "oneOf": [_IMAGES, {"type": "array", "minItems": 1, "items": _NAMED_IMAGE}],
                            },
                        },
                    },
                    {
                        "type": "object",
                        "required": ["inputs"],
                        "properties": {
                            "signature_name": _SIGNATURE_NAME,
                            "inputs": {
                                "oneOf": [
                                    _IMAGES,
                                    {"type": "object", "required": ["images"], "properties": {"images": _IMAGES}},
                                ]
                            },
                        },
                    },
                ]
            }
        }
    },
}

_PARAMETERS: Final = {"type": "object"}
_INFER_REQUEST: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "inputs": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"const": "images"},
                    "datatype": {"const": "UINT8"},
                    "shape": {
                        "type": "array",
                        "prefixItems": [{"type": "integer", "minimum": 1}, {"const": 28}, {"const": 28}],
                        "minItems": 3,
                        "maxItems": 3,
                    },
                    "data": {"description": "Pixels 0 to 255, flat or nested as the shape is.", "type": "array"},
                    "parameters": _PARAMETERS,
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"enum": ["probabilities", "digit"]}, "parameters": _PARAMETERS},
            },
        },
    },
}

INFER_BODY: Final[dict[str, Any]] = {
    "required": True,
    "description": (
        "Canonical images (ink 255 on paper 0) as the tensor `images` UINT8 [N, 28, 28]. With the header "
        "`Inference-Header-Content-Length` the pixels may follow the JSON as bytes (binary tensor data extension)."
    ),
    "content": {
        "application/json": {"schema": _INFER_REQUEST},
        "application/octet-stream": _BINARY,
    },
}

READ_BODY: Final[dict[str, Any]] = {
    **CLASSIFY_BODY,
    "description": (
        "A picture of one number on one line, of any size and polarity, as the body or as the multipart field `image`. "
        "Digits may touch; the more they overlap, the more often one is missed."
    ),
}

ERROR_TEXTS: Final = {
    400: "The request is malformed, or holds no picture in which a digit can be read.",
    401: "API keys are in use here, and none that is known came with the request.",
    404: "There is no such thing.",
    405: "The route does not know this method; `Allow` says which it does.",
    408: "The body did not arrive in time.",
    413: "The body or the picture is too large.",
    415: "The content type is not one that is read here.",
    429: "Too much work is waiting; `Retry-After` says when to come back.",
    500: "Internal error.",
    501: "Known, but not offered here, or not for the model that is served.",
    503: "No model is being served; `Retry-After`, where it is known, says when to come back.",
    504: "The model did not answer in time.",
}


class Route:
    """One route: what it is called, what it takes and what it answers.

    Args:
        method: HTTP method. GET answers HEAD too.
        path: Exact path, or a pattern whose last part is ``{rest}`` and stands for everything below.
        handler: Name of the method that answers.
        summary: One line.
        answer: Model of the 200 answer, or a content type where it is not JSON.
        errors: Statuses of the errors it may answer besides 405 and 500.
        body: The OpenAPI request body.
        error_model: Shape of the errors.
        listed: Whether it is in the OpenAPI document.
        guarded: Whether it needs an API key, where keys are in use, and counts against the caller's rate.
    """

    def __init__(
        self,
        method: str,
        path: str,
        handler: str,
        summary: str,
        answer: type[_Model] | str,
        *,
        errors: Iterable[int] = (),
        body: dict[str, Any] | None = None,
        error_model: type[_Model] = ErrorAnswer,
        listed: bool = True,
        guarded: bool = True,
    ) -> None:
        self.method = method
        self.path = path
        self.handler = handler
        self.summary = summary
        self.answer = answer
        self.errors = tuple(errors)
        self.body = body
        self.error_model = error_model
        self.listed = listed
        self.guarded = guarded


def _tensorflow_routes() -> Iterator[Route]:
    model = "/v1/models/digits"
    for version in ("", "/versions/{version}", "/labels/{label}"):
        of = f" of {version.strip('/').replace('/', ' ').replace('s ', ' ')}" if version else ""
        yield Route(
            "POST",
            f"{model}{version}:predict",
            "tensorflow_predict",
            f"TensorFlow Serving: read images{of}",
            PredictAnswer,
            errors=(400, 404, 408, 413, 415, 429, 503, 504),
            body=PREDICT_BODY,
            error_model=PassedThroughError,
        )
        yield Route(
            "GET",
            f"{model}{version}",
            "tensorflow_status",
            f"TensorFlow Serving: state{of}",
            StatusAnswer,
            errors=(400, 404, 429, 503, 504),
            error_model=PassedThroughError,
        )
        yield Route(
            "GET",
            f"{model}{version}/metadata",
            "tensorflow_metadata",
            f"TensorFlow Serving: signatures{of}",
            MetadataAnswer,
            errors=(400, 404, 429, 503, 504),
            error_model=PassedThroughError,
        )
    for method in ("GET", "POST"):
        yield Route(
            method,
            "/v1/{rest}",
            "tensorflow_unknown",
            "",
            "application/json",
            errors=(400, 404, 501),
            listed=False,
            error_model=PassedThroughError,
        )


def _inference_routes() -> Iterator[Route]:
    def get(path: str, handler: str, summary: str, answer: type[_Model], *errors: int) -> Route:
        summary = f"Open inference protocol: {summary}"
        guarded = not path.startswith("/v2/health/")
        return Route(
            "GET", path, handler, summary, answer, errors=errors, error_model=PassedThroughError, guarded=guarded
        )

    yield get("/v2", "inference_server", "the server", ServerMetadata)
    yield get("/v2/health/live", "inference_live", "is the process alive?", Live)
    yield get("/v2/health/ready", "inference_ready", "can images be read now?", Ready, 503)
    for version in ("", "/versions/{version}"):
        path = f"/v2/models/digits{version}"
        of = "version {version} of the model" if version else "the model"
        missing = (404,) if version else ()
        yield get(path, "inference_model", of, ModelMetadata, *missing)
        yield get(f"{path}/ready", "inference_model_ready", f"can {of} answer now?", ModelReady, *missing, 503)
        yield Route(
            "POST",
            f"{path}/infer",
            "inference_infer",
            f"Open inference protocol: read images with {of}",
            InferAnswer,
            errors=(400, 404, 408, 413, 415, 429, 503, 504),
            body=INFER_BODY,
            error_model=PassedThroughError,
        )
    for method in ("GET", "POST"):
        yield Route(
            method,
            "/v2/{rest}",
            "inference_unknown",
            "",
            "application/json",
            errors=(404,),
            error_model=PassedThroughError,
            listed=False,
        )


ROUTES: Final = (
    Route(
        "POST", "/classify", "classify", "Read one digit", ClassifyAnswer,
        errors=(400, 408, 413, 415, 429, 503, 504), body=CLASSIFY_BODY,
    ),
    Route(
        "POST", "/read", "read", "Read a whole number", ReadAnswer,
        errors=(400, 408, 413, 415, 429, 501, 503, 504), body=READ_BODY,
    ),
    Route("GET", "/healthz", "healthz", "Is the process alive?", Health, guarded=False),
    Route("GET", "/readyz", "readyz", "Can digits be read now?", Readiness, errors=(503,), guarded=False),
    Route("GET", "/metrics", "metrics", "Metrics for Prometheus", "text/plain", guarded=False),
    Route("GET", "/openapi.json", "openapi", "This document", "application/json", guarded=False),
    Route("GET", "/docs", "docs", "This API for people", "text/html", guarded=False),
    Route("GET", "/docs.css", "docs_css", "The look of /docs", "text/css", listed=False, guarded=False),
    Route("GET", "/", "page", "The drawing page", "text/html", errors=(404,), guarded=False),
    Route("GET", "/static/{rest}", "static", "What the drawing page is made of", "application/octet-stream",
          errors=(404,), listed=False, guarded=False),
    *_tensorflow_routes(),
    *_inference_routes(),
)  # fmt: skip


_IN_PATH: Final = {"version": "A version's number.", "label": "A label of a version, such as `stable`."}


def openapi_document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of the routes above."""
    models = {route.answer for route in ROUTES if not isinstance(route.answer, str)}
    models |= {route.error_model for route in ROUTES}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "serialization") for model in ordered], ref_template="#/components/schemas/{model}"
    )
    schemas = definitions["$defs"]
    for name, example in examples.ANSWERS.items():
        schemas[name]["examples"] = [example]
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        if route.listed:
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Digits",
            "version": VERSION,
            "summary": "Reads handwritten digits.",
            "description": "Every answer carries `x-request-id`; send one of your own to have it used.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "Where API keys are in use."},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "200": {"description": "OK", "content": _content(route.answer), "headers": _REQUEST_ID}
    }
    for status in (*route.errors, *((401, 429) if route.guarded else ()), 500):
        model: type[_Model] = route.error_model
        if status == 503 and isinstance(route.answer, type) and "ready" in route.answer.model_fields:
            model = route.answer
        headers = dict(_REQUEST_ID)
        if status in (429, 503):
            headers["retry-after"] = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
        responses[str(status)] = {"description": ERROR_TEXTS[status], "content": _content(model), "headers": headers}
    operation: dict[str, Any] = {
        "operationId": route.method.lower() + re.sub(r"\W+", "_", route.path).rstrip("_"),
        "summary": route.summary,
        "responses": responses,
        "x-codeSamples": [{"lang": "sh", "source": examples.command(route.method, route.path)}],
    }
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": _IN_PATH[name], "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    if route.method == "POST":
        parameters.append(
            {
                "name": "x-request-id",
                "in": "header",
                "required": False,
                "description": "Used as the request's id if it is sane, else replaced.",
                "schema": {"type": "string", "maxLength": 128},
            }
        )
    if route.guarded:
        operation["security"] = [{}, {"bearer": []}, {"key": []}]
    if parameters:
        operation["parameters"] = parameters
    if route.body:
        operation["requestBody"] = route.body
    return operation


_REQUEST_ID: Final[dict[str, Any]] = {
    "x-request-id": {"description": "The request's id.", "schema": {"type": "string"}}
}


def _content(answer: type[_Model] | str) -> dict[str, Any]:
    if isinstance(answer, str):
        return {answer: {"schema": {} if answer == "application/json" else {"type": "string"}}}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{answer.__name__}"}}}
