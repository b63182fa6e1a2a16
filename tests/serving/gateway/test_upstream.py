"""The model server's client: what is sent, what is believed, what failures become, and availability."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from digits.errors import BadImage, DigitsError, ModelUnavailable, Overloaded, UpstreamTimeout
from serving.gateway.upstream import BadAnswer, Predictions
from serving.protos import upstream_pb2 as pb
from tests.serving.gateway.conftest import Here, eventually, random_images
from tests.serving.gateway.upstream_server import expected_probabilities


def predict(here: Here, images: np.ndarray, timeout_s: float = 10) -> Predictions:
    deadline = time.monotonic() + timeout_s
    return here.thread.run(here.gateway.upstream.predict(images.tobytes(), len(images), deadline))


@pytest.mark.parametrize("as_content", [False, True], ids=["float_val", "tensor_content"])
def test_answers_are_read_in_both_of_tensorflows_forms(here: Here, as_content: bool) -> None:
    """A server may send float_val or tensor_content; the version is the response's own."""
    here.behaviour.as_content = as_content
    here.behaviour.version = 41
    images = random_images(300)
    found = predict(here, images)
    np.testing.assert_array_equal(found.probabilities, expected_probabilities(images))
    assert found.model_version == "41"


def _long_way(answer: pb.PredictResponse, values: list[float]) -> bytes:
    other = pb.PredictResponseOfFloats(model_spec=answer.model_spec)
    tensor = other.outputs["probabilities"]
    tensor.dtype = pb.DT_FLOAT
    tensor.tensor_shape.CopyFrom(answer.outputs["probabilities"].tensor_shape)
    tensor.float_val.extend(values)
    return other.SerializeToString()


def test_a_short_float_val_repeats_its_last_value(here: Here) -> None:
    """TensorFlow's shorthand: one value stands for a whole tensor."""
    here.behaviour.spoil = lambda answer: _long_way(answer, [0.5, 0.25])
    found = predict(here, random_images(2))
    assert found.probabilities[0].tolist() == [0.5] + [0.25] * 9
    assert found.probabilities[1].tolist() == [0.25] * 10


def _unpacked(answer: pb.PredictResponse) -> bytes:
    """float_val as twenty fields of their own, as protobuf's unpacked form has it."""
    tensor = answer.outputs["probabilities"]
    values = tensor.float_val
    tensor.float_val = b""
    body = tensor.SerializeToString()
    for at in range(0, len(values), 4):
        body += b"\x2d" + values[at : at + 4]  # field 5, wire type 5
    entry = b"\x0a\x0dprobabilities" + b"\x12" + _varint(len(body)) + body
    spec = answer.model_spec.SerializeToString()
    return b"\x0a" + _varint(len(entry)) + entry + b"\x12" + _varint(len(spec)) + spec


def _varint(value: int) -> bytes:
    return bytes([value & 127 | 128, value >> 7]) if value > 127 else bytes([value])


def test_unpacked_float_val_is_read(here: Here) -> None:
    """Protobuf asks every reader to take both forms of a repeated field."""
    here.behaviour.spoil = _unpacked
    images = random_images(2)
    np.testing.assert_array_equal(predict(here, images).probabilities, expected_probabilities(images))


