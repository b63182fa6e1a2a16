"""gRPC: what is read, every error row, streams, health, reflection."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from digits.image import read_digit
from serving.gateway.rpc import CODES
from serving.protos import digits_pb2 as pb
from serving.protos import upstream_pb2
from tests.serving.gateway.conftest import Here, eventually, random_images
from tests.serving.gateway.pictures import animated_gif, bomb_png, png, stroke, truncated_png
from tests.serving.gateway.upstream_server import expected_probabilities


def check_digit(answer: pb.ClassifyResponse, image_u8: np.ndarray) -> None:
    expected = expected_probabilities(image_u8.reshape(1, 784))[0]
    assert answer.digit == int(image_u8.ravel()[0]) % 10
    np.testing.assert_array_equal(np.float32(answer.probabilities), expected)
    assert np.float32(answer.confidence) == expected.max()
    assert answer.model_version == "3"


def refused(here: Here, image: bytes, **more: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        here.stub.Classify(pb.ClassifyRequest(image=image), timeout=20, **more)
    return caught.value


def test_raw_bytes_and_pictures_are_read(here: Here) -> None:
    """784 bytes are a canonical image, anything that begins like a picture is one."""
    for image in random_images(20):
        check_digit(here.stub.Classify(pb.ClassifyRequest(image=image.tobytes())), image)
    check_digit(here.stub.Classify(pb.ClassifyRequest(image=png(stroke()))), stroke())
    large = png(255 - stroke(900))
    check_digit(here.stub.Classify(pb.ClassifyRequest(image=large)), read_digit(large))


@pytest.mark.parametrize(
    ("image", "name"),
    [
        pytest.param(b"", "bad_image", id="empty"),
        pytest.param(b"hello", "bad_image", id="text"),
        pytest.param(b"x" * 783, "bad_image", id="a byte too few"),
        pytest.param(truncated_png(), "bad_image", id="truncated PNG"),
        pytest.param(animated_gif(), "bad_image", id="animated GIF"),
        pytest.param(bomb_png(), "too_large", id="bomb"),
        pytest.param(png(np.full((100, 100), 255, np.uint8)), "bad_image", id="blank"),
    ],
)
def test_a_bad_picture_is_an_invalid_argument_before_the_model_is_called(here: Here, image: bytes, name: str) -> None:
    """Code, stable name and request id; the model server sees nothing of it."""
    err = refused(here, image, metadata=(("x-request-id", "mine"),))
    assert err.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailers = dict(err.trailing_metadata())
    assert (trailers["x-error-code"], trailers["x-request-id"]) == (name, "mine")
    assert here.behaviour.batches == []


def test_bytes_that_are_no_message_are_an_invalid_argument(here: Here) -> None:
    """Not an unknown error with Python's text."""
    call = here.channel.unary_unary("/digits.v1.Digits/Classify")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "the message is not a digits.v1.ClassifyRequest"


def test_a_message_over_the_limit_is_refused(start: Callable[..., Here]) -> None:
    """By the gRPC library, before it is held."""
    here = start(max_body_bytes=100_000)
    assert refused(here, bytes(200_000)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("upstream", "code", "name"),
    [
        (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, "model_unavailable"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded"),
        (grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL, "internal"),
    ],
)
def test_upstream_failures_have_their_codes(
    here: Here, upstream: grpc.StatusCode, code: grpc.StatusCode, name: str
) -> None:
    """And never the upstream's own words."""
    here.behaviour.abort = (upstream, "secret inner workings")
    err = refused(here, bytes(784))
    assert (err.code(), dict(err.trailing_metadata())["x-error-code"]) == (code, name)
    assert "secret" not in err.details()


def test_every_expected_error_has_a_code() -> None:
    """A new class in digits.errors needs a row."""
    from digits import errors

    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DigitsError)}
    assert kinds - {errors.DigitsError} <= set(CODES)


