"""The suites, one for each frame, and the only place that knows Great Expectations.

An expectation's ``notes`` is the requirement in words; its ``meta`` holds the reason for which a row that breaks it is
listed in the quarantine, with the row's own values in braces.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from training.data import SPLITS
from training.params import DataParams, Limits, Params, Severity, ValidateParams
from training.validation.features import FEATURES
from training.validation.frames import AS_KNOWN, Frames

_GX_SEVERITY = {"stop": "critical", "warn": "warning"}
_MOST_VALUES = 12
"""More allowed values are not listed one by one."""
_SEVERITY = {gx: ours for ours, gx in _GX_SEVERITY.items()}


@dataclass(frozen=True)
class Finding:
    """One expectation and what came of it."""

    about: str
    """The suite."""
    requirement: str
    column: str
    passed: bool
    severity: str
    """What it does when broken: stop or warn."""
    expected: str
    came: str
    offending: int
    """How many rows break it."""
    examples: list[int]
    """The first of them, by index."""


@dataclass(frozen=True)
class Offence:
    """Rows of a split that break an expectation, or are marked by the column it counts."""

    split: str
    rows: np.ndarray
    reason: str
    """With the row's values in braces, as for ``str.format``."""


@dataclass(frozen=True)
class Results:
    """What came of all suites."""

    findings: list[Finding]
    offences: list[Offence]
    pages: dict[str, str]
    """Great Expectations' own page of each suite: HTML that loads scripts and styles from elsewhere."""

    @property
    def failed(self) -> list[Finding]:
        """The broken expectations."""
        return [f for f in self.findings if not f.passed]

    @property
    def verdict(self) -> str:
        """``stopped``, ``warned`` or ``passed``."""
        broken = {f.severity for f in self.failed}
        return "stopped" if "stop" in broken else "warned" if broken else "passed"


def run_suites(frames: Frames, params: Params) -> Results:
    """Check every frame against its suite."""
    gx, gxe = _import_great_expectations()
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("raw")
    results = Results([], [], {})
    for name, expectations in build_suites(gxe, params, frames).items():
        suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
        batch = (
            source.add_dataframe_asset(name)
            .add_batch_definition_whole_dataframe("all")
            .get_batch({"dataframe": frames[name]})
        )
        came = batch.validate(suite, result_format="COMPLETE")
        for result in came.results:
            rows = _offending_rows(result, frames[name])
            results.findings.append(_read_result(name, result, frames[name], rows))
            reason = (result.expectation_config.meta or {}).get("reason")
            if reason and len(rows):
                results.offences.append(Offence(name, rows, reason))
        results.pages[name] = _render(came)
    return results


def build_suites(gxe: Any, all_params: Params, frames: Frames) -> dict[str, list[Any]]:
    """The expectations about each frame."""
    params, data = all_params.validate_, all_params.data
    suites = {
        "files": _about_files(gxe, params),
        "train": _about_split(gxe, params, data, params.train_images),
        "test": _about_split(gxe, params, data, params.test_images),
        "classes": [
            gxe.ExpectColumnValuesToBeBetween(
                column="share",
                min_value=params.class_share[0],
                max_value=params.class_share[1],
                notes="classes are about equally common",
                severity=_GX_SEVERITY[params.severity.balance],
            )
        ],
        "drift": [
            *_both_limits(
                gxe.ExpectColumnValuesToBeBetween,
                "effect",
                params.drift,
                "test images are like training images, class by class",
            ),
            *_both_limits(
                gxe.ExpectColumnValuesToBeBetween,
                "psi",
                params.drift_psi,
                "test images are spread as training images are",
            ),
        ],
    }
    suites["test"] += [
        gxe.ExpectTableRowCountToBeBetween(
            min_value=0,
            max_value=len(frames["train"]),
            notes="the test split is no larger than the training split",
            severity=_GX_SEVERITY[params.severity.counts],
        ),
        gxe.ExpectColumnSumToBeBetween(
            column="leaks",
            min_value=0,
            max_value=params.max_duplicates_across,
            notes="test images are not in the training file",
            severity=_GX_SEVERITY[params.severity.leaks],
            meta={"reason": "the same picture as training row {same_as_train}"},
        ),
    ]
    return suites


