"""Are the raw data what they should be? The one place that knows Great Expectations.

Expectations run on one row an image (ink, greatest pixel, label, duplicates), not on 784 columns: a third of a second
for 70,000 images.
"""

import hashlib
import os
import re
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from digits.contract import CLASS_COUNT, IMAGE_BYTES, IMAGE_HEIGHT, IMAGE_WIDTH
from digits.errors import DigitsError
from training.data import read_raw_split
from training.params import Params, ValidateParams
from training.workspace import Split, Workspace, whole_file, write_json

_SPLITS = ("train", "test")


class DataNotValid(DigitsError):
    """The raw data can be read but are not as params.yaml says they must be."""

    code = "data_not_valid"


@dataclass(frozen=True)
class Finding:
    """One expectation and what came of it."""

    about: str
    requirement: str
    passed: bool
    severity: str
    expected: str
    came: str
    examples: list[int]
    """Indices of the first rows that break it."""


def validate(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: write report.json and data_docs/, and stop the pipeline when an expectation fails.

    Raises:
        BadRawData: a file is missing, damaged or of another shape.
        DataNotValid: an expectation failed; the table is printed and the Data Docs are left to look at.
    """
    out = workspace.stage_dir("validate")
    (out / "report.json").unlink(missing_ok=True)
    splits = {name: read_raw_split(workspace.raw_dir, name) for name in _SPLITS}
    with console.status("validating with Great Expectations"):
        frames = build_frames(splits, workspace.raw_dir, params.validate_)
        findings, must_stop = run_expectations(frames, params.validate_, out / "data_docs")
    failed = [f for f in findings if not f.passed]
    if failed:
        console.print(findings_table(failed))
    if must_stop:
        named = "; ".join(f"{f.about}: {f.requirement}: expected {f.expected}, came {f.came}" for f in failed[:4])
        raise DataNotValid(
            f"{len(failed)} of {len(findings)} expectations about the raw data failed: {named}. "
            f"Mend {workspace.raw_dir} (`python -m pipelines ingest`) or `validate` in params.yaml; "
            f"details: {out / 'data_docs' / 'index.html'}"
        )
    write_json(
        out / "report.json",
        {
            "schema": 1,
            "valid": True,
            "images": {name: len(split.labels) for name, split in splits.items()},
            "findings": [asdict(f) for f in findings],
        },
    )
    console.print(f"{len(findings)} expectations hold for {sum(len(s.labels) for s in splits.values()):,} images")


def build_frames(splits: dict[str, Split], raw_dir: Path, params: ValidateParams) -> dict[str, pd.DataFrame]:
    """The frames that expectations run on: ``train`` and ``test`` with a row an image, ``classes``, ``files``."""
    hashes = {name: _image_hashes(split.images) for name, split in splits.items()}
    frames = {}
    for name, split in splits.items():
        pixels = split.images.reshape(len(split.labels), IMAGE_BYTES)  # (N, 784)
        frames[name] = pd.DataFrame(
            {
                "label": split.labels,
                "ink_px": pixels.sum(axis=1, dtype=np.int64) / 255.0,
                "ink_share": pixels.mean(axis=1, dtype=np.float64) / 255.0,
                "greatest_pixel": pixels.max(axis=1).astype(np.int64),
                "least_pixel": pixels.min(axis=1).astype(np.int64),
                "repeats_earlier": pd.Series(hashes[name]).duplicated().astype(int),
                "in_train_too": np.isin(hashes[name], hashes["train"]).astype(int) if name != "train" else 0,
            }
        )
    frames["classes"] = pd.DataFrame(
        [
            {
                "split": name,
                "digit": digit,
                "share": float((split.labels == digit).mean()) if len(split.labels) else 0.0,
            }
            for name, split in splits.items()
            for digit in range(CLASS_COUNT)
        ]
    )
    frames["files"] = pd.DataFrame(
        [
            {
                "file": path.name,
                "content": _compare_sha256(path, params.sha256),
                "type": str(part.dtype),
                "height": part.shape[1] if part.ndim == 3 else None,
                "width": part.shape[2] if part.ndim == 3 else None,
            }
            for name, prefix in (("train", "train"), ("test", "t10k"))
            for path, part in (
                (raw_dir / f"{prefix}-images-idx3-ubyte", splits[name].images),
                (raw_dir / f"{prefix}-labels-idx1-ubyte", splits[name].labels.astype(np.uint8)),
            )
        ]
    )
    return frames


def run_expectations(
    frames: dict[str, pd.DataFrame], params: ValidateParams, docs_dir: Path
) -> tuple[list[Finding], bool]:
    """Run the suites of all frames and write the Data Docs; every finding, and whether a critical one failed."""
    gx, gxe = _import_great_expectations()
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.expectations.metadata_types import FailureSeverity

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("raw")
    findings: list[Finding] = []
    must_stop = False
    pages: dict[str, Any] = {}
    for name, expectations in build_expectations(gxe, params).items():
        suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
        batch = (
            source.add_dataframe_asset(name)
            .add_batch_definition_whole_dataframe("all")
            .get_batch({"dataframe": frames[name]})
        )
        result = batch.validate(suite, result_format="SUMMARY")
        pages[name] = result
        # `success` is false for warnings too.
        must_stop = must_stop or result.get_max_severity_failure() == FailureSeverity.CRITICAL
        findings += [_read_result(name, r, frames[name]) for r in result.results]
    _write_docs(docs_dir, pages, findings)
    return findings, must_stop


def build_expectations(gxe: Any, params: ValidateParams) -> dict[str, list[Any]]:
    """The expectations about each frame; ``notes`` is the requirement in words."""
    suites: dict[str, list[Any]] = {
        "files": [
            gxe.ExpectColumnValuesToBeInSet(
                column="content", value_set=["as known"], notes="each file has its SHA-256"
            ),
            gxe.ExpectColumnValuesToBeInSet(column="type", value_set=["uint8"], notes="files hold uint8"),
            gxe.ExpectColumnValuesToBeInSet(
                column="height", value_set=[IMAGE_HEIGHT], notes=f"images are {IMAGE_HEIGHT} high"
            ),
            gxe.ExpectColumnValuesToBeInSet(
                column="width", value_set=[IMAGE_WIDTH], notes=f"images are {IMAGE_WIDTH} wide"
            ),
        ],
        "classes": [
            gxe.ExpectColumnValuesToBeBetween(
                column="share",
                min_value=params.class_share[0],
                max_value=params.class_share[1],
                notes="digits are about equally common",
            )
        ],
    }
    for name, count in (("train", params.train_images), ("test", params.test_images)):
        suites[name] = [
            gxe.ExpectTableRowCountToEqual(value=count, notes="there are as many images as expected"),
            gxe.ExpectColumnValuesToBeInSet(
                column="label", value_set=list(range(CLASS_COUNT)), notes="labels are 0 to 9"
            ),
            gxe.ExpectColumnDistinctValuesToContainSet(
                column="label", value_set=list(range(CLASS_COUNT)), notes="every digit occurs"
            ),
            gxe.ExpectColumnValuesToBeBetween(
                column="least_pixel", min_value=0, max_value=0, notes="every image has paper (0)"
            ),
            gxe.ExpectColumnValuesToBeBetween(
                column="greatest_pixel", min_value=128, max_value=255, notes="every image has ink (128 to 255)"
            ),
            gxe.ExpectColumnValuesToBeBetween(
                column="ink_px", min_value=params.min_image_ink_px, notes="no image is blank or nearly so"
            ),
            gxe.ExpectColumnMeanToBeBetween(
                column="ink_share",
                min_value=params.ink_share[0],
                max_value=params.ink_share[1],
                notes="ink is as dark and as thick as usual, on paper that is 0",
            ),
            gxe.ExpectColumnSumToBeBetween(
                column="repeats_earlier",
                min_value=0,
                max_value=params.max_duplicates_within,
                notes="images do not repeat",
            ),
        ]
    suites["test"].append(
        gxe.ExpectColumnSumToBeBetween(
            column="in_train_too",
            min_value=0,
            max_value=params.max_duplicates_across,
            notes="test images are not in the training file",
        )
    )
    return suites


def findings_table(findings: list[Finding]) -> Table:
    """The findings for people."""
    table = Table(title="Expectations about the raw data that failed", title_justify="left")
    for name in ("about", "requirement", "expected", "came", "for example, rows"):
        table.add_column(name, overflow="fold")
    for f in findings:
        table.add_row(f.about, f.requirement, f.expected, f.came, ", ".join(map(str, f.examples)))
    return table


def _compare_sha256(path: Path, known: dict[str, str]) -> str:
    if path.name not in known:
        return "as known"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    return (
        "as known"
        if found == known[path.name]
        else f"{path.name} has {found[:12]}… instead of {known[path.name][:12]}…"
    )


def _image_hashes(images: np.ndarray) -> np.ndarray:
    """A 128-bit hash of each image, as bytes (N,)."""
    rows = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
    return np.array(rows, dtype="S16") if rows else np.zeros(0, "S16")


def _import_great_expectations() -> tuple[Any, Any]:
    # Seconds to import: only when needed. Its analytics read the environment when they are imported.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    import great_expectations.expectations as gxe

    return gx, gxe


def _read_result(about: str, result: Any, frame: pd.DataFrame) -> Finding:
    """One result of Great Expectations in our own words."""
    config = result.expectation_config
    kwargs = config.kwargs
    detail = result.result or {}
    if "value_set" in kwargs:
        allowed = ", ".join(map(str, kwargs["value_set"]))
        expected = f"one of {allowed}" if len(kwargs["value_set"]) > 1 else allowed
    elif "value" in kwargs:
        expected = f"{kwargs['value']:,}"
    else:
        expected = _span(kwargs.get("min_value"), kwargs.get("max_value"))
    examples = [int(i) for i in detail.get("partial_unexpected_index_list", [])[:5]]
    if not result.success and config.type == "expect_column_sum_to_be_between":
        examples = np.flatnonzero(frame[kwargs["column"]].to_numpy())[:5].tolist()
    if result.exception_info and result.exception_info.get("raised_exception"):
        came = "it could not be computed"
    elif "unexpected_count" in detail and not result.success:
        values = ", ".join(str(v) for v in dict.fromkeys(detail.get("partial_unexpected_list", [])[:3]))
        came = f"{detail['unexpected_count']:,} of {detail['element_count']:,} otherwise: {values}"
    elif "observed_value" in detail:
        observed = detail["observed_value"]
        came = f"{observed:,.4g}" if isinstance(observed, float) else _words(observed)
    else:
        came = "all so"
    column = f" ({kwargs['column']})" if "column" in kwargs else ""
    return Finding(
        about=about,
        requirement=f"{config.notes or config.type}{column}",
        passed=bool(result.success),
        severity=str(config.severity.value if hasattr(config.severity, "value") else config.severity),
        expected=expected,
        came=came,
        examples=examples,
    )


def _words(observed: Any) -> str:
    if isinstance(observed, list | set | tuple):
        return ", ".join(map(str, observed))
    return "all so" if observed is None else f"{observed:,}"


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"at least {low:g}" if low is not None else f"at most {high:g}"
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


_DOCS_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%;margin:.6rem 0 1.4rem}td,th{border:1px solid #ddd;padding:.3rem .5rem;
text-align:left;vertical-align:top}th{background:#f4f4f4}.ok{color:#17692c}.bad,.text-danger{color:#b3261e;font-weight:600}
.alert{background:#f4f4f4;padding:.6rem .8rem;margin-top:1.4rem}h5,h6{font-size:1rem;margin:.2rem 0}
.fa-check-circle::before{content:"\\2713"}.fa-times::before,.fa-exclamation-triangle::before{content:"\\2717"}
.badge{background:#eee;padding:0 .3rem;border-radius:.2rem}.col-lg-2,nav,footer{display:none}
"""


def _write_docs(folder: Path, pages: dict[str, Any], findings: list[Finding]) -> None:
    """Great Expectations' page of each suite and an index of all findings, needing nothing from anywhere else."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    rows = []
    for f in findings:
        examples = ", ".join(map(str, f.examples))
        verdict = '<td class="ok">holds</td>' if f.passed else f'<td class="bad">failed ({escape(f.severity)})</td>'
        cells = "".join(f"<td>{escape(t)}</td>" for t in (f.about, f.requirement, f.expected, f.came, examples))
        rows.append(f"<tr>{verdict}{cells}</tr>")
    links = " · ".join(f'<a href="{name}.html">{name}</a>' for name in pages)
    heads = "".join(f"<th>{t}</th>" for t in ("", "about", "requirement", "expected", "came", "for example, rows"))
    failed = sum(not f.passed for f in findings)
    verdict = f"{failed} of {len(findings)} expectations failed" if failed else f"all {len(findings)} expectations hold"
    index = (
        f"<h1>Raw data: {verdict}</h1><p>Page of each suite: {links}</p><table><tr>{heads}</tr>{''.join(rows)}</table>"
    )
    _write_page(folder / "index.html", "Raw data", index)
    for name, result in pages.items():
        for one in result.results:
            observed = (one.result or {}).get("observed_value")
            if isinstance(observed, np.generic):
                one.result["observed_value"] = observed.item()  # the renderer cannot print numpy's numbers
        html = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result))
        _write_page(
            folder / f"{name}.html", name, f'<p><a href="index.html">all findings</a></p>{_make_self_contained(html)}'
        )


def _make_self_contained(html: str) -> str:
    """A page's body without scripts, outside styles, images and links: it loads nothing and tells nobody."""
    body = html[html.index("<body") :]
    body = body[body.index(">") + 1 :].rsplit("</body>", 1)[0]
    body = re.sub(r"<(script|style|iframe|footer|nav)\b.*?</\1>", "", body, flags=re.DOTALL | re.IGNORECASE)
    body = re.sub(r"<(link|img|iframe)\b[^>]*>", "", body, flags=re.IGNORECASE)
    body = re.sub(r"<a\b[^>]*>(.*?)</a>", r"\1", body, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r"\son\w+=\"[^\"]*\"", "", body)


def _write_page(path: Path, title: str, body: str) -> None:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_DOCS_STYLE}</style>'
    with whole_file(path) as part:
        part.write_text(
            f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n', encoding="utf-8"
        )
