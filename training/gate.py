"""Is the candidate fit to be published? Limits from params.yaml, then a comparison with the version now published.

It fails closed: whatever cannot be read or computed is a failed check with its reason. Every check is recorded, so a
rejection names all that is wrong and not only the first thing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from digits.errors import DigitsError
from training.looks import CHAMPION, record_look
from training.paired import bootstrap_interval, mcnemar, pair
from training.params import GateParams, Params, RobustnessFloors
from training.verify import GOLDEN_TOLERANCE, predict_saved_model, verify
from training.workspace import (
    BadArtifact,
    Split,
    Workspace,
    import_tensorflow_quietly,
    load_split,
    read_json,
    write_json,
)


@dataclass(frozen=True)
class Check:
    """One thing the gate looked at. ``value`` is null when it could not be had."""

    name: str
    passed: bool
    value: float | str | None
    limit: float | str | None
    detail: str


@dataclass(frozen=True)
class Decision:
    """What the gate decided and why."""

    accepted: bool
    reason: str
    first_release: bool
    candidate: dict[str, Any] | None
    champion: dict[str, Any] | None
    checks: list[Check]


@dataclass(frozen=True)
class Answers:
    """What the candidate made of the sealed test images."""

    test: Split
    right: np.ndarray
    """bool (N,): which of them it read right."""


def gate(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: write decision.json and approval.json. A rejection is a result, not an error.

    approval.json says only what `export` depends on: judged again beside itself as champion it is the same bytes, so a
    publication alone does not make the export stale.
    """
    decision = judge(workspace, params.gate)
    out = workspace.stage_dir("gate")
    sha256 = (decision.candidate or {}).get("model_sha256")
    write_json(out / "decision.json", {"schema": 1, **asdict(decision)})
    write_json(out / "approval.json", {"schema": 1, "approved": decision.accepted, "model_sha256": sha256})
    console.print(checks_table(decision))


def judge(workspace: Workspace, params: GateParams) -> Decision:
    """Judge the measured candidate against the floors and the champion; writes nothing and raises nothing expected."""
    checks: list[Check] = []
    candidate: dict[str, Any] | None = None
    champion: dict[str, Any] | None = None
    answers: Answers | None = None
    with _failing_closed(checks, "candidate", "the candidate's metrics cannot be read"):
        candidate = _without_nonfinite(read_json(workspace.artifact("evaluate", "metrics.json")))
        checks += check_candidate(candidate, params)
    with _failing_closed(checks, "test_answers", "the candidate's answers cannot be counted"):
        answers = read_answers(workspace, candidate or {})
        count = len(answers.right)
        checks.append(Check("test_answers", True, count, None, f"one for each of the {count:,} sealed test images"))
    with _failing_closed(checks, "probe", "how the candidate does once it is served is not known"):
        probe = _without_nonfinite(read_json(workspace.artifact("probe", "probe.json")))
        checks += check_probe(probe, candidate or {}, params)
    first_release = not workspace.champion_file.exists()
    if first_release:
        checks.append(Check("champion", True, None, None, "nothing is published yet: this is the first release"))
    else:
        with _failing_closed(checks, "champion", "the published version cannot be compared with"):
            champion = _without_nonfinite(read_json(workspace.champion_file))
            checks += compare_with_champion(workspace, candidate or {}, answers, champion, params)
    failed = [check for check in checks if not check.passed]
    reason = "; ".join(f"{c.name}: {c.detail}" for c in failed) or f"all {len(checks)} checks passed"
    return Decision(not failed, reason, first_release, candidate, champion, checks)


@contextmanager
def _failing_closed(checks: list[Check], name: str, problem: str) -> Iterator[None]:
    """An expected error within becomes a failed check."""
    try:
        yield
    except DigitsError as err:
        checks.append(Check(name, False, None, None, f"{problem}: {err}"))


def check_candidate(metrics: dict[str, Any], params: GateParams) -> list[Check]:
    """The absolute floors and ceilings, and that the candidate and its test set are named."""
    return [
        _identity(metrics, "model_sha256"),
        _identity(metrics, "test_sha256"),
        _at_least(metrics, "accuracy", params.min_accuracy),
        _at_least(metrics, "macro_f1", params.min_macro_f1),
        _at_least(metrics, "min_class_recall", params.min_class_recall),
        _at_most(metrics, "ece", params.max_ece, greatest=1.0),
        _at_most(metrics, "nll", params.max_nll),
        *check_robustness(metrics, params.robustness),
    ]


