"""Workers that train nothing, to test the search around them."""

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from training.search.worker import EpochDone, Task, TrialDone, TrialGivenUp


def loss_of(values: dict[str, Any]) -> float:
    """Least at a rate of 0.003 with gelu."""
    rate = values["train.learning_rate"]
    return 0.05 + abs(rate - 0.003) * 50 + (values["model.activation"] != "gelu") * 0.1


def learn(connection: Connection, task: Task) -> None:
    """As training.search.worker.work, with a formula in place of a network."""
    while (values := connection.recv()) is not None:
        connection.send(_trial(connection, values, task.params.train.epochs))


def die_in_the_second_trial(connection: Connection, task: Task) -> None:
    _act_in_trial(2, connection, task, lambda: os.kill(os.getpid(), signal.SIGKILL))


def interrupt_in_the_third_trial(connection: Connection, task: Task) -> None:
    _act_in_trial(3, connection, task, lambda: os.kill(os.getppid(), signal.SIGINT))


def kill_the_search_in_the_third_trial(connection: Connection, task: Task) -> None:
    _act_in_trial(3, connection, task, lambda: os.kill(os.getppid(), signal.SIGKILL))


def die_always(connection: Connection, task: Task) -> None:
    connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def _act_in_trial(number: int, connection: Connection, task: Task, act: Callable[[], None]) -> None:
    """Do it once, in that trial of the first worker; it and all others only learn."""
    mark = task.log.with_name("acted")
    if not mark.exists():
        mark.touch()
        for _ in range(number - 1):
            connection.send(_trial(connection, connection.recv(), task.params.train.epochs))
        values = connection.recv()
        connection.send(EpochDone(1, loss_of(values), 0.9))
        connection.recv()
        act()
        connection.recv()  # until the search is gone, or kills this process
        return
    learn(connection, task)


def _trial(connection: Connection, values: dict[str, Any], epochs: int) -> TrialDone | TrialGivenUp:
    for epoch in range(1, epochs + 1):
        connection.send(EpochDone(epoch, loss_of(values) + 1 / epoch, 0.9))
        if not connection.recv():
            return TrialGivenUp(0.1)
    return TrialDone(loss_of(values), 0.95, 0.2)
