"""Errors that people cause or can mend. No HTTP and no gRPC in here: each adapter owns one table from these classes.

A message says what was expected, what came and what to do. Anything that is not a ``DigitsError`` is a defect: the edge
logs its traceback and answers "internal error".
"""

from typing import ClassVar


class DigitsError(Exception):
    """Base of all expected errors. ``code`` is the stable, machine-readable name that clients match on."""

    code: ClassVar[str] = "error"


class BadRequest(DigitsError):
    """The request itself is malformed."""

    code = "bad_request"


class BadImage(DigitsError):
    """The bytes are not a picture, or not one in which a digit can be read."""

    code = "bad_image"


class TooLarge(DigitsError):
    """A body, picture or batch is over its limit."""

    code = "too_large"


class UnsupportedMediaType(DigitsError):
    """The declared content type is not one that is read here."""

    code = "unsupported_media_type"


class Unauthenticated(DigitsError):
    """No valid key came with the request."""

    code = "unauthenticated"


class PermissionDenied(DigitsError):
    """The key is known but not allowed to do this."""

    code = "permission_denied"


class NotFound(DigitsError):
    """There is no such route, model or version."""

    code = "not_found"


class Overloaded(DigitsError):
    """There is more work waiting than can be done in time. ``retry_after_s`` says when to come back."""

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelUnavailable(DigitsError):
    """The model server cannot be reached or has no version loaded. ``retry_after_s``: when to come back, if known."""

    code = "model_unavailable"

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UpstreamTimeout(DigitsError):
    """The model server did not answer before the caller's deadline."""

    code = "deadline_exceeded"


class Unimplemented(DigitsError):
    """The operation is known but not offered here."""

    code = "unimplemented"
