"""``POST /classify`` without what ASGI costs: no task, no scope, no messages for a request that came whole.

Only the common case: a picture that is decoded at once, on a connection with nothing else under way. Everything else,
and every request with a header that some feature may want to look at, goes through ``rest.py``, which answers the same.
"""

import math
import time
from typing import TYPE_CHECKING, Final

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving.gateway.app import request_id_from
from serving.gateway.predictor import Answer, Place
from serving.gateway.schema import ROUTES
from serving.gateway.upstream import LATEST

if TYPE_CHECKING:
    from serving.gateway.rest import Headers, RestApp
    from serving.gateway.server import _Protocol

PATH: Final = b"/classify"

MAX_BODY_BYTES: Final = 16 * 1024
"""Larger pictures take a thread, beside which ASGI costs little."""

_ROUTE: Final = next(route for route in ROUTES if route.handler == "classify")
_OK: Final = STATUS_LINE[200]
_JSON_LINE: Final = b"content-type: application/json\r\n"
_CLOSE_LINE: Final = b"connection: close\r\n"
_NO_CHANGE: Final = frozenset(
    {b"accept", b"accept-encoding", b"accept-language", b"connection", b"content-length", b"host", b"user-agent"}
)
"""Headers that mean nothing to /classify beyond what the parser made of them."""

_BARE_TYPES: Final = (b"application/octet-stream", b"image/", b"application/x-www-form-urlencoded")
"""Bodies that are the picture itself, as in ``rest.py``."""


class LeanRequest(Place):
    """One request: to the predictor a place, to uvicorn a cycle, to ``RestApp`` a request."""

    __slots__ = ("app", "fields", "id", "keep_alive", "protocol", "response_complete", "started")

    route = _ROUTE

    def __init__(self, app: "RestApp", protocol: "_Protocol", sent_id: str | None) -> None:
        self.started = time.monotonic()
        super().__init__(b"", 1, self.started + app.gateway.settings.timeout_s, LATEST)
        self.app = app
        self.protocol = protocol
        self.id = request_id_from(sent_id)
        self.fields: dict[str, object] = {}
        self.keep_alive = True
        self.response_complete = False

    def answered(self, answers: list[Answer]) -> None:
        """Write the answer."""
        self._write(_OK, _JSON_LINE, classify_body(answers[0], self.id))
        self.app.lean_ended(self, 200, answers[0].model_version)

    def refused(self, err: Exception) -> None:
        """Write what went wrong."""
        response = self.app.translated(self, err)
        lines = b"".join([b"%b: %b\r\n" % header for header in response.headers])
        self._write(STATUS_LINE[response.status], lines, response.body)
        self.app.lean_ended(self, response.status)

    def left(self) -> None:
        """The client has hung up."""
        self.response_complete = True
        self.app.gateway.predictor.leave(self)
        self.app.lean_ended(self, 499)

    def _write(self, status_line: bytes, lines: bytes, body: bytes) -> None:
        protocol = self.protocol
        self.response_complete = True
        stays = self.keep_alive and not self.app.gateway.draining
        protocol.transport.write(
            b"%b%b%bcontent-length: %d\r\nx-request-id: %b\r\n%b\r\n%b"
            % (
                status_line,
                protocol.default_lines(),
                lines,
                len(body),
                self.id.encode(),
                b"" if stays else _CLOSE_LINE,
                body,
            )
        )
        protocol.lean_complete(stays)


def start(app: "RestApp", protocol: "_Protocol", headers: "Headers", body: bytes) -> bool:
    """Begin to answer; False if this request is for ASGI, and then nothing has happened."""
    sent_id = None
    for name, value in headers:
        if name == b"content-type":
            if not value.startswith(_BARE_TYPES):
                return False
        elif name == b"x-request-id":
            sent_id = value.decode("latin-1")
        elif name not in _NO_CHANGE:
            return False
    request: LeanRequest | None = None
    try:
        app.gateway.predictor.check_room(math.inf)
        image_u8 = app.gateway.pictures.read_at_once(body)
        if image_u8 is None:
            return False
        request = LeanRequest(app, protocol, sent_id)
        request.images_u8 = image_u8
        app.lean_began(request)
        app.gateway.predictor.enter(request)
    except Exception as err:  # noqa: BLE001 - the edge: every exception is translated once
        if request is None:
            request = LeanRequest(app, protocol, sent_id)
            app.lean_began(request)
        request.refused(err)
    return True


def classify_body(answer: Answer, request_id: str) -> bytes:
    """The JSON that /classify answers."""
    body = {
        "digit": answer.digit,
        "confidence": answer.confidence,
        "probabilities": answer.probabilities,
        "model_version": answer.model_version,
        "request_id": request_id,
    }
    if answer.label:
        body["label"] = answer.label
    if answer.unsure:
        body["unsure"] = True
    return orjson.dumps(body)
