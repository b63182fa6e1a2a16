"""The release flow: get the data, run the DVC stages, publish what the gate approves, query it, promote it.

DVC owns what depends on what: the stages and their order are read from its graph, and each runs as ``dvc repro -s``. So
the flow and a bare ``dvc repro`` find each other's work done. Prefect owns retries, side effects and what people see.
"""

import contextlib
import time
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Completed, State

from pipelines import recovery, versioning
from pipelines import smoke as run_smoke
from pipelines.candidate import read_verdict, record_rejection
from pipelines.flows import artifacts, cancellation
from pipelines.flows.hooks import REFUSED, REJECTED, settings_of, tell_webhook
from pipelines.flows.steps import say, terminal, watch
from pipelines.ingest import Ingested
from pipelines.ingest import ingest as run_ingest
from pipelines.locks import RELEASE_LOCK, Busy, only_one
from pipelines.params_file import choose_profile
from pipelines.promotion import Promotion, is_withdrawn
from pipelines.promotion import promote as run_promote
from pipelines.publish import Published
from pipelines.publish import publish as run_publish
from pipelines.settings import Settings
from pipelines.stages import GATE, StageBusy, StageKilled, StageReport, Stages
from pipelines.stopping import never_lost
from pipelines.text import duration


def _worth_another_try(_task: Any, _run: Any, state: State) -> bool:
    try:
        state.result()
    except (StageBusy, StageKilled):
        return True
    except Exception:  # noqa: BLE001  # any other failure is final
        return False
    return False


@task(name="ingest", task_run_name="ingest", cache_policy=NO_CACHE)
def ingest(settings: Settings) -> Ingested:
    """Raw data in place and verified. A changed file stops the release: it is for a person to say what to do."""
    done = run_ingest(settings, repair=False, tell=say)
    say(f"✓ ingest      {done.source}, data.dvc {done.data_hash}")
    return done


@task(
    name="stage",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[5, 15, 45],
    retry_condition_fn=_worth_another_try,
)
def run_stage(settings: Settings, stages: Stages, name: str) -> StageReport:
    """One stage of dvc.yaml, brought up to date."""
    report = stages.bring_up_to_date(name, on_start=lambda: say(f"▸ {name}"), on_line=get_run_logger().info)
    say(f"✓ {name:<11} {duration(report.duration_s)}" if report.ran else f"– {name:<11} up to date")
    if report.ran:
        artifacts.show_stage(settings, name)
    return report


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE)
def publish(settings: Settings) -> Published:
    """The approved candidate as a served version."""
    started = time.monotonic()
    say("▸ publish")
    done = run_publish(settings, tell=get_run_logger().info)
    number = done.version.number
    say(
        f"✓ publish     version {number} in {duration(time.monotonic() - started)}"
        if done.new
        else f"– publish     version {number} holds these weights already"
    )
    if done.new:
        artifacts.show_published(done)
    return done


@task(name="smoke", task_run_name="smoke", cache_policy=NO_CACHE)
def smoke(settings: Settings, published: Published, loaded: bool) -> None:
    """A real query to this very version: through the model server that has it loaded, else in a fresh process."""
    version = published.version
    if loaded:
        count = run_smoke.ask_model_server(settings, version)
        say(f"✓ smoke       the model server answers {count} images with version {version.number} as it was trained to")
    elif published.new:
        say("– smoke       no model server answers; a fresh process was asked when this version was published")
    else:
        run_smoke.ask_fresh_process(settings, version, get_run_logger().info)
        say(f"✓ smoke       a fresh process answers with version {version.number} as it was trained to")


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE)
def promote(settings: Settings, published: Published) -> Promotion | None:
    """The published version served by default. None when a person rolled it back: only a person promotes it again."""
    number = published.version.number
    if is_withdrawn(settings, number):
        say(f"– promote     version {number} was rolled back; to serve it again: python -m pipelines promote {number}")
        return None
    done = run_promote(settings, number, tell=say, check=lambda loaded: smoke(settings, published, loaded))
    say(
        f"✓ promote     version {number} is served, {duration(done.duration_s)} after the call"
        if done.new
        else f"– promote     version {number} is served already"
    )
    return done


@flow(
    name="release",
    validate_parameters=False,
    on_completion=[tell_webhook],
    on_failure=[tell_webhook],
    on_crashed=[tell_webhook],
    on_cancellation=[tell_webhook],
)
def release(project: str | None = None, watched: bool = False, profile: str | None = None) -> Any:
    """Data to published version, doing only what is not up to date.

    Args:
        project: the repository's folder; the current one when None.
        watched: someone is looking on: show steps, the stages' output and progress bars on stderr, besides the log.
        profile: chosen in params.yaml first, such as ``full``; what stands there when None.

    Returns:
        ``Published``; or a state that says why nothing was published, and the served version stays: ``Rejected`` when
        the gate did not approve, ``Refused`` when another release is at work, ``Cancelled`` when someone stopped it.
    """
    settings = settings_of(project)
    watch(watched)
    with contextlib.ExitStack() as held:
        held.enter_context(never_lost(KeyboardInterrupt, TerminationSignal))
        try:
            held.enter_context(only_one(settings.run_dir / RELEASE_LOCK, "release"))
        except Busy as err:
            say(f"✗ refused     {err}")
            return Cancelled(name=REFUSED, message=str(err))
        stages = held.enter_context(Stages(settings, terminal()))
        if not watched:  # a worker's run: the worker says how a cancelled one ends
            return _release(settings, stages, profile)
        try:
            with cancellation.heeded():
                return _release(settings, stages, profile)
        except (KeyboardInterrupt, TerminationSignal):
            say("✗ cancelled   the served version stays; the next release goes on from here")
            return Cancelled(message="stopped on request")


def _release(settings: Settings, stages: Stages, profile: str | None) -> Published | State:
    for completed in recovery.complete(settings, tell=say):  # an earlier run was cut off
        say(f"✓ {completed}")
    if profile:  # after the recovery, which may put a whole params.yaml in place
        choose_profile(settings, profile, tell=say)
    timed = {"timeout_seconds": settings.step_timeout_s}
    ingest.with_options(**timed)(settings)
    names = [stage.name for stage in versioning.stages_in_order(settings)]
    with contextlib.suppress(StageBusy):  # asked again, and waited for, stage by stage
        stages.look_ahead(names)
    found_done = []
    for name in names:
        if not run_stage(settings, stages, name).ran:
            found_done.append(name)
        if name == GATE and not (verdict := read_verdict(settings)).approved:
            say(f"✗ rejected    {verdict.reason}")
            record_rejection(settings, verdict, tell=say)
            if GATE in found_done:
                artifacts.show_stage(settings, GATE)
            return Completed(name=REJECTED, message=verdict.reason)
    done = publish.with_options(**timed)(settings)
    if done.new:  # what others built, as `dvc repro` did, is shown with the version that came of it
        for name in found_done:
            artifacts.show_stage(settings, name)
    promotion = promote.with_options(**timed)(settings, done)
    if done.new or (promotion and promotion.new):
        # The champion is a new one now: judge again, so that DVC finds the decision up to date.
        run_stage.with_options(task_run_name=f"{GATE} again")(settings, stages, GATE)
    return done
