"""Errors of the serving API: a canonical status code (the numbers of gRPC and of TensorFlow's Status) and a message."""

from enum import IntEnum
from typing import ClassVar

from digits.errors import DigitsError


class Code(IntEnum):
    """Canonical status codes, as in ``google.rpc.Code`` and ``tensorflow.error.Code``."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ServingError(DigitsError):
    """A request, or the loading of a version, ended with this status. Clients match on its code and wording."""

    code: ClassVar[str] = "serving_error"

    def __init__(self, status: Code, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class UsageError(DigitsError):
    """The command line asks for something that cannot be done; the message is one line."""

    code: ClassVar[str] = "usage"


def invalid_argument(message: str) -> ServingError:
    """The commonest status of all."""
    return ServingError(Code.INVALID_ARGUMENT, message)
