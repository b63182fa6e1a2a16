"""Coalescing, order, deadlines, places: the transport-free service before a real model server."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from digits.errors import ModelUnavailable, Overloaded, UpstreamTimeout
from serving.gateway.predictor import Answer, Place
from tests.serving.gateway.conftest import HANG_S, Here, eventually, random_images
from tests.serving.gateway.upstream_server import expected_probabilities

BURST_S = 0.1


def far() -> float:
    return time.monotonic() + HANG_S


def check(answer: Answer, image_u8: np.ndarray) -> None:
    expected = expected_probabilities(image_u8[None])[0]
    assert answer.digit == image_u8[0] % 10
    np.testing.assert_allclose(answer.probabilities, expected)
    assert answer.confidence == max(answer.probabilities)


def test_calls_that_arrive_while_one_is_under_way_go_upstream_together(start: Callable[..., Here]) -> None:
    """While the first call is held upstream 50 more arrive: they make one call of 50."""
    here = start(max_upstream_calls=1)
    images = random_images(51)

    async def calls() -> list[list[Answer]]:
        here.behaviour.hold = asyncio.Event()
        predictor = here.gateway.predictor
        first = predictor.submit(images[0].tobytes(), 1, far())
        while not here.behaviour.under_way:  # noqa: ASYNC110 - the server knows no events
            await asyncio.sleep(0.001)
        others = [predictor.submit(image.tobytes(), 1, far()) for image in images[1:]]
        await asyncio.sleep(0.02)
        here.behaviour.hold.set()
        return await asyncio.gather(first, *others)

    answers = here.thread.run(calls())
    assert here.behaviour.batches == [1, 50]
    for [answer], image in zip(answers, images, strict=True):
        check(answer, image)


def test_a_gateway_that_stays_awake_answers_alike(start: Callable[..., Here]) -> None:
    """Calls one after another and all at once; and it ends as any other."""
    here = start(busy_wait_ms=50)
    images = random_images(60)

    async def calls() -> list[list[Answer]]:
        predictor = here.gateway.predictor
        alone = [await predictor.submit(image.tobytes(), 1, far()) for image in images[:10]]
        return alone + await asyncio.gather(*[predictor.submit(image.tobytes(), 1, far()) for image in images[10:]])

    for [answer], image in zip(here.thread.run(calls()), images, strict=True):
        check(answer, image)


def test_a_lone_call_is_not_held_back_for_company(here: Here) -> None:
    """Nothing is under way, so each call goes at once and alone: three calls one after another are three batches."""
    for image in random_images(3):
        here.thread.run(_await(here, image.tobytes(), 1))
    assert here.behaviour.batches == [1, 1, 1]


def test_batches_are_bounded_in_images_and_calls_in_number(start: Callable[..., Here]) -> None:
    """At most 16 images a call and 2 calls at a time, however many wait."""
    here = start(max_batch_images=16, max_upstream_calls=2)
    here.behaviour.delay_s = 0.005

    async def calls() -> None:
        submit = here.gateway.predictor.submit
        await asyncio.gather(*(submit(image.tobytes(), 1, far()) for image in random_images(200)))

    here.thread.run(calls())
    assert sum(here.behaviour.batches) == 200
    assert max(here.behaviour.batches) == 16
    assert here.behaviour.most_under_way == 2


def test_clients_that_wait_for_each_others_batch_are_parted(start: Callable[..., Here]) -> None:
    """64 that each send the next image on an answer do not fall into step: no call takes over half, two overlap."""
    here = start(max_upstream_calls=2)
    here.behaviour.delay_s = 0.002
    images = random_images(64)

    async def client(image: np.ndarray) -> None:
        for _ in range(10):
            [answer] = await here.gateway.predictor.submit(image.tobytes(), 1, far())
            assert answer.digit == image[0] % 10

    async def calls() -> None:
        await asyncio.gather(*map(client, images))

    here.thread.run(calls())
    assert sum(here.behaviour.batches) == 640
    assert max(here.behaviour.batches) <= 32
    assert here.behaviour.most_under_way == 2


def test_a_caller_hears_of_a_failure_only_once_its_place_is_taken(start: Callable[..., Here]) -> None:
    """With the breaker open a whole part that goes at once fails at once, though not before ``enter`` has returned."""
    here = start(timeout_s=1)
    heard: list[Exception] = []

    class Teller(Place):
        __slots__ = ()

        def refused(self, err: Exception) -> None:
            heard.append(err)

    async def calls() -> None:
        predictor = here.gateway.predictor
        for _ in range(1000):
            here.gateway.upstream.breaker.failed()
        # Too little time for a second attempt, so the first one's refusal is the call's.
        predictor.enter(Teller(random_images(100).tobytes(), 100, time.monotonic() + 0.009))
        assert not heard
        while not heard:  # noqa: ASYNC110 - a thread's test, with no event to wait for
            await asyncio.sleep(0.001)

    here.thread.run(calls())
    assert isinstance(heard[0], ModelUnavailable)
    assert not here.behaviour.batches


def test_a_call_of_more_images_than_a_batch_goes_alone_and_whole(start: Callable[..., Here]) -> None:
    """A caller's images are never split over two model versions."""
    here = start(max_batch_images=8)
    images = random_images(20)
    answers = here.thread.run(_await(here, images.tobytes(), 20))
    assert here.behaviour.batches == [20]
    for answer, image in zip(answers, images, strict=True):
        check(answer, image)


