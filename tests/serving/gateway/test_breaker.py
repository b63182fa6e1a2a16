"""The circuit breaker: when it opens, what it lets through, how it closes; alone and before a real model server."""

import asyncio
import time
from collections.abc import Callable

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.breaker import FIRST_PAUSE_S, IN_A_ROW, LONGEST_PAUSE_S, WINDOW, Breaker, State
from serving.protos import digits_pb2 as pb
from tests.serving.gateway.conftest import Here, eventually, random_images


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(lambda _: None, clock)


def end(breaker: Breaker, *, failed: bool) -> None:
    assert breaker.admits()
    (breaker.failed if failed else breaker.succeeded)()


def test_failures_in_a_row_open_it(breaker: Breaker) -> None:
    """One less does not, and a success between them starts the count anew."""
    for _ in range(IN_A_ROW - 1):
        end(breaker, failed=True)
    end(breaker, failed=False)
    for _ in range(IN_A_ROW - 1):
        end(breaker, failed=True)
    assert breaker.state is State.CLOSED
    end(breaker, failed=True)
    assert breaker.state is State.OPEN
    assert not breaker.admits()


def test_half_of_the_last_calls_open_it(breaker: Breaker) -> None:
    """A server that answers every other call is none to rely on."""
    for at in range(WINDOW + 2):
        if breaker.state is State.OPEN:
            break
        end(breaker, failed=at % 2 == 0)
    assert breaker.state is State.OPEN


def test_after_a_pause_one_call_tries(breaker: Breaker, clock: Clock) -> None:
    """The others wait for how it ends; success closes, failure opens it for longer, up to a second or so."""
    for _ in range(IN_A_ROW):
        end(breaker, failed=True)
    pauses = []
    for _ in range(6):
        pauses.append(breaker.retry_after_s())
        clock.now += breaker.retry_after_s() + 0.001
        assert breaker.admits()
        assert breaker.state is State.HALF_OPEN
        assert not breaker.admits()
        breaker.failed()
        assert breaker.state is State.OPEN
    assert 0.7 * FIRST_PAUSE_S <= pauses[0] <= 1.3 * FIRST_PAUSE_S
    assert 0.7 * LONGEST_PAUSE_S <= pauses[-1] <= 1.3 * LONGEST_PAUSE_S
    clock.now += 2
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.state is State.CLOSED
    assert breaker.admits()


def test_a_trial_that_says_nothing_makes_room_for_another(breaker: Breaker, clock: Clock) -> None:
    """A caller that leaves must not keep the breaker half open for ever."""
    for _ in range(IN_A_ROW):
        end(breaker, failed=True)
    breaker.server_is_back()
    assert breaker.admits()
    breaker.gave_up()
    assert breaker.admits()


@given(st.lists(st.sampled_from(["admits", "succeeded", "failed", "gave_up", "server_is_back", "later"])))
def test_whatever_happens_it_never_stays_shut(events: list[str]) -> None:
    """From any state, time and a success lead back to closed; half open admits one call at a time."""
    clock = Clock()
    breaker = Breaker(lambda _: None, clock)
    for event in events:
        if event == "later":
            clock.now += 0.3
        else:
            getattr(breaker, event)()
    clock.now += 2
    breaker.gave_up()
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.state is State.CLOSED


def test_while_the_server_is_away_calls_end_at_once_and_say_when_to_come_back(start: Callable[..., Here]) -> None:
    """503 and UNAVAILABLE with a time; nothing is sent; readiness and health are off; the state is in the metrics."""
    here = start(status_poll_s=600)
    here.behaviour.abort = (grpc.StatusCode.UNAVAILABLE, "secret")
    for _ in range(3):
        here.classify(bytes(784))
    assert here.metric("digits_breaker_state") == State.OPEN
    sent = len(here.behaviour.batches)
    here.gateway.upstream.breaker._open_until = time.monotonic() + 600
    answer = here.classify(bytes(784))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    with pytest.raises(grpc.RpcError) as caught:
        here.stub.Classify(pb.ClassifyRequest(image=bytes(784)))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1
    assert here.http.get("/v1/models/digits/metadata").status_code == 503
    assert len(here.behaviour.batches) == sent
    assert here.http.get("/readyz").status_code == 503
    assert "fail" in here.http.get("/readyz").json()["reason"]
    assert here.metric("digits_breaker_refusals_total") >= 3
    assert here.metric("digits_upstream_retries_total") >= 2


def test_it_closes_as_soon_as_the_server_answers_again(start: Callable[..., Here]) -> None:
    """The status that is polled anyway tells of its return, and of calls that then come together all are answered."""
    here = start(max_batch_images=1, max_upstream_calls=8)
    here.thread.run(here.upstream.stop())
    eventually(lambda: here.classify(bytes(784)).status_code == 503 and here.metric("digits_breaker_state") != 0)
    here.thread.run(here.upstream.start())
    here.wait_ready()

    async def together() -> list[object]:
        calls = [here.gateway.classify(one.tobytes(), time.monotonic() + 20) for one in random_images(8)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = here.thread.run(together())
    assert [one for one in answers if isinstance(one, Exception)] == []
    assert here.metric("digits_breaker_state") == State.CLOSED


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND])
def test_refusals_of_the_server_do_not_open_it(start: Callable[..., Here], code: grpc.StatusCode) -> None:
    """It is there and says so."""
    here = start()
    here.behaviour.abort = (code, "")
    for _ in range(2 * IN_A_ROW):
        here.classify(bytes(784))
    assert here.metric("digits_breaker_state") == State.CLOSED


def test_callers_in_a_hurry_do_not_open_it(start: Callable[..., Here]) -> None:
    """A deadline of milliseconds says nothing about the server."""
    here = start()
    here.behaviour.delay_s = 0.2
    for _ in range(2 * IN_A_ROW):
        with pytest.raises(grpc.RpcError):
            here.stub.Classify(pb.ClassifyRequest(image=bytes(784)), timeout=0.02)
    here.behaviour.delay_s = 0.0
    assert here.metric("digits_breaker_state") == State.CLOSED
    assert here.classify(bytes(784)).status_code == 200


def test_a_server_that_hangs_opens_it(start: Callable[..., Here]) -> None:
    """Calls that get no word for a second or more are failures of the server."""
    here = start(timeout_s=1.05, max_upstream_calls=16, status_poll_s=600)

    async def hold() -> None:
        here.behaviour.hold = asyncio.Event()
        calls = [here.gateway.upstream.predict(bytes(784), 1, time.monotonic() + 1.05) for _ in range(IN_A_ROW)]
        await asyncio.gather(*calls, return_exceptions=True)

    here.thread.run(hold())
    assert here.metric("digits_breaker_state") == State.OPEN
