"""The batch scoring flow: look at every shard, stop if the whole is no set of digits, score, join.

Shards are tasks: threads here, or a Dask cluster by ``DIGITS_TASK_RUNNER=dask``. They pass paths, never arrays; on a
cluster of several machines input and output must lie on a file system that all of them see.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.states import State
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipelines.flows.hooks import settings_of, tell_webhook
from pipelines.flows.steps import say, terminal, watch
from pipelines.locks import only_one
from pipelines.scoring.job import Job, Profile, Tally, finish, plan, profile_shard, require_plausible, score_shard
from pipelines.scoring.scorers import GATEWAY, ScorerUnavailable, count_classes, spec_of
from pipelines.task_runners import TaskRunnerOfSettings
from pipelines.text import duration


class Scored(NamedTuple):
    """A finished job."""

    output: Path
    tally: Tally
    new_rows: int
    """Rows scored by this run; the others were there from one that was cut off."""
    duration_s: float


def _worth_another_try(_task: Any, _run: Any, state: State) -> bool:
    try:
        state.result()
    except ScorerUnavailable:
        return True
    except Exception:  # noqa: BLE001  # any other failure is final
        return False
    return False


@task(name="look at shard", task_run_name="look at shard {shard}", cache_policy=NO_CACHE)
def look_at(folder: str, shard: int) -> Profile:
    """What a shard holds."""
    return profile_shard(Path(folder), shard)


@task(
    name="score shard",
    task_run_name="score shard {shard}",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[5, 15, 45],
    retry_condition_fn=_worth_another_try,
)
def score_one(folder: str, shard: int) -> int:
    """One shard's part file; the number of its rows."""
    return score_shard(Path(folder), shard)


@flow(
    name="score",
    task_runner=TaskRunnerOfSettings(),
    validate_parameters=False,
    on_failure=[tell_webhook],
    on_crashed=[tell_webhook],
)
def score(
    source: str,
    output: str,
    through: str = GATEWAY,
    where: str | None = None,
    probabilities: bool = False,
    overwrite: bool = False,
    shard_rows: int | None = None,
    project: str | None = None,
    watched: bool = False,
) -> Scored:
    """One row out for each row in. Run again after it was cut off, it goes on where it was.

    Args:
        source: a folder of pictures, or an IDX, IDX .gz, .npy or .npz file of images.
        output: the .csv or .jsonl to make.
        through: ``gateway``, or ``model`` for the SavedModel in the tasks' own processes.
        where: the gateway's address or the SavedModel's folder; this machine's, or the promoted version, when None.
        probabilities: also a column for each class's.
        overwrite: replace a finished output.
        shard_rows: rows of a shard.
        project: the repository's folder; the current one when None.
        watched: someone is looking on: show steps and progress on stderr, besides the log.
    """
    started = time.monotonic()
    settings, target = settings_of(project), Path(output).absolute()
    watch(watched)
    spec = spec_of(settings, through, where)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = f"score-{hashlib.sha256(str(target).encode()).hexdigest()[:12]}.lock"
    with only_one(settings.run_dir / lock, f"scoring into {target.name}"), _bar() as show:
        job = plan(
            Path(source).absolute(), target, spec, probabilities=probabilities, overwrite=overwrite,
            shard_rows=shard_rows, on_unpacked=lambda done, total: show("unpacking", done, total),
        )  # fmt: skip
        missing = job.missing()
        todo = sum(stop - start for start, stop in map(job.bounds, missing))
        kept = f", {job.rows - todo:,} of them scored before" if todo < job.rows else ""
        say(f"▸ score       {job.rows:,} rows in {len(job.shards):,} shards{kept}; through {spec.through} {spec.where}")
        class_count = count_classes(spec)
        _look(job, missing, show)
        _score(job, missing, todo, show)
        tally = finish(job, target, class_count)
    done = Scored(target, tally, todo, time.monotonic() - started)
    say(f"✓ score       {tally.rows:,} rows, {tally.failed:,} without an answer, in {duration(done.duration_s)}")
    create_markdown_artifact(key="scores", markdown=_markdown(done), description=f"{tally.rows:,} rows")
    return done


def _look(job: Job, missing: list[int], show: Callable[[str, int, int], None]) -> None:
    if job.is_of_pictures:  # their polarity is settled picture by picture
        return
    futures = [look_at.submit(str(job.folder), shard) for shard in missing]
    profiles = []
    for future in as_completed(futures):
        profiles.append(future.result())
        show("looking", sum(one.rows for one in profiles), job.rows)
    require_plausible(profiles)


def _score(job: Job, missing: list[int], todo: int, show: Callable[[str, int, int], None]) -> None:
    done = 0
    show("scoring", 0, todo)
    futures = [score_one.submit(str(job.folder), shard) for shard in missing]
    try:
        for future in as_completed(futures):
            done += future.result()
            show("scoring", done, todo)
    except BaseException:  # one that failed for good ends the job: those that have not begun need not fail too
        for future in futures:
            future.wrapped_future.cancel()
        raise


class _Rate(ProgressColumn):
    """Rows a second, over the last seconds."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (terminal() and console.is_terminal)) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield show


def _markdown(done: Scored) -> str:
    tally = done.tally
    facts = {
        "file": f"`{done.output}`",
        "rows": f"{tally.rows:,}",
        "without an answer": f"{tally.failed:,}",
        "scored by this run": f"{done.new_rows:,} in {duration(done.duration_s)}",
        "model version": ", ".join(tally.versions) or "none",
        "mean confidence": f"{tally.mean_confidence:.4f}",
        **{f"read as {digit}": f"{count:,}" for digit, count in enumerate(tally.by_digit)},
    }
    return "\n".join(["| what | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())])
