"""What people look at in Prefect's UI after a release: the data, the curves, the figures, the decision, the version.

Pictures are embedded, so that they show wherever the UI is opened and stay when the next run overwrites the files.
"""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from digits import contract
from pipelines.candidate import CandidateError, Verdict, read_verdict
from pipelines.publish import Published
from pipelines.settings import Settings
from pipelines.text import flat

_MAX_PICTURE_BYTES: Final = 1_000_000
"""A larger picture is named, not embedded: each goes into the server's database."""


def show_stage(settings: Settings, stage: str) -> None:
    """Make the artifacts of a stage that is up to date; nothing where it has none, or its files are not there."""
    if make := _OF_STAGE.get(stage):
        make(settings.artifacts_dir / stage, settings)


def show_published(done: Published) -> None:
    """The version's lineage as a table, and a link to it."""
    number = done.version.number
    lineage_file = done.version.folder / contract.LINEAGE_FILE
    create_link_artifact(key="lineage", link=lineage_file.as_uri(), link_text=f"lineage of version {number}")
    create_markdown_artifact(key="published", markdown=_lineage_markdown(done), description=f"version {number}")


def _show_data(folder: Path, settings: Settings) -> None:
    report = folder / "report.md"
    text = report.read_text(encoding="utf-8") if report.is_file() else _report_markdown(_read(folder / "report.json"))
    if text:
        pictures = _pictures(folder, {path.name: path.stem.replace("_", " ") for path in sorted(folder.glob("*.png"))})
        create_markdown_artifact(key="data", markdown=f"{text}{pictures}", description="What validation found")
    _link(settings, "data-docs", folder / "data_docs" / "index.html", "the checks in full (Data Docs)")


def _show_samples(folder: Path, _settings: Settings) -> None:
    _markdown("samples", _pictures(folder, {"samples.png": "Samples of each digit"}), "Training images")


def _show_curves(folder: Path, _settings: Settings) -> None:
    _markdown("curves", _pictures(folder, {"curves.png": "Loss and accuracy by epoch"}), "How training went")


def _show_evaluation(folder: Path, settings: Settings) -> None:
    metrics = [
        {"metric": name, "value": value}
        for name, value in flat(_read(folder / "metrics.json"))
        if isinstance(value, int | float | str)
    ]
    if metrics:
        create_table_artifact(key="metrics", table=metrics, description="The candidate on the test images")
    pictures = {
        "confusion.png": "Confusion matrix",
        "mistakes.png": "What it got wrong",
        "reliability.png": "Is its confidence right?",
    }
    _markdown("evaluation", _pictures(folder, pictures), "The candidate on the test images, in pictures")
    _link(settings, "evaluation-page", folder / "report.html", "the evaluation as one page")


def _show_decision(_folder: Path, settings: Settings) -> None:
    try:
        verdict = read_verdict(settings)
    except CandidateError:
        return
    create_markdown_artifact(key="decision", markdown=_decision_markdown(verdict), description=verdict.reason)


_OF_STAGE: Final[Mapping[str, Callable[[Path, Settings], None]]] = {
    "validate": _show_data,
    "prepare": _show_samples,
    "train": _show_curves,
    "evaluate": _show_evaluation,
    "gate": _show_decision,
}


def _link(settings: Settings, key: str, path: Path, text: str) -> None:
    if not path.exists():
        return
    base = settings.artifacts_url or settings.artifacts_dir.absolute().as_uri()
    link = f"{base.rstrip('/')}/{path.relative_to(settings.artifacts_dir).as_posix()}"
    create_link_artifact(key=key, link=link, link_text=text)


def _markdown(key: str, text: str, description: str) -> None:
    if text:
        create_markdown_artifact(key=key, markdown=text, description=description)


def _pictures(folder: Path, wanted: Mapping[str, str]) -> str:
    """Markdown with those of the PNG files that are there; empty when none is."""
    parts = []
    for name, title in wanted.items():
        path = folder / name
        if not path.is_file():
            continue
        data = path.read_bytes()
        if len(data) > _MAX_PICTURE_BYTES:
            parts.append(f"\n\n### {title}\n\n`{path}` ({len(data) / 1e6:.1f} MB)")
        else:
            parts.append(f"\n\n### {title}\n\n![{title}](data:image/png;base64,{base64.b64encode(data).decode()})")
    return "".join(parts)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _report_markdown(report: Mapping[str, Any]) -> str:
    findings = [finding for finding in report.get("findings") or [] if isinstance(finding, dict)]
    rows = [
        f"| {'✓' if finding.get('passed') else '✗'} | {finding.get('requirement')} | {finding.get('came')} |"
        for finding in findings
    ]
    return "\n".join(["|  | requirement | came |", "| --- | --- | --- |", *rows]) if rows else ""


def _decision_markdown(verdict: Verdict) -> str:
    word = "accepted" if verdict.approved else "**rejected**"
    rows = [
        f"| {'✓' if check.get('passed') else '✗'} | {check.get('name')} | {_short(check.get('value'))} "
        f"| {_short(check.get('limit'))} | {check.get('detail') or ''} |"
        for check in verdict.checks
    ]
    head = ["|  | check | value | limit | detail |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([f"Candidate `{verdict.model_sha256[:12]}` {word}: {verdict.reason}", "", *head, *rows])


def _short(value: object) -> str:
    """As much of it as a narrow table has room for: four digits, twelve characters of a hash."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    return f"{text[:12]}…" if len(text) > 40 else text


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
