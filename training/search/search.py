"""The search itself: who trains what, what is pruned, when it ends.

This process alone speaks with Optuna and writes the study; the workers only train. So a worker may die at any time
(the pipe to it then ends): its trial is marked as failed and another worker takes its place. When this process dies,
so do its workers, within an epoch; the same command goes on from the study.
"""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from training.params import Params, change_params
from training.search.results import write_results
from training.search.space import build_space, read_values
from training.search.study import SearchStopped, best, finished, lost_trial, open_study, return_unfinished
from training.search.worker import EpochDone, Task, TrialDone, TrialGivenUp, work
from training.workspace import Workspace

WorkerMain = Callable[[Connection, Task], None]

_LOOK_S = 0.5
_DEATHS = 3
"""So many workers may die one after another without a trial finished between; then it is no accident."""


def search(
    workspace: Workspace,
    params: Params,
    console: Console,
    *,
    name: str,
    workers: int = 1,
    minutes: float | None = None,
    worker: WorkerMain = work,
) -> bool:
    """Search, or go on with the search ``name``; write what came of it to run/search/NAME/. False when interrupted.

    A trial trains on ``search.images`` training images for ``search.epochs`` epochs, all with the same seed, and is
    judged by the negative log-likelihood of all validation images. The test split is not touched.

    Args:
        workspace: where the prepared splits are.
        params: ``search`` says what is tried; the other sections what a trial has besides.
        console: for progress and outcome.
        name: of the folder.
        workers: processes that train at the same time, each with its share of the cores.
        minutes: no trial is begun after so many; those under way are finished.
        worker: what a process runs.

    Raises:
        BadParams: the space names a key or a value that is not allowed.
        BadArtifact: the data are not prepared.
        SearchStopped: another process runs this search, it was begun otherwise, or its workers die.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise SearchStopped(f"the search's name is {name!r}; allowed: letters, digits, '-', '_' and '.'")
    folder = workspace.root / "run" / "search" / name
    task = Task(
        params=change_params(params, {"train.epochs": params.search.epochs, "train.free_epochs": 0}),
        learn=workspace.artifact("prepare", "train.npz"),
        held_out=workspace.artifact("prepare", "validation.npz"),
        threads=max(1, len(os.sched_getaffinity(0)) // workers),
        log=folder / "workers.log",
    )
    space = build_space(task.params)
    with _alone(folder):
        study = open_study(folder, task, space)
        return_unfinished(study)
        crew = _Crew(study, space, task, partial(_Worker, worker, task), workers, minutes, console)
        interrupted = False
        try:
            with _terminated_like_interrupted():
                crew.run()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            crew.end()
            return_unfinished(study)
            write_results(folder, study, task.params, console)
        if interrupted:
            count = len(finished(study))
            console.print(f"stopped after {count} of {params.search.trials} trials; the same command goes on")
    return not interrupted


class _Worker:
    """A process, the pipe to it, and the trial it is training."""

    def __init__(self, main: WorkerMain, task: Task, progress: Progress) -> None:
        spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=main, args=(theirs, task), daemon=True)
        # Ctrl-C goes to every process of a terminal; what it means for a worker, this process decides.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        self.trial: optuna.Trial | None = None
        self.bar: TaskID = progress.add_task("  worker is starting", total=task.params.train.epochs, note="")

    def train(self, trial: optuna.Trial, values: Mapping[str, Any]) -> None:
        self.trial = trial
        self.connection.send(dict(values))


class _Crew:
    """The workers of a search, and what they are told."""

    def __init__(
        self,
        study: optuna.Study,
        space: Mapping[str, BaseDistribution],
        task: Task,
        hire: Callable[[Progress], "_Worker"],
        size: int,
        minutes: float | None,
        console: Console,
    ) -> None:
        self._study, self._space, self._task = study, dict(space), task
        self._hire, self._size, self._trials = hire, size, task.params.search.trials
        self._workers: list[_Worker] = []
        self._deaths = 0
        self._console = console
        self._progress = _progress(console)
        self._until = time.monotonic() + 60 * minutes if minutes is not None else float("inf")

    def run(self) -> None:
        """Until enough trials are finished, or time is up."""
        with self._progress:
            self._bar = self._progress.add_task(
                "trials", total=self._trials, completed=len(finished(self._study)), note=""
            )
            while True:
                self._hand_out()
                busy = [worker for worker in self._workers if worker.trial is not None]
                if not busy:
                    return
                for connection in wait([worker.connection for worker in busy], timeout=_LOOK_S):
                    self._listen(next(worker for worker in busy if worker.connection is connection))

    def end(self) -> None:
        """No worker writes anything but its log, so none needs time to end."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()

    def _hand_out(self) -> None:
        """Give each worker that has none a trial, while there are any to begin; hire up to the number of workers."""
        while self._may_begin():
            idle = next((worker for worker in self._workers if worker.trial is None), None)
            if idle is None and len(self._workers) == self._size:
                return
            if idle is None:
                idle = self._hire(self._progress)
                self._workers.append(idle)
            trial = self._study.ask(self._space)
            self._progress.reset(idle.bar, description=f"  trial {trial.number}", note="")
            try:
                idle.train(trial, read_values(self._task.params, trial.params))
            except OSError:  # it died meanwhile
                self._bury(idle)

    def _may_begin(self) -> bool:
        under_way = sum(worker.trial is not None for worker in self._workers)
        return len(finished(self._study)) + under_way < self._trials and time.monotonic() < self._until

    def _listen(self, worker: _Worker) -> None:
        assert worker.trial is not None
        try:
            message = worker.connection.recv()
            if isinstance(message, EpochDone):
                worker.connection.send(self._goes_on(worker, message))
                return
        except (EOFError, OSError):
            self._bury(worker)
            return
        self._finish(worker.trial, message)
        worker.trial, self._deaths = None, 0

    def _goes_on(self, worker: _Worker, done: EpochDone) -> bool:
        trial, epochs = worker.trial, self._task.params.train.epochs
        assert trial is not None
        trial.report(done.loss, done.epoch)
        trial.set_user_attr("accuracy", done.accuracy)
        self._progress.update(worker.bar, completed=done.epoch, note=_told(done.loss, done.accuracy))
        return done.epoch == epochs or not trial.should_prune()

    def _finish(self, trial: optuna.Trial, message: TrialDone | TrialGivenUp) -> None:
        trial.set_user_attr("seconds", message.seconds)
        if isinstance(message, TrialDone):
            trial.set_user_attr("accuracy", message.accuracy)
            self._study.tell(trial, message.loss)
            outcome = _told(message.loss, message.accuracy)
        else:
            if message.reason:
                trial.set_user_attr("reason", message.reason)
            self._study.tell(trial, state=TrialState.PRUNED)
            outcome = message.reason or "pruned"
        values = ", ".join(
            f"{key.split('.')[-1]} {value}" for key, value in read_values(self._task.params, trial.params).items()
        )
        self._console.print(f"trial {trial.number}: {outcome}, {message.seconds:.0f} s: {values}")
        winner = best(self._study)
        note = f"best {winner.value:.4f} (trial {winner.number})" if winner else ""
        self._progress.update(self._bar, completed=len(finished(self._study)), note=note)

    def _bury(self, worker: _Worker) -> None:
        """A worker is gone: out of memory, killed, or an error of ours."""
        assert worker.trial is not None
        worker.process.kill()
        worker.process.join()
        self._workers.remove(worker)
        self._progress.remove_task(worker.bar)
        self._deaths += 1
        lost_trial(self._study, worker.trial)
        how = f"the worker of trial {worker.trial.number} died (exit code {worker.process.exitcode})"
        if self._deaths >= _DEATHS:
            raise SearchStopped(
                f"{how}, as did {_DEATHS - 1} before it: {self._task.log} has what they said last. Exit code -9 "
                "is often too little memory: use fewer --workers, or a smaller search.space"
            )
        self._console.print(f"{how}; the search goes on")


def _told(loss: float, accuracy: float) -> str:
    return f"loss {loss:.4f}, accuracy {accuracy:.2%}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as err:
        raise SearchStopped(
            f"another process is running the search in {folder}: wait for it, or begin another with --name"
        ) from err
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the search as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,  # a log has a line for each trial
    )
