"""Coroutines that begin at once: what runs when, and what comes of ends, errors and cancellation."""

import asyncio
import contextvars
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serving.gateway import eager

NAME = contextvars.ContextVar("NAME", default="outside")


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        asyncio.run(test(**arguments))

    return run


@in_a_loop
async def test_it_runs_to_its_first_wait_at_once_and_on_as_a_task() -> None:
    told, gate = [], asyncio.get_running_loop().create_future()

    async def work() -> int:
        told.append("begun")
        told.append(await gate)
        await asyncio.sleep(0)  # waits for nothing but its turn
        return 7

    task = eager.start(work())
    assert told == ["begun"]
    gate.set_result("went on")
    assert await task == 7
    assert told == ["begun", "went on"]


@in_a_loop
async def test_what_never_waits_is_done() -> None:
    async def work() -> int:
        return 7

    async def fail() -> None:
        raise KeyError("a key")

    assert eager.start(work()).result() == 7
    assert isinstance(eager.start(fail()).exception(), KeyError)


@in_a_loop
async def test_errors_reach_the_coroutine_and_its_own_whoever_awaits() -> None:
    gate = asyncio.get_running_loop().create_future()

    async def work() -> None:
        try:
            await gate
        except OSError as err:
            raise KeyError("from it") from err

    task = eager.start(work())
    gate.set_exception(OSError("gone"))
    with pytest.raises(KeyError, match="from it") as raised:
        await task
    assert isinstance(raised.value.__cause__, OSError)


@pytest.mark.parametrize("turns", [0, 1])
@in_a_loop
async def test_it_can_be_cancelled(turns: int) -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    task = eager.start(work())
    if turns:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


@in_a_loop
async def test_what_it_sets_stays_inside() -> None:
    seen = []

    async def work() -> None:
        NAME.set("inside")
        await asyncio.sleep(0)
        seen.append(NAME.get())

    task = eager.start(work())
    assert NAME.get() == "outside"
    await task
    assert seen == ["inside"]
