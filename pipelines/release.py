"""``python -m pipelines release``: the release flow, with its own Prefect server if there is no other."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pipelines import prefect_server
from pipelines.candidate import Verdict, read_verdict
from pipelines.exit_codes import Exit
from pipelines.flow_run import FlowRun
from pipelines.locks import RELEASE_LOCK, Busy, only_one
from pipelines.settings import Settings
from pipelines.text import print_json

if TYPE_CHECKING:
    from pipelines.publish import Published


def release(settings: Settings, *, profile: str | None = None, as_json: bool = False) -> Exit:
    """Run the flow; print the outcome, as one JSON object if so wished; return the exit code.

    Raises:
        Busy: another release is at work.
        DigitsError: what stopped the flow.
    """
    refuse_while_busy(settings, "release")
    prefect_server.prepare_environment(settings)
    with prefect_server.server(settings):
        from pipelines.flows.hooks import REJECTED  # takes seconds, meanwhile the server starts
        from pipelines.flows.release import release as flow

        prefect_server.wait_until_ready(settings)
        run = FlowRun(flow, str(settings.project), watched=True, profile=profile)
        state = run.state
        if state.name == REJECTED:
            verdict = read_verdict(settings)
            if as_json:
                print_json({"outcome": "rejected", "reason": verdict.reason, "checks": verdict.checks})
            else:
                print_verdict(verdict)
            return Exit.REJECTED
        if state.is_cancelled():
            return stopped(state)
        _print_published(run.result(), as_json)
        return Exit.DONE


def refuse_while_busy(settings: Settings, what: str) -> None:
    """Raise ``Busy`` when a release or a maintenance is at work; the flow asks again, but that takes seconds."""
    with only_one(settings.run_dir / RELEASE_LOCK, what):
        pass


def stopped(state: Any) -> Exit:
    """The exit code of a flow that ended as cancelled. Raises ``Busy`` when that was because of another one."""
    from pipelines.flows.hooks import REFUSED

    if state.name == REFUSED:
        raise Busy(state.message)
    return Exit.STOPPED


def _print_published(done: "Published", as_json: bool) -> None:
    version = done.version
    outcome = "published" if done.new else "already published"
    metrics = version.lineage.get("metrics") or {}
    if as_json:
        facts = {"version": version.number, "folder": str(version.folder), "model_sha256": version.model_sha256}
        print_json({"outcome": outcome, **facts, "metrics": metrics})
        return
    accuracy = metrics.get("accuracy")
    with_accuracy = f", {accuracy:.2%} of the test images right" if isinstance(accuracy, float) else ""
    Console().print(f"version {version.number} {outcome}: {version.folder}{with_accuracy}", soft_wrap=True)


def print_verdict(verdict: Verdict) -> None:
    """The gate's rows as a table."""
    table = Table(title=f"The gate: {'accepted' if verdict.approved else 'rejected'}", title_justify="left")
    for column in ("", "check", "value", "limit", "detail"):
        table.add_column(column)
    for check in verdict.checks:
        mark = "[green]✓[/]" if check.get("passed") else "[red]✗[/]"
        table.add_row(mark, *(_cell(check.get(name)) for name in ("name", "value", "limit", "detail")))
    console = Console()
    console.print(table)
    console.print(f"{verdict.reason}; the served version stays", soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