def check_robustness(metrics: dict[str, Any], floors: RobustnessFloors) -> list[Check]:
    """Damaged and moved digits, beside the twin without augmentation, and images that are no digits: a row each."""
    figures = dict(metrics)
    mine, _ = _figure(metrics, "corruption_accuracy", 1.0)
    twins, _ = _figure(metrics, "corruption_accuracy_twin", 1.0)
    # From what is recorded, so that it cannot contradict the two.
    figures.pop("corruption_gain", None)
    if mine is not None and twins is not None:
        figures["corruption_gain"] = mine - twins
    return [
        _at_least(figures, "robustness_images", floors.robustness_images, greatest=math.inf),
        _at_least(figures, "corruption_accuracy", floors.corruption_accuracy),
        _at_least(figures, "corruption_gain", floors.corruption_gain, least=-1.0),
        _at_least(figures, "shift1_accuracy", floors.shift1_accuracy),
        _at_least(figures, "shift2_accuracy", floors.shift2_accuracy),
        _at_least(figures, "thin_accuracy", floors.thin_accuracy),
        _at_least(figures, "thick_accuracy", floors.thick_accuracy),
        _at_least(figures, "nondigit_abstention", floors.nondigit_abstention),
    ]


def check_probe(probe: dict[str, Any], metrics: dict[str, Any], params: GateParams) -> list[Check]:
    """What came of serving the candidate: its size and speed, and whether it answers as Keras does.

    Raises:
        BadArtifact: another candidate was served.
    """
    if probe.get("model_sha256") is None or probe["model_sha256"] != metrics.get("model_sha256"):
        raise BadArtifact("artifacts/probe/probe.json is not about this candidate: run `dvc repro`")
    return [
        _at_most(probe, "size_bytes", params.max_size_bytes),
        _at_most(probe, "load_s", params.max_load_s),
        _at_most(probe, "latency_ms", params.max_latency_ms),
        _at_most(probe, "latency_p99_ms", params.max_latency_p99_ms),
        _parity(probe, "saved_model"),
        _parity(probe, "server"),
    ]


def read_answers(workspace: Workspace, metrics: dict[str, Any]) -> Answers:
    """The sealed test images, and which of them the candidate read right when it was measured.

    Raises:
        BadArtifact: images, answers and metrics are not of one measurement, or one of them cannot be read.
    """
    test = load_split(workspace.artifact("prepare", "test.npz"))
    if test.sha256() != metrics.get("test_sha256"):
        raise BadArtifact("artifacts/prepare/test.npz is not what the candidate saw: run `dvc repro`")
    path = workspace.artifact("evaluate", "predictions.npz")
    try:
        with np.load(path, allow_pickle=False) as saved:
            probabilities, labels = saved["probabilities"], saved["labels"]
    except Exception as err:  # zipfile, zlib and numpy raise their own kinds
        raise BadArtifact(f"{path} cannot be read: {type(err).__name__}: {err}") from err
    if not len(test.labels) or not np.array_equal(labels, test.labels) or len(probabilities) != len(labels):
        raise BadArtifact(f"{path} does not hold an answer for each test image: run `dvc repro -f evaluate`")
    right = probabilities.argmax(axis=1) == labels
    accuracy, problem = _figure(metrics, "accuracy", 1.0)
    if accuracy is None or abs(accuracy - right.mean()) > 1e-9:
        raise BadArtifact(f"{path} and metrics.json disagree: {problem or f'{right.mean()} against {accuracy}'}")
    return Answers(test, right)


