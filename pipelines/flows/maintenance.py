"""The maintenance flow: back the ledger up, remove old versions, and what nothing refers to in DVC's cache."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled, State

from pipelines import backup, versioning
from pipelines.flows.hooks import REFUSED, settings_of, tell_webhook
from pipelines.flows.steps import say, watch
from pipelines.locks import RELEASE_LOCK, Busy, only_one
from pipelines.prune import Pruned
from pipelines.prune import prune as run_prune
from pipelines.settings import Settings
from pipelines.text import size
from pipelines.versions import read_version, version_numbers


@dataclass(frozen=True)
class Maintained:
    """What a maintenance did."""

    backup: Path
    backup_rows: int
    removed_versions: tuple[int, ...]
    kept_versions: dict[int, str]
    removed_objects: int
    freed_bytes: int

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "backup": str(self.backup)}


@task(name="back up", task_run_name="back up", cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[5, 30, 120])
def back_up(settings: Settings) -> tuple[Path, int]:
    """Every row of the ledger into a file."""
    path, rows = backup.back_up(settings)
    say(f"✓ backup      {rows:,} rows of the ledger in {path}")
    return path, rows


@task(name="prune", task_run_name="prune", cache_policy=NO_CACHE)
def prune(settings: Settings, keep: int) -> Pruned:
    """Old versions away; never one that is served or that one would go back to."""
    done = run_prune(settings, keep, tell=say)
    if done.removed:
        say(f"✓ prune       removed {', '.join(map(str, done.removed))}")
    else:
        say(f"– prune       nothing to remove; {len(done.kept)} versions")
    return done


@task(name="gc", task_run_name="gc", cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[5, 30, 120])
def collect_garbage(settings: Settings) -> versioning.Collected:
    """What nothing refers to, out of DVC's cache: the workspace, commits and published versions do."""
    store = settings.versions_dir
    needed = {str(read_version(store / str(number)).lineage.get("data_md5")) for number in version_numbers(store)}
    done = versioning.collect_garbage(settings, needed)
    say(f"✓ gc          {done.objects:,} objects, {size(done.freed_bytes)} freed in DVC's cache")
    return done


@flow(
    name="maintenance",
    validate_parameters=False,
    on_failure=[tell_webhook],
    on_crashed=[tell_webhook],
    on_cancellation=[tell_webhook],
)
def maintenance(project: str | None = None, keep: int = 5, watched: bool = False) -> Maintained | State:
    """Back up the ledger, remove old versions, and what nothing refers to any more. Not while a release is at work.

    Args:
        project: the repository's folder; the current one when None.
        keep: how many of the newest versions stay in any case.
        watched: someone is looking on: show steps on stderr, besides the log.

    Returns:
        ``Maintained``; or the state ``Refused`` when a release is at work.
    """
    settings = settings_of(project)
    watch(watched)
    timed = {"timeout_seconds": settings.step_timeout_s}
    try:
        with only_one(settings.run_dir / RELEASE_LOCK, "release or maintenance"):
            path, rows = back_up.with_options(**timed)(settings)
            pruned = prune.with_options(**timed)(settings, keep)
            collected = collect_garbage.with_options(**timed)(settings)
    except Busy as err:
        say(f"✗ refused     {err}")
        return Cancelled(name=REFUSED, message=str(err))
    done = Maintained(path, rows, pruned.removed, pruned.kept, collected.objects, collected.freed_bytes)
    facts = "\n".join(f"| {name.replace('_', ' ')} | `{value}` |" for name, value in done.as_json().items())
    create_markdown_artifact(key="maintenance", markdown=f"| what | value |\n| --- | --- |\n{facts}")
    return done