def test_each_of_thousands_of_callers_gets_its_own_answers(start: Callable[..., Here]) -> None:
    """5,000 calls of 1 to 5 images, sent at random times against a jittery model server: no answer is another's."""
    here = start(max_batch_images=32, max_upstream_calls=4, max_queue_images=100_000, max_wait_s=60, max_burst_s=60)
    chance = random.Random(7)
    images = random_images(25_000)

    async def caller(at: int, count: int) -> None:
        await asyncio.sleep(chance.random() * 0.5)
        here.behaviour.delay_s = chance.random() * 0.003
        mine = images[at : at + count]
        answers = await here.gateway.predictor.submit(mine.tobytes(), count, far())
        assert [answer.digit for answer in answers] == (mine[:, 0] % 10).tolist()
        expected = (mine[:, 1].astype(np.float32) + 1) / 512 + 0.5
        np.testing.assert_array_equal(np.float32([answer.confidence for answer in answers]), expected)

    async def calls() -> None:
        await asyncio.gather(*(caller(at * 5, chance.randint(1, 5)) for at in range(5000)))

    here.thread.run(calls())
    assert max(here.behaviour.batches) > 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=30), seed=st.integers(0, 2**32 - 1))
def test_any_mix_of_call_sizes_is_answered_in_order(here: Here, counts: list[int], seed: int) -> None:
    """Whatever sizes arrive together, each caller gets one answer for each of its images, in its order."""
    images = random_images(sum(counts), seed)
    starts = np.cumsum([0, *counts])

    async def calls() -> list[list[Answer]]:
        submit = here.gateway.predictor.submit
        parts = [images[a:b] for a, b in pairwise(starts)]
        return await asyncio.gather(*(submit(part.tobytes(), len(part), far()) for part in parts))

    answers = [answer for one in here.thread.run(calls()) for answer in one]
    assert [answer.digit for answer in answers] == (images[:, 0] % 10).tolist()


