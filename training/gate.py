"""Is the candidate fit to be published? Floors from params.yaml, then a comparison with the version now published.

It fails closed: whatever cannot be read or computed is a failed check with its reason. Every check is recorded, so a
rejection names all that is wrong and not only the first thing.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from digits.errors import DigitsError
from training.params import GateParams, Params
from training.workspace import BadArtifact, Workspace, import_tensorflow_quietly, load_split, read_json, write_json


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
    first_release = False
    try:
        candidate = _without_nonfinite(read_json(workspace.artifact("evaluate", "metrics.json")))
        checks += check_candidate(candidate, params)
    except DigitsError as err:
        checks.append(Check("candidate", False, None, None, f"the candidate's metrics cannot be read: {err}"))
    if not workspace.champion_file.exists():
        first_release = True
        checks.append(Check("champion", True, None, None, "nothing is published yet: this is the first release"))
    else:
        try:
            champion = _without_nonfinite(read_json(workspace.champion_file))
            checks += compare_with_champion(workspace, candidate or {}, champion, params)
        except DigitsError as err:
            checks.append(Check("champion", False, None, None, f"the published version cannot be compared with: {err}"))
    failed = [check for check in checks if not check.passed]
    reason = "; ".join(f"{c.name}: {c.detail}" for c in failed) or f"all {len(checks)} checks passed"
    return Decision(not failed, reason, first_release, candidate, champion, checks)


def check_candidate(metrics: dict[str, Any], params: GateParams) -> list[Check]:
    """The absolute floors and ceilings, and that the candidate and its test set are named."""
    checks = [_identity(metrics, "model_sha256"), _identity(metrics, "test_sha256")]
    for name, floor in (
        ("accuracy", params.min_accuracy),
        ("macro_f1", params.min_macro_f1),
        ("min_class_recall", params.min_class_recall),
    ):
        value, problem = _share(metrics, name)
        passed = value is not None and value >= floor
        checks.append(Check(name, passed, value, floor, problem or f"{value:.4f}, at least {floor} is asked"))
    value, problem = _share(metrics, "ece")
    passed = value is not None and value <= params.max_ece
    checks.append(
        Check("ece", passed, value, params.max_ece, problem or f"{value:.4f}, at most {params.max_ece} is allowed")
    )
    return checks


def compare_with_champion(
    workspace: Workspace, metrics: dict[str, Any], champion: dict[str, Any], params: GateParams
) -> list[Check]:
    """Compare accuracies on the same test images; the champion is measured anew when it was measured on others.

    Raises:
        BadArtifact: the champion's record or model cannot be read.
    """
    version = champion.get("version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise BadArtifact(f"its record has no version number: {workspace.champion_file}")
    for key in ("model_sha256", "test_sha256"):
        if not isinstance(champion.get(key), str) or not champion[key]:
            raise BadArtifact(f"its record has no {key}: {workspace.champion_file}")
    if champion["model_sha256"] == metrics.get("model_sha256"):
        return [Check("champion", True, None, None, f"the candidate is version {version}, already published")]

    if champion["test_sha256"] == metrics.get("test_sha256"):
        recorded = champion.get("metrics")
        published, problem = _share(recorded if isinstance(recorded, dict) else {}, "accuracy")
        if published is None:
            raise BadArtifact(f"in its record {problem}: {workspace.champion_file}")
        how = "as recorded"
    else:
        published = _score_again(workspace, champion, metrics)
        how = "measured again: its record is of other test images"
    mine, problem = _share(metrics, "accuracy")
    floor = published - params.max_accuracy_drop
    # A tolerance for the subtraction, far below one image.
    passed = mine is not None and mine >= floor - 1e-9
    detail = (
        problem or f"{mine:.4f} against {published:.4f} of version {version} ({how}); at least {floor:.4f} is asked"
    )
    return [Check("accuracy_against_champion", passed, mine, round(floor, 9), detail)]


def _score_again(workspace: Workspace, champion: dict[str, Any], metrics: dict[str, Any]) -> float:
    """Accuracy of the champion's SavedModel on the test split of now."""
    path = champion.get("path")
    if not isinstance(path, str) or not path:
        raise BadArtifact(f"it was measured on other test images and its record has no path: {workspace.champion_file}")
    test = load_split(workspace.artifact("prepare", "test.npz"))
    if test.sha256() != metrics.get("test_sha256"):
        raise BadArtifact(
            "it was measured on other test images, and artifacts/prepare/test.npz is not what the candidate saw"
        )
    # Seldom needed and slow to load.
    import_tensorflow_quietly(with_keras=False)
    from training.verify import predict_saved_model

    _, digits = predict_saved_model(workspace.root / path, test.images)
    return float((digits == test.labels).mean())


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


def _share(metrics: dict[str, Any], name: str) -> tuple[float | None, str]:
    """A metric between 0 and 1, or None and what is wrong with it."""
    if name not in metrics:
        return None, f"{name} is missing"
    value = metrics[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, f"{name} is {value!r}, not a number"
    if not 0.0 <= value <= 1.0:
        return None, f"{name} is {value}, not between 0 and 1"
    return float(value), ""


def _without_nonfinite(value: Any) -> Any:
    """NaN and infinities as words: they fail the checks, and the decision stays JSON."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