def test_overload_says_when_to_come_back(start: Callable[..., Here]) -> None:
    """RESOURCE_EXHAUSTED with gRPC's own push-back."""
    here = start(max_upstream_calls=1, max_queue_images=1)

    async def hold() -> None:
        here.behaviour.hold = asyncio.Event()

    here.thread.run(hold())
    first = here.stub.Classify.future(pb.ClassifyRequest(image=bytes(784)))
    eventually(lambda: here.behaviour.under_way == 1)
    second = here.stub.Classify.future(pb.ClassifyRequest(image=bytes(784)))
    eventually(lambda: here.gateway.predictor.queued_images == 1)
    err = refused(here, bytes(784))
    assert err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(err.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1000
    here.thread.call(here.behaviour.hold.set)
    assert (first.result().model_version, second.result().model_version) == ("3", "3")


def test_a_call_that_is_cancelled_or_late_frees_its_place(start: Callable[..., Here]) -> None:
    """Neither is sent upstream."""
    here = start(max_upstream_calls=1)
    images = random_images(4)
    images[:, 0] = range(4)

    async def hold() -> None:
        here.behaviour.hold = asyncio.Event()

    here.thread.run(hold())
    calls = [here.stub.Classify.future(pb.ClassifyRequest(image=images[0].tobytes()))]
    eventually(lambda: here.behaviour.under_way == 1)
    cancelled = here.stub.Classify.future(pb.ClassifyRequest(image=images[1].tobytes()))
    calls.append(here.stub.Classify.future(pb.ClassifyRequest(image=images[2].tobytes())))
    eventually(lambda: here.gateway.predictor.queued_images == 2)
    cancelled.cancel()
    eventually(lambda: here.gateway.predictor.queued_images == 1)
    with pytest.raises(grpc.RpcError) as late:
        here.stub.Classify(pb.ClassifyRequest(image=images[3].tobytes()), timeout=0.05)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: here.gateway.predictor.queued_images == 1)
    here.thread.call(here.behaviour.hold.set)
    assert [call.result().digit for call in calls] == [0, 2]
    assert here.behaviour.first_pixels == [0, 2]


def test_the_request_id_travels(here: Here) -> None:
    """In the answer and the trailing metadata; made if none was sent."""
    answer, call = here.stub.Classify.with_call(
        pb.ClassifyRequest(image=bytes(784)), metadata=(("x-request-id", "abc"),)
    )
    assert answer.request_id == dict(call.trailing_metadata())["x-request-id"] == "abc"
    answer, call = here.stub.Classify.with_call(pb.ClassifyRequest(image=bytes(784)))
    assert answer.request_id == dict(call.trailing_metadata())["x-request-id"] != ""


def test_a_stream_answers_in_order_and_survives_bad_requests(here: Here) -> None:
    """500 requests, every seventh bad: 500 answers, each in its place, errors as messages."""
    images = random_images(500)

    def requests() -> Iterator[pb.ClassifyRequest]:
        for at, image in enumerate(images):
            yield pb.ClassifyRequest(image=b"bad" if at % 7 == 3 else image.tobytes())

    answers = list(here.stub.ClassifyStream(requests(), timeout=60))
    assert len(answers) == 500
    for at, (one, image) in enumerate(zip(answers, images, strict=True)):
        if at % 7 == 3:
            assert (one.WhichOneof("result"), one.error.code) == ("error", "bad_image")
        else:
            check_digit(one.answer, image)
    assert len({one.answer.request_id or one.error.request_id for one in answers}) == 500


def test_a_stream_has_several_requests_under_way(here: Here) -> None:
    """A client that sends ahead is coalesced like many clients."""
    here.behaviour.delay_s = 0.01
    list(here.stub.ClassifyStream(iter([pb.ClassifyRequest(image=bytes(784))] * 200), timeout=60))
    assert max(here.behaviour.batches) > 4


def test_a_stream_answers_each_request_before_the_next_is_sent(here: Here) -> None:
    """A client may wait for each answer: nothing is held back."""
    import queue

    todo: queue.Queue[pb.ClassifyRequest | None] = queue.Queue()
    answers = here.stub.ClassifyStream(iter(todo.get, None), timeout=60)
    for image in random_images(10):
        todo.put(pb.ClassifyRequest(image=image.tobytes()))
        check_digit(next(answers).answer, image)
    todo.put(None)
    assert list(answers) == []


def test_an_empty_stream_and_an_abandoned_one_leave_nothing_behind(here: Here) -> None:
    """No place stays taken."""
    assert list(here.stub.ClassifyStream(iter(()))) == []

    async def hold() -> None:
        here.behaviour.hold = asyncio.Event()

    here.thread.run(hold())
    call = here.stub.ClassifyStream(iter([pb.ClassifyRequest(image=bytes(784))] * 100))
    eventually(lambda: here.gateway.predictor.queued_images > 0)
    call.cancel()
    eventually(lambda: here.gateway.predictor.queued_images == 0)
    eventually(lambda: here.metric("digits_requests_in_flight", protocol="grpc") == 0)


def test_health_follows_readiness(start: Callable[..., Here]) -> None:
    """grpc.health.v1, for the server and for the service by name."""
    here = start()
    health = health_pb2_grpc.HealthStub(here.channel)
    status = health_pb2.HealthCheckResponse

    def now(service: str) -> int:
        return health.Check(health_pb2.HealthCheckRequest(service=service)).status

    eventually(lambda: now("") == now("digits.v1.Digits") == status.SERVING)
    here.behaviour.state = upstream_pb2.ModelVersionStatus.UNLOADING
    eventually(lambda: now("") == now("digits.v1.Digits") == status.NOT_SERVING)


