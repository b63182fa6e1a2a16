"""The stages as commands: `python -m training STAGE`. `dvc repro` runs them in order and only when needed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from digits.errors import DigitsError
from training.params import Params, change_params, load_params
from training.workspace import Workspace, import_tensorflow_quietly

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""The stages that make a model out of the raw data, in this order:
    **validate → prepare → train → twin → evaluate → probe → gate → export**.

    Each reads `params.yaml` and the stages before it, and writes only below `artifacts/STAGE/`. Usually you do not run
    them one by one: `dvc repro` runs whichever are out of date, `dvc metrics show` and `dvc plots show` tell what came
    out, and `dvc exp run -S train.learning_rate=0.002` tries another value.""",
)


@app.callback()
def _root(
    context: typer.Context,
    root: Annotated[
        Path,
        typer.Option(
            envvar="DIGITS_ROOT", help="The checkout to work in: where params.yaml, data/ and artifacts/ are."
        ),
    ] = Path(),
) -> None:
    context.obj = Workspace(root)


@app.command(name="validate")
def _validate(context: typer.Context) -> None:
    """Check the raw data: files, counts, labels, balance, ink, duplicates. Stops the pipeline if something is wrong."""
    from training.validate import validate

    _run(context, validate)


@app.command(name="prepare")
def _prepare(context: typer.Context) -> None:
    """Split the raw data into train, validation and a sealed test split, and draw samples."""
    from training.prepare import prepare

    _run(context, prepare)


@app.command(name="train")
def _train(context: typer.Context) -> None:
    """Fit the perceptron that params.yaml describes."""
    import_tensorflow_quietly()
    from training.train import train

    _run(context, train)


@app.command(name="twin")
def _twin(context: typer.Context) -> None:
    """Fit the same network once more, without augmentation, for the evaluation to compare with."""
    import_tensorflow_quietly()
    from training.twin import twin

    _run(context, twin)


@app.command(name="evaluate")
def _evaluate(context: typer.Context) -> None:
    """Measure the trained model on the test split, whole and damaged; draw its mistakes."""
    import_tensorflow_quietly()
    from training.evaluate import evaluate

    _run(context, evaluate)


@app.command(name="probe")
def _probe(context: typer.Context) -> None:
    """Serve the trained model for a moment: its size, load time and latency; does it answer as Keras does?"""
    from training.probe import probe

    _run(context, probe)


@app.command(name="gate")
def _gate(context: typer.Context) -> None:
    """Decide whether the model may be published: limits, and the version published now. A rejection exits 0."""
    from training.gate import gate

    _run(context, gate)


@app.command(name="export")
def _export(context: typer.Context) -> None:
    """Write the approved model as a SavedModel with golden answers and warm-up requests."""
    import_tensorflow_quietly()
    from training.export import export

    _run(context, export)


@app.command(name="search")
def _search(
    context: typer.Context,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials to finish in all; search.trials of params.yaml if not given.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no trial after so many; those under way are finished.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Trials trained at the same time, each on its share of the cores.")
    ] = 1,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of each trial; search.epochs of params.yaml if not given.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=10, help="Training images of each trial; search.images if not given.")
    ] = None,
    name: Annotated[str, typer.Option(help="The search to begin or go on with: run/search/NAME.")] = "default",
) -> None:
    """Search for better parameters: try many values of `search.space`, on the validation split only.

    Ctrl-C stops it at any time and keeps what was found; the same command goes on. What came of it lies in
    `run/search/NAME/`: the best values for params.yaml, a table of all trials, and pictures of what mattered.
    """
    from training.search.search import search

    workspace: Workspace = context.obj
    given = {"trials": trials, "epochs": epochs, "images": images}
    params = change_params(
        load_params(workspace.params_file),
        {f"search.{key}": value for key, value in given.items() if value is not None},
    )
    ended = search(workspace, params, _console(), name=name, workers=workers, minutes=minutes)
    if not ended:
        raise typer.Exit(130)


@app.command(name="verify")
def _verify(
    saved_model: Annotated[
        Path, typer.Argument(help="A version folder, such as artifacts/export/saved_model or models/digits/3.")
    ],
) -> None:
    """Load an exported model in this fresh process and compare its answers with those of the trained one."""
    import_tensorflow_quietly(with_keras=False)
    from training.verify import verify

    difference = verify(saved_model)
    _console().print(f"{saved_model} answers as the trained model did (greatest difference {difference:.1e})")


def _run(context: typer.Context, stage: Callable[[Workspace, Params, Any], None]) -> None:
    workspace: Workspace = context.obj
    stage(workspace, load_params(workspace.params_file), _console())


def _console() -> Console:
    console = Console(stderr=True, highlight=False)
    # A log file is as wide as its lines.
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=140)


def main() -> None:
    """Run the command line; expected errors become one line and exit code 1."""
    try:
        app()
    except DigitsError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