def _about_files(gxe: Any, params: ValidateParams) -> list[Any]:
    severity = _GX_SEVERITY[params.severity.files]
    return [
        gxe.ExpectColumnValuesToBeInSet(
            column="content", value_set=[AS_KNOWN], notes="each file has its SHA-256", severity=severity
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="height", value_set=[IMAGE_HEIGHT], notes=f"images are {IMAGE_HEIGHT} high", severity=severity
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="width", value_set=[IMAGE_WIDTH], notes=f"images are {IMAGE_WIDTH} wide", severity=severity
        ),
    ]


def _about_split(gxe: Any, params: ValidateParams, data: DataParams, count: int) -> list[Any]:
    return [
        *_about_labels(gxe, params, data, count),
        *_about_blanks(gxe, params),
        gxe.ExpectColumnSumToBeBetween(
            column="repeats",
            min_value=0,
            max_value=params.max_duplicates_within,
            notes="images do not repeat",
            severity=_GX_SEVERITY[params.severity.duplicates],
            meta={"reason": "the same picture as row {same_as}"},
        ),
        *_about_features(gxe, params),
    ]


def _about_labels(gxe: Any, params: ValidateParams, data: DataParams, count: int) -> list[Any]:
    known = list(range(len(data.classes)))
    counts, labels = _GX_SEVERITY[params.severity.counts], _GX_SEVERITY[params.severity.labels]
    return [
        gxe.ExpectTableRowCountToEqual(value=count, notes="there are as many images as expected", severity=counts),
        gxe.ExpectColumnValuesToBeInSet(
            column="label", value_set=known, notes=f"labels are {data.labels}", severity=labels,
            meta={"reason": f"its label is none of 0 to {known[-1]}"},
        ),
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="label", value_set=known, notes="every class occurs", severity=labels
        ),
        *_both_limits(
            gxe.ExpectColumnMeanToBeBetween,
            "doubtful",
            params.doubtful_labels,
            "labels are what the other images speak for",
            reason="looks like {looks_like}",
        ),
        *_both_limits(
            gxe.ExpectColumnMeanToBeBetween,
            "contradicted",
            params.contradicted_labels,
            "labels can be learned from the pictures",
        ),
    ]  # fmt: skip


def _about_blanks(gxe: Any, params: ValidateParams) -> list[Any]:
    severity = _GX_SEVERITY[params.severity.blank]
    return [
        gxe.ExpectColumnValuesToBeBetween(
            column="least_pixel", min_value=0, max_value=0, notes="every image has paper (0)", severity=severity,
            meta={"reason": "no paper: its least pixel is {least_pixel}"},
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="greatest_pixel", min_value=128, max_value=255, notes="every image has ink (128 to 255)",
            severity=severity, meta={"reason": "no ink: its greatest pixel is {greatest_pixel}"},
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="ink_px", min_value=params.min_image_ink_px, notes="no image is blank or nearly so",
            severity=severity, meta={"reason": "nearly blank: ink_px {ink_px:.3g}"},
        ),
    ]  # fmt: skip


def _about_features(gxe: Any, params: ValidateParams) -> list[Any]:
    severity = _GX_SEVERITY[params.severity.features]
    expectations = [
        gxe.ExpectColumnMeanToBeBetween(
            column="ink_share",
            min_value=params.ink_share[0],
            max_value=params.ink_share[1],
            notes="ink is as dark and as thick as usual, on paper that is 0",
            severity=severity,
        )
    ]
    for feature, bounds in params.features.items():
        if bounds.mean is not None:
            low, high = bounds.mean
            expectations.append(
                gxe.ExpectColumnMeanToBeBetween(
                    column=feature, min_value=low, max_value=high, notes=f"usual on average: {FEATURES[feature]}",
                    severity=severity,
                )
            )  # fmt: skip
        if bounds.image is not None:
            low, high = bounds.image
            # People are told of single images; `odd` below decides when there are too many.
            expectations.append(
                gxe.ExpectColumnValuesToBeBetween(
                    column=feature, min_value=low, max_value=high, mostly=1.0 - min(1.0, params.odd_images.warn),
                    notes=f"usual in every image: {FEATURES[feature]}", severity="warning",
                    meta={"reason": f"{feature} {{{feature}:.3g}}, usually {low:g} to {high:g}"},
                )
            )  # fmt: skip
    expectations.append(
        gxe.ExpectColumnMeanToBeBetween(
            column="odd", min_value=0, max_value=params.odd_images.stop, notes="few images are out of the usual",
            severity="critical",
        )
    )  # fmt: skip
    return expectations