def test_a_call_whose_deadline_has_passed_is_never_sent(start: Callable[..., Here]) -> None:
    """One that comes too late and one whose time runs out in the queue are refused; the server never sees them."""
    here = start(max_upstream_calls=1)
    images = random_images(3)
    images[:, 0] = [1, 2, 3]

    async def calls() -> list[object]:
        here.behaviour.hold = asyncio.Event()
        submit = here.gateway.predictor.submit
        with pytest.raises(UpstreamTimeout):
            submit(images[0].tobytes(), 1, time.monotonic() - 0.001)
        held = submit(images[1].tobytes(), 1, far())
        while not here.behaviour.under_way:  # noqa: ASYNC110 - the server knows no events
            await asyncio.sleep(0.001)
        late = submit(images[2].tobytes(), 1, time.monotonic() + 0.05)
        [late_answer] = await asyncio.gather(late, return_exceptions=True)
        assert here.gateway.predictor.queued_images == 0
        here.behaviour.hold.set()
        return [await held, late_answer]

    held, late = here.thread.run(calls())
    assert held[0].digit == 2
    assert isinstance(late, UpstreamTimeout)
    here.thread.run(_await(here, images[0].tobytes(), 1))
    assert here.behaviour.first_pixels == [2, 1]


def test_a_caller_that_leaves_frees_its_place(start: Callable[..., Here]) -> None:
    """A full queue refuses the next call; once a waiting caller has gone it is taken, and the gone one is not sent."""
    here = start(max_upstream_calls=1, max_queue_images=2)
    images = random_images(5)
    images[:, 0] = range(5)

    async def calls() -> None:
        here.behaviour.hold = asyncio.Event()
        submit = here.gateway.predictor.submit
        held = submit(images[0].tobytes(), 1, far())
        while not here.behaviour.under_way:  # noqa: ASYNC110 - the server knows no events
            await asyncio.sleep(0.001)
        leaver = asyncio.create_task(_awaited(submit(images[1].tobytes(), 1, far())))
        stayer = submit(images[2].tobytes(), 1, far())
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            submit(images[3].tobytes(), 1, far())
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert here.gateway.predictor.queued_images == 1
        taken = submit(images[4].tobytes(), 1, far())
        here.behaviour.hold.set()
        await asyncio.gather(held, stayer, taken)

    here.thread.run(calls())
    assert here.behaviour.first_pixels == [0, 2, 4]


def test_one_impatient_caller_does_not_spoil_the_batch_it_is_in(start: Callable[..., Here]) -> None:
    """Two go upstream together; the deadline of one passes while the model works; the other gets its answer."""
    here = start(max_upstream_calls=1)
    images = random_images(2)

    async def calls() -> list[object]:
        here.behaviour.hold = asyncio.Event()
        submit = here.gateway.predictor.submit
        impatient = submit(images[0].tobytes(), 1, time.monotonic() + 0.05)
        patient = submit(images[1].tobytes(), 1, far())
        [first] = await asyncio.gather(impatient, return_exceptions=True)
        here.behaviour.hold.set()
        return [first, await patient]

    impatient, patient = here.thread.run(calls())
    assert isinstance(impatient, UpstreamTimeout)
    check(patient[0], images[1])
    assert here.behaviour.batches == [2]


def test_one_call_that_hangs_does_not_hold_up_the_rest(start: Callable[..., Here]) -> None:
    """A second upstream call goes beside a slow one though no full batch waits."""
    here = start(max_upstream_calls=2)
    images = random_images(2)

    async def calls() -> None:
        submit = here.gateway.predictor.submit
        here.behaviour.hold = asyncio.Event()
        held = submit(images[0].tobytes(), 1, far())
        while not here.behaviour.under_way:  # noqa: ASYNC110 - the server knows no events
            await asyncio.sleep(0.001)
        release, here.behaviour.hold = here.behaviour.hold, None
        check((await submit(images[1].tobytes(), 1, far()))[0], images[1])
        assert not held.done()
        release.set()
        check((await held)[0], images[0])

    here.thread.run(calls())


