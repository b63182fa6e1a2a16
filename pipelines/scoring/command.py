"""``python -m pipelines score``: the scoring flow, with its own Prefect server if there is no other."""

from pathlib import Path

from pipelines import prefect_server
from pipelines.exit_codes import Exit
from pipelines.flow_run import FlowRun
from pipelines.scoring.scorers import spec_of
from pipelines.settings import Settings
from pipelines.text import print_json


def score(
    settings: Settings,
    source: Path,
    output: Path,
    *,
    through: str,
    where: str | None,
    probabilities: bool,
    overwrite: bool,
    shard_rows: int | None,
    as_json: bool,
) -> Exit:
    """Run the flow; print the outcome; return the exit code.

    Raises:
        DigitsError: what stopped it. What was scored is kept; the same command goes on.
    """
    spec_of(settings, through, where)  # a model that is not there is said before a server is started
    prefect_server.prepare_environment(settings)
    with prefect_server.server(settings):
        from pipelines.flows.score import score as flow  # takes seconds, meanwhile the server starts

        prefect_server.wait_until_ready(settings)
        run = FlowRun(
            flow, str(source.absolute()), str(output.absolute()), through=through, where=where,
            probabilities=probabilities, overwrite=overwrite, shard_rows=shard_rows, project=str(settings.project),
            watched=True,
        )  # fmt: skip
        done = run.result()
    tally = done.tally
    rate = done.new_rows / max(done.duration_s, 1e-9)
    if as_json:
        print_json(
            {"output": str(done.output), "rows": tally.rows, "failed": tally.failed, "by_digit": tally.by_digit,
             "versions": tally.versions, "rows_by_this_run": done.new_rows, "rows_per_s": round(rate)}
        )  # fmt: skip
    else:
        answers = f"{tally.rows:,} rows, {tally.failed:,} of them without an answer"
        print(f"{done.output}: {answers}; {rate:,.0f} rows/s")  # noqa: T201  # the command's answer
    return Exit.DONE
