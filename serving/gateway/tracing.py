"""W3C trace context (https://www.w3.org/TR/trace-context/): taken up from a request, carried on to the model server.

No spans are recorded here: whoever traces sees the gateway's call as a child of its own, and finds the request's log
line by the trace's id.
"""

import random
import re
from contextvars import ContextVar
from typing import Final

Metadata = tuple[tuple[str, str], ...]

METADATA: Final[ContextVar[Metadata]] = ContextVar("metadata", default=())
"""What goes upstream with the calls that the running task makes."""

_TRACEPARENT: Final = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-(?P<flags>[0-9a-f]{2})"
    r"(?P<more>-.*)?"
)


def take_up(traceparent: str | bytes, request_id: str) -> str:
    """Have the running task's calls go upstream under this trace. Returns the trace's id; empty if there is none."""
    text = traceparent.decode("latin-1") if isinstance(traceparent, bytes) else traceparent
    found = _TRACEPARENT.fullmatch(text.strip())
    if found is None or (found["version"] == "00" and found["more"]):
        return ""
    span = f"{random.getrandbits(64) or 1:016x}"
    METADATA.set((("traceparent", f"00-{found['trace']}-{span}-{found['flags']}"), ("x-request-id", request_id)))
    return found["trace"]


def name_upstream(request_id: str) -> None:
    """Have the call that the running task passes on carry its request's id, trace or not.

    Calls that go upstream together do so only with a trace: there is no one request to name.
    """
    if not METADATA.get():
        METADATA.set((("x-request-id", request_id),))
