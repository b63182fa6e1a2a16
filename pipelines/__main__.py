"""The pipelines' command line: ``python -m pipelines --help``."""

import gc
import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from digits.errors import DigitsError
from pipelines.exit_codes import Exit
from pipelines.locks import Busy
from pipelines.settings import BadSettings, read_settings

if TYPE_CHECKING:
    from pipelines.additions import Added
    from pipelines.promotion import Promotion

app = typer.Typer(
    help="Get the data, build and judge a candidate, publish it, serve it. Settings: environment variables DIGITS_*. "
    "Exit codes: 0 done; 1 failed, with one line that says why; 2 wrong usage; 3 the gate rejected the candidate; "
    "4 a version built again is not the same; 5 another one is at work; 130 stopped on request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for machines.")]
ProfileOption = Annotated[
    str | None, typer.Option(help="Choose this profile in params.yaml first, such as full. Default: what stands there.")
]
Note = Annotated[str, typer.Option(help="Why, for the ledger.")]
VersionNumber = Annotated[int, typer.Argument(min=0, help="The number of a published version.")]


class Through(StrEnum):
    """Who answers a scoring job."""

    GATEWAY = "gateway"
    MODEL = "model"


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
    as_json: Json = False,
) -> None:
    """Get the raw data into data/, verified by SHA-256, and into the DVC cache. A damaged file is fetched again.

    With --add: what is in training or test already, nearly a test image, blank or unreadable is refused, row by row;
    the rest makes a new data version, told in data-changelog.yaml. docs/data.md says more.
    """
    settings = read_settings()
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
def release(profile: ProfileOption = None, as_json: Json = False) -> None:
    """Data to published version: ingest, the DVC stages, the gate, publish. Does only what is not up to date.

    Exit code 0: published, now or before. 3: the gate rejected the candidate, the served version stays. 5: another
    release is at work. 1: failed.
    """
    from pipelines.release import release as run_release

    raise typer.Exit(run_release(read_settings(), profile=profile, as_json=as_json))


@app.command()
def publish() -> None:
    """Publish the candidate under artifacts/ as the next version, if the gate approved it. Part of release."""
    from pipelines import recovery
    from pipelines.publish import publish as run_publish

    settings = read_settings()
    recovery.complete(settings, tell=_tell)
    done = run_publish(settings, tell=_tell)
    print(f"version {done.version.number} {'published' if done.new else 'holds these weights already'}")


