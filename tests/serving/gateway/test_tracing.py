"""W3C trace context: taken up, carried to the model server, found in the log."""

from typing import Any

import pytest

from serving.protos import digits_pb2 as pb
from tests.serving.gateway.conftest import Here
from tests.serving.gateway.test_label import _tensor
from tests.serving.gateway.test_tensorflow_api import PREDICT

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def sent(here: Here) -> dict[str, Any]:
    return here.upstream.last_metadata


def test_a_trace_goes_on_to_the_model_server_as_a_child(here: Here) -> None:
    """The same trace id and flags, another span; the request's id goes along; the log line holds the trace id."""
    headers = {"traceparent": PARENT, "x-request-id": "mine", "content-type": "application/octet-stream"}
    assert here.http.post("/classify", content=bytes(784), headers=headers).status_code == 200
    version, trace, span, flags = sent(here)["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != SPAN
    assert sent(here)["x-request-id"] == "mine"
    assert here.log_lines()[-1]["trace_id"] == TRACE


def test_over_grpc_too_passed_on_or_read(here: Here) -> None:
    """Metadata is gRPC's way to say it."""
    here.stub.Classify(pb.ClassifyRequest(image=bytes(784)), metadata=(("traceparent", PARENT),))
    assert TRACE in sent(here)["traceparent"]
    here.channel.unary_unary(PREDICT)(_tensor().SerializeToString(), metadata=(("traceparent", PARENT),))
    assert TRACE in sent(here)["traceparent"]
    lines = [line for line in here.log_lines() if line["protocol"] == "grpc"]
    assert [line["trace_id"] for line in lines] == [TRACE, TRACE]


def test_a_request_without_a_trace_has_none_of_another(here: Here) -> None:
    """One after the other, on the same connections."""
    here.http.post("/classify", content=bytes(784), headers={"traceparent": PARENT})
    assert "traceparent" in sent(here)
    here.http.post("/classify", content=bytes(784))
    assert "traceparent" not in sent(here)
    here.stub.Classify(pb.ClassifyRequest(image=bytes(784)), metadata=(("traceparent", PARENT),))
    here.stub.Classify(pb.ClassifyRequest(image=bytes(784)))
    assert "traceparent" not in sent(here)
    assert "trace_id" not in here.log_lines()[-1]


def test_a_call_that_is_passed_on_carries_its_request_id(here: Here) -> None:
    """The model server's own log can then be searched for it."""
    here.channel.unary_unary(PREDICT)(_tensor().SerializeToString(), metadata=(("x-request-id", "mine"),))
    assert sent(here)["x-request-id"] == "mine"
    assert "traceparent" not in sent(here)


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (f"01-{TRACE}-{SPAN}-01-more", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        ("00-4bf9-00f0-01", False),
        ("", False),
        ("\xff" * 200, False),
    ],
)
def test_only_what_the_standard_allows_is_taken(here: Here, value: str, taken: bool) -> None:
    """Anything else is as if it were not there: the request itself is answered."""
    answer = here.http.post("/classify", content=bytes(784), headers={"traceparent": value.encode("latin-1")})
    assert answer.status_code == 200
    assert ("traceparent" in sent(here)) == taken