def test_closing_refuses_new_calls_and_answers_those_that_wait(start: Callable[..., Here]) -> None:
    """Draining loses nothing that was accepted."""
    here = start()
    image = random_images(1)[0]

    async def calls() -> list[Answer]:
        predictor = here.gateway.predictor
        waiting = predictor.submit(image.tobytes(), 1, far())
        closing = asyncio.create_task(predictor.close())
        await asyncio.sleep(0)
        with pytest.raises(ModelUnavailable):
            predictor.submit(image.tobytes(), 1, far())
        await closing
        return await waiting

    check(here.thread.run(calls())[0], image)


def test_images_of_another_size_are_a_defect_of_the_caller(here: Here) -> None:
    """The adapters make canonical images; anything else must not reach the model."""
    for bad in (b"", b"x" * 783, b"x" * 785):
        with pytest.raises(ValueError, match="784"):
            here.gateway.predictor.submit(bad, 1, far())


def test_waits_batches_and_answers_are_counted(start: Callable[..., Here]) -> None:
    """The metrics of the predictor hold what happened."""
    here = start()
    images = random_images(4)
    images[:, 0] = [1, 1, 7, 9]
    images[:, 1] = 255  # confidence 1.0
    here.thread.run(_await(here, images.tobytes(), 4))
    assert here.metric("digits_predictions_total", digit="1", model_version="3") == 2
    assert here.metric("digits_predictions_total", digit="7", model_version="3") == 1
    assert here.metric("digits_prediction_confidence_count", model_version="3") == 4
    assert here.metric("digits_prediction_confidence_bucket", model_version="3", le="0.999") == 0
    assert here.metric("digits_batch_images_sum") == 4
    assert here.metric("digits_queue_wait_seconds_count") == 1
    assert here.metric("digits_upstream_calls_total", code="OK") == 1
    eventually(lambda: here.metric("digits_upstream_calls_in_flight") == 0)


async def _await(here: Here, images_u8: bytes, count: int) -> list[Answer]:
    return await here.gateway.predictor.submit(images_u8, count, far())


async def _awaited(waiting: "asyncio.Future[list[Answer]]") -> list[Answer]:
    return await waiting


def test_when_calls_are_slow_fewer_are_let_in(start: Callable[..., Here]) -> None:
    """Calls take 0.2 s for two images each: of many that come together those are refused whose turn is far off."""
    here = start(max_upstream_calls=1, max_batch_images=2, max_wait_s=0.5, timeout_s=20)
    here.behaviour.delay_s = 0.2

    async def calls() -> list[object]:
        submit = here.gateway.predictor.submit
        await submit(bytes(784), 1, far())
        taken, refused = [], []
        for _ in range(40):
            try:
                taken.append(submit(bytes(784), 1, far()))
            except Overloaded as err:
                refused.append(err)
        with pytest.raises(Overloaded):  # let in for half a second, but it has less
            submit(bytes(784), 1, time.monotonic() + 0.1)
        await asyncio.gather(*taken)
        return refused

    refused = here.thread.run(calls())
    assert 28 <= len(refused) <= 36
    assert min(one.retry_after_s for one in refused) >= 1
    assert here.metric("digits_shed_total", reason="queue_slow") == len(refused) + 1


