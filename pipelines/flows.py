"""The release flow: get the data, run the DVC stages, publish what the gate approves.

DVC owns what depends on what: the stages and their order are read from its graph, and each runs as ``dvc repro -s``. So
the flow and a bare ``dvc repro`` find each other's work done. Prefect owns retries, side effects and what people see.
"""

import sys
import time
from pathlib import Path
from typing import Any, TextIO

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from digits import contract
from pipelines import versioning
from pipelines.candidate import Verdict, read_verdict
from pipelines.ingest import Ingested
from pipelines.ingest import ingest as run_ingest
from pipelines.locks import only_one
from pipelines.publish import Published, record_champion
from pipelines.publish import publish as run_publish
from pipelines.settings import Settings
from pipelines.stages import GATE, StageBusy, StageKilled, StageReport
from pipelines.stages import run_stage as run_dvc_stage
from pipelines.text import duration, flat

REJECTED = "Rejected"
"""Name of the flow's final state when the gate did not approve: an answer, not a failure."""

RELEASE_LOCK = "release.lock"
"""In the run folder: one release at a time."""


def _worth_another_try(_task: Any, _run: Any, state: State) -> bool:
    try:
        state.result()
    except (StageBusy, StageKilled):
        return True
    except Exception:  # noqa: BLE001  # any other failure is final
        return False
    return False


@task(name="ingest", cache_policy=NO_CACHE)
def ingest(settings: Settings) -> Ingested:
    """Raw data in place and verified. A changed file stops the release: it is for a person to say what to do."""
    done = run_ingest(settings, repair=False, tell=_say)
    _say(f"✓ ingest      {done.source}, data.dvc {done.data_hash}")
    return done


@task(
    name="stage",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[5, 15, 45],
    retry_condition_fn=_worth_another_try,
)
def run_stage(settings: Settings, name: str) -> StageReport:
    """One stage of dvc.yaml, brought up to date."""
    report = run_dvc_stage(
        settings, name, on_start=lambda: _say(f"▸ {name}"), on_line=get_run_logger().info, terminal=_terminal()
    )
    _say(f"✓ {name:<11} {duration(report.duration_s)}" if report.ran else f"– {name:<11} up to date")
    _publish_artifacts(settings, name)
    return report


@task(name="publish", cache_policy=NO_CACHE)
def publish(settings: Settings) -> Published:
    """The approved candidate as a served version."""
    started = time.monotonic()
    _say("▸ publish")
    done = run_publish(settings, tell=get_run_logger().info)
    number = done.version.number
    _say(
        f"✓ publish     version {number} in {duration(time.monotonic() - started)}"
        if done.new
        else f"– publish     version {number} holds these weights already"
    )
    lineage_file = done.version.folder / contract.LINEAGE_FILE
    create_link_artifact(key="lineage", link=lineage_file.as_uri(), link_text=f"lineage of version {number}")
    create_markdown_artifact(key="published", markdown=_lineage_markdown(done), description=f"version {number}")
    return done


@flow(name="release", validate_parameters=False)
def release(project: str | None = None, watched: bool = False) -> Any:
    """Data to published version, doing only what is not up to date.

    Args:
        project: the repository's folder; the current one when None.
        watched: someone is looking on: show steps, the stages' output and progress bars on stderr, besides the log.

    Returns:
        ``Published``; or the state ``Rejected`` when the gate did not approve, in which case nothing was exported or
        published and the served version stays.
    """
    settings = Settings(project=Path(project)) if project else Settings()
    _Watched.on = watched
    with only_one(settings.run_dir / RELEASE_LOCK, "release"):
        if record_champion(settings):  # an earlier run was cut off between its last two steps
            _say("✓ the champion's record was missing or old: completed")
        ingest(settings)
        for stage in versioning.stages_in_order(settings):
            run_stage(settings, stage.name)
            if stage.name == GATE and not (verdict := read_verdict(settings)).approved:
                _say(f"✗ rejected    {verdict.reason}")
                return Completed(name=REJECTED, message=verdict.reason)
        done = publish(settings)
        if done.new:
            # The champion is a new one now: judge again, so that DVC finds the decision up to date.
            run_stage.with_options(task_run_name=f"{GATE} again")(settings, GATE)
        return done


class _Watched:
    """Whether someone looks on, in this process."""

    on = False


def _terminal() -> TextIO | None:
    """Where a person watches; None when nobody does, since the log shows every line already."""
    return sys.stderr if _Watched.on else None


def _say(text: str) -> None:
    terminal = _terminal()
    if terminal is not None:
        terminal.write(text + "\n")
        terminal.flush()
    get_run_logger().info(text)


def _publish_artifacts(settings: Settings, stage: str) -> None:
    """What people look at in Prefect's UI after a stage."""
    if stage == "evaluate":
        metrics = read_metrics(settings)
        create_table_artifact(key="metrics", table=metrics, description="The candidate on the test images")
    if stage == GATE:
        create_markdown_artifact(key="decision", markdown=_decision_markdown(read_verdict(settings)))


def read_metrics(settings: Settings) -> list[dict[str, Any]]:
    """The candidate's metrics as rows: metric, value."""
    import json

    path = settings.artifacts_dir / "evaluate" / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [{"metric": name, "value": value} for name, value in flat(metrics) if isinstance(value, int | float | str)]


def _decision_markdown(verdict: Verdict) -> str:
    word = "accepted" if verdict.approved else "**rejected**"
    rows = [
        f"| {'✓' if check.get('passed') else '✗'} | {check.get('name')} | {check.get('value')} | {check.get('limit')} "
        f"| {check.get('detail', '')} |"
        for check in verdict.checks
    ]
    head = ["|  | check | value | limit | detail |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([f"Candidate `{verdict.model_sha256[:12]}` {word}: {verdict.reason}", "", *head, *rows])


def _lineage_markdown(done: Published) -> str:
    lineage = done.version.lineage
    git = lineage.get("git") or {}
    facts = {
        "version": done.version.number,
        "published at": lineage.get("published_at"),
        "weights (SHA-256)": lineage.get("model_sha256"),
        "commit": f"{git.get('commit')}{' with changes' if git.get('dirty') else ''}",
        "data (data.dvc)": lineage.get("data_md5"),
        "params.yaml (SHA-256)": lineage.get("params_sha256"),
        "folder": done.version.folder,
    }
    return "\n".join(
        ["| what | value |", "| --- | --- |", *(f"| {name} | `{value}` |" for name, value in facts.items())]
    )