def _both_limits(kind: Any, column: str, limits: Limits, requirement: str, reason: str | None = None) -> list[Any]:
    """The same expectation twice: to warn, and to stop."""
    named: Iterable[tuple[Severity, float]] = (("warn", limits.warn), ("stop", limits.stop))
    return [
        kind(
            column=column, min_value=0, max_value=limit, notes=requirement, severity=_GX_SEVERITY[severity],
            meta={"reason": reason} if reason and severity == "warn" else None,
        )
        for severity, limit in named
    ]  # fmt: skip


def _import_great_expectations() -> tuple[Any, Any]:
    # Seconds to import: only when needed. Its analytics read the environment when they are imported.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    import great_expectations.expectations as gxe

    return gx, gxe


def _offending_rows(result: Any, frame: pd.DataFrame) -> np.ndarray:
    """The rows that break an expectation about values, or that the column marks (1) whose mean or sum is bounded."""
    config = result.expectation_config
    detail = result.result or {}
    if "unexpected_index_list" in detail:
        return np.array(sorted(detail["unexpected_index_list"]), np.int64)
    column = config.kwargs.get("column")
    if column in ("repeats", "leaks", "doubtful", "contradicted", "odd"):
        return np.flatnonzero(frame[column].to_numpy())
    return np.zeros(0, np.int64)


def _read_result(about: str, result: Any, frame: pd.DataFrame, rows: np.ndarray) -> Finding:
    """One result of Great Expectations in our own words."""
    config = result.expectation_config
    severity = config.severity.value if hasattr(config.severity, "value") else str(config.severity)
    return Finding(
        about=about,
        requirement=config.notes or config.type,
        column=config.kwargs.get("column", ""),
        passed=bool(result.success),
        severity=_SEVERITY[severity],
        expected=_expected(config.kwargs),
        came=_came(result, frame, rows),
        offending=len(rows),
        examples=rows[:5].tolist() if about in SPLITS else [],
    )


def _expected(kwargs: dict[str, Any]) -> str:
    if "value_set" in kwargs:
        values = [str(value) for value in kwargs["value_set"]]
        allowed = ", ".join(values if len(values) <= _MOST_VALUES else [*values[:2], "…", values[-1]])
        return f"one of {allowed}" if len(values) > 1 else allowed
    if "value" in kwargs:
        return f"{kwargs['value']:,}"
    return _span(kwargs.get("min_value"), kwargs.get("max_value"))


def _came(result: Any, frame: pd.DataFrame, rows: np.ndarray) -> str:
    if result.exception_info and result.exception_info.get("raised_exception"):
        return "it could not be computed"
    detail = result.result or {}
    if "observed_value" in detail:
        return _words(detail["observed_value"])
    column = result.expectation_config.kwargs["column"]
    if not len(rows):
        return _range(frame[column])
    values = frame[column].to_numpy()[rows]
    if "name" in frame:  # a frame of a few things that have names
        worst = rows[np.argsort(-values.astype(float), kind="stable")][:3] if values.dtype.kind == "f" else rows[:3]
        return "; ".join(f"{frame['name'][row]}: {_words(frame[column][row])}" for row in worst)
    shown = ", ".join(dict.fromkeys(_words(value) for value in values[:3]))
    return f"{len(rows):,} of {len(frame):,} otherwise: {shown}"


def _range(values: pd.Series) -> str:
    if values.dtype.kind not in "if" or not len(values):
        return "all so"
    return _span(*(float(f"{bound:.4g}") for bound in (values.min(), values.max())))


def _words(observed: Any) -> str:
    if isinstance(observed, np.generic):
        observed = observed.item()
    if isinstance(observed, list | set | tuple):
        return ", ".join(map(str, observed))
    if isinstance(observed, float):
        return f"{observed:,.4g}"
    return "all so" if observed is None else f"{observed:,}" if isinstance(observed, int) else str(observed)


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"at least {low:g}" if low is not None else f"at most {high:g}"
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _render(suite_result: Any) -> str:
    """Great Expectations' page of a suite's result."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    suite_result.meta.get("batch_markers", {}).pop("ge_load_time", None)  # the same data are the same page
    for one in suite_result.results:
        detail = one.result or {}
        for name, value in detail.items():
            if isinstance(value, np.generic):
                detail[name] = value.item()  # the renderer cannot print numpy's numbers
    html: str = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(suite_result))
    return html
