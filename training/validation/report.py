"""What came out, for machines (report.json, metrics.json) and for people (a table, Markdown)."""

from dataclasses import asdict
from typing import Any

import pandas as pd
from rich.table import Table

from training.data import SPLITS
from training.validation.expectations import Finding, Results
from training.validation.features import FEATURES
from training.validation.frames import Frames

_VERDICTS = {
    "passed": "✓ passed",
    "warned": "⚠ passed with warnings",
    "stopped": "✗ stopped: nothing is made from these data",
}
_MARKS = {"stop": "✗ stop", "warn": "⚠ warn"}


def build_report(
    frames: Frames, results: Results, classes: tuple[str, ...], listed: pd.DataFrame, shown: pd.DataFrame
) -> dict[str, Any]:
    """What report.json holds.

    Returns:
        ``verdict`` (passed, warned or stopped) and ``valid`` (not stopped); ``findings``, one an expectation;
        ``features``, by name: mean, standard deviation and range in each split, Cohen's d and population stability
        index of test against train; ``labels`` and ``by_class`` of each split, and the names of the ``classes``;
        ``quarantine``: how many rows are listed, how many of each split, and those of ``shown``.
    """
    return {
        "schema": 3,
        "verdict": results.verdict,
        "valid": results.verdict != "stopped",
        "images": {name: len(frames[name]) for name in SPLITS},
        "findings": [asdict(f) for f in results.findings],
        "features": {feature: _describe(feature, frames) for feature in FEATURES},
        "labels": {
            name: {f"{mark}_share": _share(frames[name][mark]) for mark in ("doubtful", "contradicted")}
            for name in SPLITS
        },
        "classes": list(classes),
        "by_class": {
            name: frames["classes"].loc[frames["classes"]["split"] == name, "images"].tolist() for name in SPLITS
        },
        "quarantine": {
            "rows": len(listed),
            **{name: int((listed["split"] == name).sum()) for name in SPLITS},
            "examples": shown.to_dict(orient="records"),
        },
    }


def build_metrics(frames: Frames, results: Results, listed: pd.DataFrame) -> dict[str, Any]:
    """What `dvc metrics show` shows and compares between data versions."""
    drift = frames["drift"]
    metrics: dict[str, Any] = {
        "expectations": len(results.findings),
        "failed_stop": sum(f.severity == "stop" for f in results.failed),
        "failed_warn": sum(f.severity == "warn" for f in results.failed),
        "quarantined": len(listed),
        "drift_greatest_effect": _rounded(drift["effect"].max()),
        "drift_greatest_psi": _rounded(drift["psi"].max()),
    }
    for name in SPLITS:
        frame = frames[name]
        metrics[name] = {
            "images": len(frame),
            "doubtful_labels": int(frame["doubtful"].sum()),
            "contradicted_labels_share": _share(frame["contradicted"]),
            "odd_images": int(frame["odd"].sum()),
            "duplicates": int(frame["repeats"].sum()),
            **{f"mean_{feature}": _rounded(frame[feature].mean()) for feature in FEATURES},
        }
    metrics["test"]["leaks"] = int(frames["test"]["leaks"].sum())
    return metrics


def findings_table(findings: list[Finding]) -> Table:
    """The broken expectations for a terminal."""
    table = Table(title="Expectations about the raw data that failed", title_justify="left")
    for name in ("does", "about", "requirement", "expected", "came", "for example, rows"):
        table.add_column(name, overflow="fold")
    for f in findings:
        column = f" ({f.column})" if f.column else ""
        examples = ", ".join(map(str, f.examples))
        table.add_row(f.severity, f.about, f.requirement + column, f.expected, f.came, examples)
    return table


def render_markdown(report: dict[str, Any]) -> str:
    """A report as Markdown, as for Prefect's page of a run."""
    failed = [f for f in report["findings"] if not f["passed"]]
    images = report["images"]
    lines = [
        f"# Raw data: {_VERDICTS[report['verdict']]}",
        "",
        f"{len(report['findings']) - len(failed)} of {len(report['findings'])} expectations hold for "
        f"{images['train']:,} training and {images['test']:,} test images.",
        "",
    ]
    if failed:
        rows = [
            (_MARKS[f["severity"]], f["about"], f["requirement"], f["column"], f["expected"], f["came"],
             ", ".join(map(str, f["examples"])))
            for f in failed
        ]  # fmt: skip
        heads = ("does", "about", "requirement", "column", "expected", "came", "for example, rows")
        lines += ["## What failed", "", *_table(heads, rows), ""]
    lines += ["## Rows to look at", "", *_quarantine_lines(report["quarantine"]), ""]
    lines += ["## Labels", "", *_label_lines(report), ""]
    lines += ["## Features", "", *_feature_lines(report["features"])]
    return "\n".join(lines) + "\n"


def _quarantine_lines(quarantine: dict[str, Any]) -> list[str]:
    if not quarantine["rows"]:
        return ["None."]
    rows = [(q["split"], q["row"], q["label"], q["reasons"]) for q in quarantine["examples"]]
    return [
        f"{quarantine['rows']:,} ({quarantine['train']:,} of train, {quarantine['test']:,} of test), listed in "
        "`artifacts/validate/quarantine.csv` and drawn in `artifacts/validate/contact_sheet.png`. Nothing is removed. "
        "Some of them:" if quarantine["rows"] > len(rows) else "All of them:",
        "",
        *_table(("split", "row", "label", "reasons"), rows),
    ]  # fmt: skip


def _label_lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"Of the {name} labels, {labels['contradicted_share']:.2%} are read otherwise by a quick classifier that has "
        f"not seen them, {labels['doubtful_share']:.2%} clearly so."
        for name, labels in report["labels"].items()
    ]
    counts = report["by_class"]
    rows = [(name, *(f"{counts[split][k]:,}" for split in SPLITS)) for k, name in enumerate(report["classes"])]
    return [*lines, "", *_table(("images of", *SPLITS), rows)]


def _feature_lines(features: dict[str, Any]) -> list[str]:
    rows = []
    for name, meaning in FEATURES.items():
        f = features[name]
        splits = [f"{f[s]['mean']:.4g} ± {f[s]['sd']:.3g} ({f[s]['min']:.3g} to {f[s]['max']:.3g})" for s in SPLITS]
        rows.append((f"`{name}`", meaning, *splits, f"{f['d']:+.3f}", f"{f['psi']:.3f}"))
    heads = ("feature", "what it is", "train: mean ± sd (range)", "test", "Cohen's d", "PSI beyond chance")
    return _table(heads, rows)


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _describe(feature: str, frames: Frames) -> dict[str, Any]:
    drift = frames["drift"].set_index("name").loc[feature]
    described: dict[str, Any] = {"d": _rounded(drift["d"]), "psi": _rounded(drift["psi"])}
    for name in SPLITS:
        values = frames[name][feature]
        described[name] = {
            "mean": _rounded(values.mean()),
            "sd": _rounded(values.std(ddof=0)),
            "min": _rounded(values.min()),
            "max": _rounded(values.max()),
        }
    return described


def _share(marks: pd.Series) -> float:
    return _rounded(marks.mean())


def _rounded(value: Any) -> float:
    """Six decimals, as sums may differ in the last bits between machines; 0 for the mean of nothing."""
    return 0.0 if pd.isna(value) else round(float(value), 6)
