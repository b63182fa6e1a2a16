"""``python -m pipelines release``: the release flow, with its own Prefect server if there is no other."""

from typing import Any

from rich.console import Console
from rich.table import Table

from digits.errors import DigitsError
from pipelines import prefect_server
from pipelines.candidate import Verdict, read_verdict
from pipelines.locks import only_one
from pipelines.settings import Settings

EXIT_REJECTED = 3
"""Exit code of a release whose candidate the gate rejected: nothing is broken, and nothing was published."""


class ReleaseFailed(DigitsError):
    """The flow ended in a failure that is not one of ours."""

    code = "release_failed"


def release(settings: Settings) -> int:
    """Run the flow; print the outcome; return the exit code (0, or ``EXIT_REJECTED``).

    Raises:
        DigitsError: what stopped the flow.
    """
    with only_one(settings.run_dir / "release.lock", "release"):
        pass  # the flow holds it; asked here so that a second release is refused before a server is started for it
    prefect_server.prepare_environment(settings)
    with prefect_server.server(settings):
        from pipelines.flows.hooks import REJECTED  # takes seconds, meanwhile the server starts
        from pipelines.flows.release import release as flow

        prefect_server.wait_until_ready(settings)
        state = flow(str(settings.project), watched=True, return_state=True)
        if state.name == REJECTED:
            print_verdict(read_verdict(settings))
            return EXIT_REJECTED
        done = _result(state)
        version = done.version
        accuracy = (version.lineage.get("metrics") or {}).get("accuracy")
        with_accuracy = f", {accuracy:.2%} of the test images right" if isinstance(accuracy, float) else ""
        outcome = "published" if done.new else "already published"
        Console().print(f"version {version.number} {outcome}: {version.folder}{with_accuracy}", soft_wrap=True)
        return 0


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


def _result(state: Any) -> Any:
    """The flow's result, or the error of ours that stopped it."""
    try:
        return state.result()
    except DigitsError:
        raise
    except Exception as err:
        raise ReleaseFailed(f"the release ended as {state.name}: {' '.join(str(err).split())}") from err