def compare_with_champion(
    workspace: Workspace,
    metrics: dict[str, Any],
    answers: Answers | None,
    champion: dict[str, Any],
    params: GateParams,
) -> list[Check]:
    """Have the champion's SavedModel read the candidate's test images, now, and compare image by image.

    Two questions. Not inferior: is the candidate's accuracy surely no further below the champion's than params allow?
    It fails for want of evidence as well, as with few images. Worse: is it below by more than chance, however little?

    Raises:
        BadArtifact: the champion's record or model, or the candidate's answers, cannot be read.
    """
    version = champion.get("version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise BadArtifact(f"its record has no version number: {workspace.champion_file}")
    sha256 = champion.get("model_sha256")
    if not isinstance(sha256, str) or not sha256:
        raise BadArtifact(f"its record has no model_sha256: {workspace.champion_file}")
    if sha256 == metrics.get("model_sha256"):
        return [Check("champion", True, None, None, f"the candidate is version {version}, already published")]
    if answers is None:
        raise BadArtifact("the candidate's own answers are not to be had")

    theirs = _score_now(workspace, champion, answers.test)
    paired = pair(answers.right, theirs)
    low, high = bootstrap_interval(paired)
    margin = -params.max_accuracy_drop
    detail = (
        f"{answers.right.mean():.4f} against {theirs.mean():.4f} of version {version} on the same {paired.images:,} "
        f"images: {paired.difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; its low end may be {margin}"
    )
    if low < margin <= paired.difference:
        detail += f". {paired.images:,} images are too few to tell, or the margin is too narrow"
    probability = mcnemar(paired)
    worse = paired.lost > paired.gained and probability < params.significance
    counts = f"{paired.lost:,} images only version {version} reads right, {paired.gained:,} only the candidate"
    return [
        Check("accuracy_against_champion", low >= margin, low, margin, detail),
        Check(
            "worse_than_champion", not worse, probability, params.significance,
            f"{counts}: McNemar's p = {probability:.2g}; worse with p below {params.significance} is rejected",
        ),
    ]  # fmt: skip


def _score_now(workspace: Workspace, champion: dict[str, Any], test: Split) -> np.ndarray:
    """Which test images the champion's SavedModel reads right, bool (N,); its recorded figure is not asked."""
    path = champion.get("path")
    if not isinstance(path, str) or not path:
        raise BadArtifact(f"its record has no path: {workspace.champion_file}")
    # Slow to load, and not needed when there is no champion, or it is the candidate.
    import_tensorflow_quietly(with_keras=False)
    folder = workspace.root / path
    verify(folder)  # a damaged one would be easy to match
    record_look(workspace, None, str(champion["model_sha256"]), test.sha256(), len(test.labels), CHAMPION)
    _, digits = predict_saved_model(folder, test.images)
    return np.asarray(digits == test.labels)


def checks_table(decision: Decision) -> Table:
    """The decision for people."""
    verdict = "[green]accepted[/]" if decision.accepted else "[red]rejected[/]"
    table = Table(title=f"Gate: {verdict}", title_justify="left")
    table.add_column("check")
    table.add_column("")
    table.add_column("detail", overflow="fold")
    for check in decision.checks:
        table.add_row(check.name, "[green]pass[/]" if check.passed else "[red]FAIL[/]", check.detail)
    return table


def _identity(metrics: dict[str, Any], name: str) -> Check:
    value = metrics.get(name)
    passed = isinstance(value, str) and len(value) == 64
    return Check(
        name, passed, value if passed else None, None, "known" if passed else f"{name} is missing from the metrics"
    )


def _at_least(figures: dict[str, Any], name: str, floor: float, *, least: float = 0.0, greatest: float = 1.0) -> Check:
    value, problem = _figure(figures, name, greatest, least)
    passed = value is not None and value >= floor
    return Check(name, passed, value, floor, problem or f"{_readable(value)}, at least {floor} is asked")


def _at_most(figures: dict[str, Any], name: str, ceiling: float, greatest: float = math.inf) -> Check:
    value, problem = _figure(figures, name, greatest)
    passed = value is not None and value <= ceiling
    return Check(name, passed, value, ceiling, problem or f"{_readable(value)}, at most {ceiling:,} is allowed")


def _parity(probe: dict[str, Any], who: str) -> Check:
    """Does ``who`` give the golden images the probabilities that Keras gives them, and the same digits?"""
    value, problem = _figure(probe, f"{who}_difference", 1.0)
    differing, no_count = _figure(probe, f"{who}_digits_differing", math.inf)
    images, no_images = _figure(probe, "golden_images", math.inf)
    if value is None or differing is None or images is None:
        return Check(f"parity_{who}", False, value, GOLDEN_TOLERANCE, problem or no_count or no_images)
    passed = value <= GOLDEN_TOLERANCE and differing == 0 and images > 0
    detail = f"differs from Keras by at most {value:.1e}, in {differing} digits, on {images} golden images"
    return Check(f"parity_{who}", passed, value, GOLDEN_TOLERANCE, detail)


def _figure(figures: dict[str, Any], name: str, greatest: float, least: float = 0.0) -> tuple[float | None, str]:
    """A figure between ``least`` and ``greatest``, or None and what is wrong with it."""
    if name not in figures:
        return None, f"{name} is missing"
    value = figures[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, f"{name} is {value!r}, not a number"
    if not least <= value <= greatest:
        return None, f"{name} is {value}, not between {least:g} and {greatest:g}"
    return value, ""


def _readable(value: float | None) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _without_nonfinite(value: Any) -> Any:
    """NaN and infinities as words: they fail the checks, and the decision stays JSON."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
