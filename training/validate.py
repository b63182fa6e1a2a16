"""Are the raw data what they should be? The stage: suites run, findings told, everything written down.

What is checked is in training/validation/: features of the images, their labels and drift, and the suites about them.
"""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from digits.errors import DigitsError
from training.data import read_splits
from training.params import Params
from training.validation.data_docs import write_data_docs
from training.validation.expectations import Finding, run_suites
from training.validation.frames import Frames, build_frames, work
from training.validation.quarantine import choose_pictures, draw_contact_sheet, list_offences, write_quarantine
from training.validation.report import build_metrics, build_report, findings_table, render_markdown
from training.workspace import Split, Workspace, whole_file, write_json

_ROWS_SHOWN = 20
"""At most so many rows in the report, of each reason as many as of any other while there are."""


class DataNotValid(DigitsError):
    """The raw data can be read but are not as params.yaml says they must be."""

    code = "data_not_valid"


def validate(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: check the raw data and write what came of it, also when it stops the pipeline.

    Writes report.json (last; what ``prepare`` asks before it begins), report.md, metrics.json, quarantine.csv,
    contact_sheet.png and data_docs/.

    Raises:
        BadRawData: a file is missing, damaged or of another shape.
        DataNotValid: an expectation failed that must hold; the table is printed and the report left to look at.
    """
    out = workspace.stage_dir("validate")
    (out / "report.json").unlink(missing_ok=True)
    splits = read_splits(workspace.raw_dir, params.data, console)
    frames = _build_frames(splits, workspace, params, console)
    with console.status("validating with Great Expectations"):
        results = run_suites(frames, params)
    listed = list_offences(frames, results.offences)

    write_data_docs(out / "data_docs", results)
    write_quarantine(out / "quarantine.csv", listed)
    draw_contact_sheet(out / "contact_sheet.png", splits, choose_pictures(listed, results.offences), len(listed))
    write_json(out / "metrics.json", build_metrics(frames, results, listed))
    shown = choose_pictures(listed, results.offences, _ROWS_SHOWN)
    report = build_report(frames, results, params.data.classes, listed, shown)
    with whole_file(out / "report.md") as part:
        part.write_text(render_markdown(report), encoding="utf-8")
    write_json(out / "report.json", report)

    if results.failed:
        console.print(findings_table(results.failed))
    if results.verdict == "stopped":
        raise _not_valid(workspace, results.failed, len(results.findings))
    count, held = len(results.findings), len(results.findings) - len(results.failed)
    console.print(
        f"{held} of {count} expectations hold for {sum(len(s.labels) for s in splits.values()):,} images; "
        f"{len(listed):,} rows to look at in {out / 'quarantine.csv'}"
    )


def _build_frames(splits: dict[str, Split], workspace: Workspace, params: Params, console: Console) -> Frames:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring the images and reading their labels", total=work(splits))
        return build_frames(splits, workspace.raw_dir, params, lambda count: progress.update(task, advance=count))


def _not_valid(workspace: Workspace, failed: list[Finding], count: int) -> DataNotValid:
    stopping = [f for f in failed if f.severity == "stop"]
    named = "; ".join(f"{f.about}: {f.requirement}: expected {f.expected}, came {f.came}" for f in stopping[:4])
    out = workspace.root / "artifacts" / "validate"
    return DataNotValid(
        f"{len(failed)} of {count} expectations about the raw data failed, {len(stopping)} to stop at: {named}. "
        f"Mend {workspace.raw_dir} (`python -m pipelines ingest`) or `validate` in params.yaml; "
        f"details: {out / 'data_docs' / 'index.html'}, rows: {out / 'quarantine.csv'}"
    )
