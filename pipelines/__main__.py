"""The pipelines' command line: ``python -m pipelines --help``."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from digits.errors import DigitsError
from pipelines.exit_codes import Exit
from pipelines.locks import Busy
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pipelines.additions import Added

app = typer.Typer(
    help="Get the data, build and judge a candidate, publish it, serve it. Settings: environment variables DIGITS_*.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for machines.")]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@app.command()
def ingest(
    add: Annotated[
        Path | None,
        typer.Option(
            "--add",
            metavar="FOLDER",
            help="Add a labelled batch to the training images: an IDX pair, an .npz, or a folder of pictures a digit.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --add: only say what would be added.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The outcome as one JSON object.")] = False,
) -> None:
    """Get the raw data into data/, verified by SHA-256, and into the DVC cache. A damaged file is fetched again.

    With --add: what is in training or test already, nearly a test image, blank or unreadable is refused, row by row;
    the rest makes a new data version, told in data-changelog.yaml. docs/data.md says more.
    """
    settings = Settings()
    if add is None:
        from pipelines.ingest import ingest as run_ingest

        done = run_ingest(settings, tell=_tell)
        if as_json:
            print(json.dumps({"source": done.source, "data": done.data_hash, "repaired": list(done.repaired)}))
        else:
            print(f"data/ is as recorded; source: {done.source}; data.dvc: {done.data_hash}")
        return
    from pipelines.ingest import add_batch

    print(_describe_addition(add_batch(settings, add, dry_run=dry_run, tell=_tell), dry_run, as_json))


def _describe_addition(done: "Added", dry_run: bool, as_json: bool) -> str:
    from pipelines.additions import CHANGELOG, REFUSED

    if as_json:
        facts = {
            "added": done.added, "refused": done.reasons, "train_images": done.train_images,
            "data": done.data_hash, "was": done.was,
        }  # fmt: skip
        return json.dumps(facts)
    lines = [f"{done.source}: {done.added:,} {'would be added' if dry_run else 'added'}, {len(done.refused):,} refused"]
    lines += [f"  {count:>7,} {reason}" for reason, count in done.reasons.items()]
    if done.refused:
        lines.append(f"each refused row, with its reason: run/{REFUSED}")
    if done.added and not dry_run:
        lines.append(f"data.dvc: {done.data_hash} (was {done.was}); {done.train_images:,} training images")
        lines.append(f"to keep this version: git add data.dvc params.yaml {CHANGELOG}; git commit; dvc push")
    return "\n".join(lines)


@app.command()
def release(as_json: Json = False) -> None:
    """Data to published version: ingest, the DVC stages, the gate, publish. Does only what is not up to date.

    Exit code 0: published, now or before. 3: the gate rejected the candidate, the served version stays. 5: another
    release is at work. 1: failed.
    """
    from pipelines.release import release as run_release

    raise typer.Exit(run_release(Settings(), as_json=as_json))


@app.command()
def publish() -> None:
    """Publish the candidate under artifacts/ as the next version, if the gate approved it. Part of release."""
    from pipelines.publish import publish as run_publish

    done = run_publish(Settings())
    print(f"version {done.version.number} {'published' if done.new else 'holds these weights already'}")


@app.command()
def schedule(
    cron: Annotated[str, typer.Option(help="When, in cron's five fields, UTC.")] = "0 3 * * *",
    name: Annotated[str, typer.Option(help="Name of the Prefect deployment.")] = "scheduled",
) -> None:
    """Release at set times, one at a time, until stopped. For a lasting schedule set PREFECT_API_URL to a server."""
    from pipelines.schedule import schedule as run_schedule

    run_schedule(Settings(), cron, name)


@app.command()
def run(
    skip_release: Annotated[
        bool, typer.Option("--skip-release", help="Serve what is published; build nothing.")
    ] = False,
) -> None:
    """Everything, in the foreground until Ctrl-C: release if anything changed, model server, gateway. `make run`."""
    from pipelines.run import run as run_all

    raise typer.Exit(run_all(Settings(), skip_release=skip_release))


def main() -> None:
    """Run the command; an expected error is one line. See ``Exit`` for the exit codes."""
    try:
        app()
    except DigitsError as err:
        _tell(f"error: {err}")
        sys.exit(Exit.BUSY if isinstance(err, Busy) else Exit.FAILED)


if __name__ == "__main__":
    main()