def test_reflection_describes_the_service(here: Here) -> None:
    """A tool like grpcurl needs no proto file."""
    database = ProtoReflectionDescriptorDatabase(here.channel)
    assert {"digits.v1.Digits", "grpc.health.v1.Health"} <= set(database.get_services())
    service = DescriptorPool(database).FindServiceByName("digits.v1.Digits")
    assert [method.name for method in service.methods] == ["Classify", "ClassifyStream"]


def test_an_unknown_method_is_unimplemented(here: Here) -> None:
    """The library's own answer."""
    with pytest.raises(grpc.RpcError) as caught:
        here.channel.unary_unary("/digits.v1.Digits/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_rest_and_grpc_calls_share_upstream_calls(start: Callable[..., Here]) -> None:
    """One service behind both: what waits goes together, whichever way it came."""
    here = start(max_upstream_calls=1)

    async def hold() -> None:
        here.behaviour.hold = asyncio.Event()

    here.thread.run(hold())
    first = here.stub.Classify.future(pb.ClassifyRequest(image=bytes(784)))
    eventually(lambda: here.behaviour.under_way == 1)
    second = here.stub.Classify.future(pb.ClassifyRequest(image=bytes(784)))
    import threading

    rest = threading.Thread(target=here.classify, args=(bytes(784),))
    rest.start()
    eventually(lambda: here.gateway.predictor.queued_images == 2)
    here.thread.call(here.behaviour.hold.set)
    first.result()
    second.result()
    rest.join()
    assert here.behaviour.batches == [1, 2]


def storm(here: Here, refusals: int) -> list[Any]:
    """Calls far beyond what can be done, until so many were refused. All have ended."""
    calls: list[Any] = []
    refused_so_far = 0
    until = time.monotonic() + 30
    while refused_so_far < refusals and time.monotonic() < until:
        calls += [
            here.stub.Classify.future(pb.ClassifyRequest(image=bytes(784)), metadata=(("x-request-id", f"storm-{i}"),))
            for i in range(len(calls), len(calls) + 50)
        ]
        time.sleep(0.01)
        refused_so_far = sum(call.done() and call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for call in calls)
    assert refused_so_far >= refusals
    assert {call.code() for call in calls} == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    return calls


STORM: dict[str, Any] = {
    "max_upstream_calls": 1, "max_batch_images": 2, "max_burst_s": 0.05, "max_wait_s": 30, "timeout_s": 60,
}  # fmt: skip


def test_a_storm_is_refused_as_overload_is(start: Callable[..., Here], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the headers once overload lasts: the same code, push-back and id as any refusal, a line and a count each."""
    monkeypatch.setattr("serving.gateway.app.WORDS_A_SECOND", 1_000_000)
    here = start(**STORM)
    here.behaviour.delay_s = 0.02
    here.forget_log()
    calls = storm(here, 300)
    refused = [call for call in calls if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
    for call in refused:
        trailers = dict(call.trailing_metadata())
        assert int(trailers["grpc-retry-pushback-ms"]) >= 1000
        assert trailers["x-error-code"] == "overloaded"
        assert "try again later" in call.details()
    ids = [dict(call.trailing_metadata())["x-request-id"] for call in calls]
    assert ids == [f"storm-{i}" for i in range(len(calls))]
    labels = {"protocol": "grpc", "route": "Classify", "code": "RESOURCE_EXHAUSTED", "model_version": ""}
    assert here.metric("digits_requests_total", **labels) == len(refused)
    assert here.metric("digits_shed_total", reason="queue_slow") == len(refused)
    lines = {line["request_id"]: line for line in here.log_lines()}
    assert lines.keys() == set(ids)
    for call in refused:
        line = lines[dict(call.trailing_metadata())["x-request-id"]]
        assert (line["protocol"], line["route"], line["code"]) == ("grpc", "Classify", "RESOURCE_EXHAUSTED")
        assert (line["level"], line["error"]) == ("info", "overloaded")
        assert line["ms"] >= 0


def test_of_a_greater_storm_most_are_refused_without_words(
    start: Callable[..., Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Still RESOURCE_EXHAUSTED to every client, and counted; the log has their number each second."""
    monkeypatch.setattr("serving.gateway.app.WORDS_A_SECOND", 20)
    here = start(**STORM)
    here.behaviour.delay_s = 0.02
    here.forget_log()
    calls = storm(here, 500)
    refused = [call for call in calls if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
    wordless = [call for call in refused if "x-request-id" not in dict(call.trailing_metadata() or ())]
    assert 0 < len(wordless) < len(refused)
    labels = {"protocol": "grpc", "route": "Classify", "code": "RESOURCE_EXHAUSTED", "model_version": ""}
    assert here.metric("digits_requests_total", **labels) == len(refused)
    eventually(lambda: sum(line["count"] for line in here.log_lines("requests_shed")) == len(wordless))
    assert len(here.log_lines()) == len(calls) - len(wordless)
    assert (
        here.stub.Classify(pb.ClassifyRequest(image=bytes(784)), timeout=20, wait_for_ready=True).model_version == "3"
    )