@app.command()
def history(
    limit: Annotated[int, typer.Option(min=1, help="Only the newest so many decisions.")] = 20,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Only release, rejection, promotion, rollback, prune or reproduction; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What was decided, when and by whom: the ledger's newest rows."""
    from pipelines import ledger, recovery
    from pipelines.history import print_history
    from pipelines.text import print_json

    try:
        kinds = [ledger.Kind(name) for name in kind or ()]
    except ValueError as err:
        raise typer.BadParameter(f"{err}; expected one of: {', '.join(ledger.Kind)}", param_hint="--kind") from err
    settings = read_settings()
    recovery.complete(settings, tell=_tell)
    entries = ledger.read(settings, kinds=kinds, limit=limit)
    if as_json:
        print_json([entry.as_json() for entry in entries])
    else:
        print_history(settings, entries, shortened=len(entries) == limit)


@app.command()
def show(version: VersionNumber, as_json: Json = False) -> None:
    """Where a version comes from: data, commit, parameters, metrics, the gate's words, and all decisions about it.

    VERSION is what a served answer has as its model_version.
    """
    from pipelines.history import account_of, print_account
    from pipelines.text import print_json

    account = account_of(read_settings(), version, tell=_tell)
    if as_json:
        print_json(account.as_json())
    else:
        print_account(account)


@app.command()
def promote(version: VersionNumber, note: Note = "", as_json: Json = False) -> None:
    """Serve a published version by default, and keep the one before it loaded. Part of release."""
    from pipelines import recovery
    from pipelines.promotion import promote as run_promote

    settings = read_settings()
    _report(run_promote(settings, version, note=note, tell=_tell), as_json)
    recovery.complete(settings, tell=_tell)


@app.command()
def rollback(
    to: Annotated[int | None, typer.Option(min=0, help="The version to serve; default: the one served before.")] = None,
    note: Note = "",
    as_json: Json = False,
) -> None:
    """Serve a lower version again, within seconds. What is left behind is promoted again only by hand."""
    from pipelines import recovery
    from pipelines.promotion import rollback as run_rollback

    settings = read_settings()
    _report(run_rollback(settings, to, note=note, tell=_tell), as_json)
    recovery.complete(settings, tell=_tell)


@app.command()
def reproduce(version: VersionNumber, as_json: Json = False) -> None:
    """Build a version again from its commit, data and parameters, and compare the weights. Takes as long as a release.

    Nothing of the project is touched. Exit code 0: identical. 4: not identical; where they part is said.
    """
    from pipelines.reproduce import reproduce as run_reproduce
    from pipelines.text import print_json

    done = run_reproduce(read_settings(), version, tell=_tell, terminal=sys.stderr)
    if as_json:
        print_json(asdict(done))
    else:
        print(done.summary)
    raise typer.Exit(Exit.DONE if done.identical else Exit.DIFFERS)


@app.command()
def prune(
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions to keep.")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove old versions; never the served one, its predecessor, the champion or the newest."""
    from pipelines.prune import prune as run_prune
    from pipelines.text import print_json

    done = run_prune(read_settings(), keep, dry_run=dry_run, tell=_tell)
    if as_json:
        print_json({"removed": done.removed, "kept": done.kept, "dry_run": dry_run})
        return
    for number, reason in done.kept.items():
        print(f"kept     {number}  ({reason})")
    for number in done.removed:
        print(f"{'would go' if dry_run else 'removed '} {number}")


@app.command()
def score(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A folder of pictures, or an IDX, IDX .gz, .npy or .npz of images.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to make: .csv or .jsonl.")],
    through: Annotated[
        Through, typer.Option(help="Who answers: the running gateway, or the SavedModel in this process.")
    ] = Through.GATEWAY,
    where: Annotated[
        str | None,
        typer.Option(
            help="The gateway's address, or the model's folder. Default: the gateway here, or the served version."
        ),
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also a column for each class.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUTPUT, and an unfinished job with other settings.")
    ] = False,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of a shard: the piece that is scored, and lost by a kill, at once.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read the digit in each of many images: one row out for each row in, bad ones with their error.

    Cut off, the same command goes on where it was. DIGITS_TASK_RUNNER=dask spreads it over processes or machines.
    """
    from pipelines.scoring.command import score as run_score

    raise typer.Exit(
        run_score(
            read_settings(),
            source,
            output,
            through=through.value,
            where=where,
            probabilities=probabilities,
            overwrite=overwrite,
            shard_rows=shard_rows,
            as_json=as_json,
        )
    )


@app.command()
def maintain(
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions to keep.")] = 5,
    as_json: Json = False,
) -> None:
    """Back up the ledger, remove old versions, and what nothing refers to in DVC's cache. Not while a release works."""
    from pipelines.maintain import maintain as run_maintain

    raise typer.Exit(run_maintain(read_settings(), keep, as_json=as_json))


@app.command()
def restore(backup: Annotated[Path, typer.Argument(help="A file of run/backups/.")]) -> None:
    """Put the rows of a backup back into the ledger; those that are there stay as they are."""
    from pipelines.backup import restore as run_restore

    print(f"{run_restore(read_settings(), backup):,} rows are in the ledger")


@app.command()
def schedule(
    cron: Annotated[str, typer.Option(help="When, in cron's five fields, UTC.")] = "0 3 * * *",
    name: Annotated[str, typer.Option(help="Name of the Prefect deployment.")] = "scheduled",
    profile: ProfileOption = None,
) -> None:
    """Release at set times, one at a time, until stopped. For a lasting schedule set PREFECT_API_URL to a server."""
    from pipelines.schedule import schedule as run_schedule

    run_schedule(read_settings(), cron, name, profile)


@app.command(hidden=True)
def ensure_serving_config() -> None:
    """Write models.config where there is none, from what is published: what a container does before all else."""
    from pipelines import serving_config

    serving_config.ensure(read_settings())


@app.command(hidden=True)
def await_prefect() -> None:
    """Wait for the server that PREFECT_API_URL names, as a release does: what a container does before its worker."""
    from pipelines import prefect_server

    prefect_server.await_named(read_settings())


@app.command()
def run(
    skip_release: Annotated[
        bool, typer.Option("--skip-release", help="Serve what is published; build nothing.")
    ] = False,
) -> None:
    """Everything, in the foreground until Ctrl-C: release if anything changed, model server, gateway. `make run`."""
    from pipelines.run import run as run_all

    raise typer.Exit(run_all(read_settings(), skip_release=skip_release))


@app.command()
def metrics(
    port: Annotated[int, typer.Option(help="Port of /metrics.", min=1, max=65535)] = 9108,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """How releases go, for Prometheus: the ledger, Prefect's runs (PREFECT_API_URL), the disks. Changes nothing."""
    from pipelines.metrics import serve

    serve(read_settings(), host, port)


def _report(done: "Promotion", as_json: bool) -> None:
    """How a promotion or rollback ended."""
    if as_json:
        from pipelines.text import print_json

        print_json(asdict(done))
    elif done.new:
        before = "" if done.previous is None else f", in place of {done.previous}"
        how = {None: "", True: "; the model server says so too", False: "; the model server does not say so yet"}
        print(f"version {done.version} is served{before} ({done.duration_s:.1f} s{how[done.confirmed]})")
    else:
        print(f"version {done.version} is served already")


def main() -> None:
    """Run the command; an expected error is one line. See ``Exit`` for the exit codes."""
    gc.set_threshold(100_000)  # most of a short command is imports, and a tenth of those would be looking for garbage
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        sys.exit(app(standalone_mode=False))
    except TyperException as err:
        _tell(f"error: {err.format_message()}; --help says what is expected")
        sys.exit(Exit.USAGE)
    except DigitsError as err:
        _tell(f"error: {err}")
        sys.exit(_exit_code(err))
    finally:
        gc.freeze()  # nor is garbage of use to a process that ends


def _exit_code(err: DigitsError) -> Exit:
    if isinstance(err, BadSettings):
        return Exit.USAGE
    return Exit.BUSY if isinstance(err, Busy) else Exit.FAILED


if __name__ == "__main__":
    main()