def _set(**change: Any) -> Callable[[pb.PredictResponse], bytes]:
    def spoil(answer: pb.PredictResponse) -> bytes:
        tensor = answer.outputs["probabilities"]
        for name, value in change.items():
            if name == "rows":
                tensor.tensor_shape.dim[0].size = value
            else:
                setattr(tensor, name, value)
        return answer.SerializeToString()

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        _set(rows=3),
        _set(dtype=pb.DT_INT64),
        _set(float_val=b""),
        _set(float_val=b"\0\0\xc0\x7f" * 20),
        _set(float_val=b"\0\0\x80\x7f" * 20),
        _set(float_val=bytes(4 * 21)),
        lambda _: b"",
        lambda _: b"\xff\xff not protobuf",
    ],
    ids=["shape", "dtype", "no values", "NaN", "infinite", "too many values", "empty", "garbage"],
)
def test_an_answer_that_is_none_is_an_internal_error_and_never_a_digit(here: Here, spoil: Any) -> None:
    """Nothing unsound is passed on: the client gets 500 without details, the log gets them."""
    here.behaviour.spoil = spoil
    answer = here.classify(bytes(784))
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error"
    assert here.log_lines("defect")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, UpstreamTimeout),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.INVALID_ARGUMENT, BadImage),
        (grpc.StatusCode.UNAVAILABLE, ModelUnavailable),
        (grpc.StatusCode.NOT_FOUND, ModelUnavailable),
        (grpc.StatusCode.FAILED_PRECONDITION, ModelUnavailable),
        (grpc.StatusCode.INTERNAL, BadAnswer),
        (grpc.StatusCode.UNKNOWN, BadAnswer),
    ],
)
def test_upstream_failures_become_our_errors_without_the_upstreams_words(
    here: Here, code: grpc.StatusCode, kind: type[Exception]
) -> None:
    """The error table of the upstream; its own text is only in the chain, for the log."""
    here.behaviour.abort = (code, "secret inner workings")
    with pytest.raises(kind) as caught:
        predict(here, random_images(1))
    if isinstance(caught.value, DigitsError):
        assert "secret" not in str(caught.value)
    assert here.metric("digits_upstream_errors_total", code=code.name) >= 1


def test_only_unavailable_is_tried_again(here: Here) -> None:
    """A call that found no server is sent again, up to three times; any other failure is final."""
    here.behaviour.abort = (grpc.StatusCode.UNAVAILABLE, "")
    with pytest.raises(ModelUnavailable):
        predict(here, random_images(1))
    assert len(here.behaviour.batches) == 3
    here.behaviour.abort = (grpc.StatusCode.INTERNAL, "")
    with pytest.raises(BadAnswer):
        predict(here, random_images(1))
    assert len(here.behaviour.batches) == 4


def test_the_deadline_travels_upstream(here: Here) -> None:
    """A call is not waited for beyond the caller's deadline, and the server is told to stop."""

    async def hold() -> None:
        here.behaviour.hold = asyncio.Event()

    here.thread.run(hold())
    with pytest.raises(UpstreamTimeout):
        predict(here, random_images(1), timeout_s=0.1)
    eventually(lambda: here.behaviour.under_way == 0)


def test_readiness_follows_the_model_server(start: Callable[..., Here]) -> None:
    """Loading → not ready, with the states named; available → ready; gone → not ready; back → ready."""
    here = start()
    state = pb.ModelVersionStatus
    assert here.http.get("/readyz").json() == {"ready": True, "model": "digits", "versions": ["3"], "reason": ""}
    here.behaviour.state = state.LOADING
    eventually(lambda: here.http.get("/readyz").status_code == 503)
    assert "3 LOADING" in here.http.get("/readyz").json()["reason"]
    here.behaviour.state = state.AVAILABLE
    here.behaviour.version = 4
    here.wait_ready()
    assert here.http.get("/readyz").json()["versions"] == ["4"]
    assert here.metric("digits_upstream_ready") == 1
    here.thread.run(here.upstream.stop())
    eventually(lambda: here.http.get("/readyz").status_code == 503)
    assert "cannot be reached" in here.http.get("/readyz").json()["reason"]
    assert here.http.get("/healthz").status_code == 200
    assert here.metric("digits_upstream_ready") == 0
    here.thread.run(here.upstream.start())
    here.wait_ready()


def test_a_killed_model_server_is_a_clean_503_and_service_is_back_when_it_is(start: Callable[..., Here]) -> None:
    """No hang and no wrong answer while it is away; its return needs no restart of the gateway."""
    here = start()
    assert here.classify(bytes(784)).status_code == 200
    here.thread.run(here.upstream.stop())
    answer = here.classify(bytes(784))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
    here.thread.run(here.upstream.start())
    eventually(lambda: here.classify(bytes(784)).status_code == 200)


def test_a_gateway_started_before_its_model_server_becomes_ready_later(start: Callable[..., Here]) -> None:
    """Start order does not matter."""
    here = start(ready=False)
    here.thread.run(here.upstream.stop())
    eventually(lambda: here.http.get("/readyz").status_code == 503)
    assert here.classify(bytes(784)).status_code == 503
    here.thread.run(here.upstream.start())
    here.wait_ready()
    assert here.classify(bytes(784)).status_code == 200