def test_under_lasting_overload_the_queue_becomes_short(start: Callable[..., Here]) -> None:
    """A burst may fill it; when more keeps coming than can be done it is kept short, for as long as that lasts; after a
    calm a burst may fill it again.
    """
    here = start(max_upstream_calls=1, max_batch_images=2, max_wait_s=HANG_S, timeout_s=2 * HANG_S, max_burst_s=BURST_S)
    here.behaviour.delay_s = 0.02

    async def overload() -> tuple[int, int, int]:
        predictor = here.gateway.predictor
        taken = [predictor.submit(bytes(784), 1, far()) for _ in range(60)]
        longest = predictor.queued_images
        last_refusal = 0.0

        async def more() -> None:
            nonlocal last_refusal
            for _ in range(4):  # five times what can be done
                before = time.monotonic()
                try:
                    taken.append(predictor.submit(bytes(784), 1, far()))
                except Overloaded:
                    last_refusal = before
            await asyncio.sleep(0.008)

        until = time.monotonic() + 2 * HANG_S
        lasting: list[int] = []
        settled = False
        while len(lasting) < 50 and time.monotonic() < until:
            refused_at = last_refusal
            await more()
            if time.monotonic() - refused_at > BURST_S:
                settled = False  # this machine stood still: a calm, after which a burst may fill the queue again
            elif predictor.queued_images <= 3 and last_refusal > refused_at:
                settled = True
            if settled:
                lasting.append(predictor.queued_images)
        assert len(lasting) == 50
        await asyncio.gather(*taken)
        again = 0
        calm_s = 0.3
        while again < 50 and calm_s < HANG_S:  # it is over sooner the quicker calls are
            await asyncio.sleep(calm_s)
            calm_s *= 3
            taken = []
            with contextlib.suppress(Overloaded):
                taken.extend(predictor.submit(bytes(784), 1, far()) for _ in range(60))
            again = predictor.queued_images
            await asyncio.gather(*taken)
        return longest, max(lasting), again

    longest, lasting, again = here.thread.run(overload())
    assert longest >= 50
    assert lasting <= 3
    assert again >= 50


def test_under_lasting_overload_batches_become_short(start: Callable[..., Here]) -> None:
    """A call costs the model as much more as it has more images: then no more go together than take a few times what
    a call takes in calm.
    """
    here = start(
        max_upstream_calls=1, max_batch_images=64, max_queue_images=256, max_wait_s=HANG_S, max_burst_s=BURST_S
    )
    here.behaviour.delay_s = here.behaviour.delay_per_image_s = 0.005

    async def overload() -> int:
        predictor = here.gateway.predictor
        for _ in range(10):
            await predictor.submit(bytes(784), 1, far())  # calm: some 10 ms a call
        here.behaviour.batches.clear()
        taken = []
        until = time.monotonic() + HANG_S
        while not (here.behaviour.batches and here.behaviour.batches[-1] < 32) and time.monotonic() < until:
            with contextlib.suppress(Overloaded):
                taken.extend(predictor.submit(bytes(784), 1, far()) for _ in range(200))
            await asyncio.sleep(0.005)
        last = here.behaviour.batches[-1]
        await asyncio.gather(*taken)
        return last

    last = here.thread.run(overload(), 2 * HANG_S)
    assert max(here.behaviour.batches) == 64
    assert last < 32


def test_under_lasting_overload_batches_stay_long_where_calls_cost_and_images_do_not(
    start: Callable[..., Here],
) -> None:
    """Short calls would do a small part of the work there, and sooner by nothing."""
    here = start(
        max_upstream_calls=3, max_batch_images=64, max_queue_images=256, max_wait_s=HANG_S, max_burst_s=BURST_S
    )
    here.behaviour.delay_s, here.behaviour.delay_per_image_s = 0.02, 0.00002

    async def overload() -> list[int]:
        predictor = here.gateway.predictor
        for _ in range(10):
            await predictor.submit(bytes(784), 1, far())
        here.behaviour.batches.clear()
        taken = []
        until = time.monotonic() + HANG_S
        lasting_from = 0
        while not lasting_from or len(here.behaviour.batches) < lasting_from + 20:
            assert time.monotonic() < until
            try:
                taken.extend(predictor.submit(bytes(784), 1, far()) for _ in range(200))
            except Overloaded:
                if predictor.queued_images < 64 and not lasting_from:  # refused with less than a batch waiting
                    lasting_from = len(here.behaviour.batches)
            await asyncio.sleep(0.002)
        batches = here.behaviour.batches[lasting_from + 5 :]
        await asyncio.gather(*taken)
        return batches

    batches = here.thread.run(overload(), 2 * HANG_S)
    assert 12 < np.median(batches) < 64  # where images cost, calls are of 12 or fewer
