"""Tasks that begin at once and not in the event loop's next turn, as Python has them from 3.12 on."""

import asyncio
import contextvars
import sys
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar, cast

T = TypeVar("T")


def start(coroutine: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
    """Run a coroutine up to where it first waits, and the rest as a task in the loop that runs.

    Before Python 3.12 the first part must not ask for its task, as ``asyncio.timeout`` does: it is not there yet.

    Returns:
        The task; or what is done already, if it never waited.
    """
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True)
    context = contextvars.copy_context()
    steps = _steps(coroutine)
    done: asyncio.Future[T] = loop.create_future()
    try:
        context.run(steps.send, None)
    except StopIteration as end:
        done.set_result(end.value)
    except Exception as err:  # noqa: BLE001 - whoever awaits it gets it
        done.set_exception(err)
    else:
        return loop.create_task(steps, context=context)
    return done


@types.coroutine
def _steps(coroutine: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """What the coroutine waits for, one after another; before the first it stops once more, for a task to take over."""
    try:
        waits_for = [None, coroutine.send(None)]
    except StopIteration as end:
        return end.value
    while True:
        try:
            for one in waits_for:
                came = yield one
        except BaseException as err:  # noqa: BLE001 - the coroutine gets it
            step, given = cast(Callable[[Any], Any], coroutine.throw), cast(Any, err)
        else:
            step, given = coroutine.send, came
        try:
            waits_for = [step(given)]
        except StopIteration as end:
            return end.value
