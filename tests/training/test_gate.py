"""The gate fails closed: what cannot be read, computed or compared is a rejection with its reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.training.conftest import small_params
from training.gate import gate, judge
from training.params import GateParams, Params
from training.workspace import Split, Workspace, save_split

PARAMS = GateParams(min_accuracy=0.98, min_macro_f1=0.98, min_class_recall=0.95, max_ece=0.05, max_accuracy_drop=0.001)
TEST = Split(np.zeros((20, 28, 28), np.uint8), np.arange(20) % 10)
METRICS = {
    "model_sha256": "a" * 64,
    "test_sha256": TEST.sha256(),
    "accuracy": 0.99,
    "macro_f1": 0.99,
    "min_class_recall": 0.97,
    "ece": 0.01,
}
CHAMPION = {
    "schema": 1,
    "version": 3,
    "model_sha256": "b" * 64,
    "test_sha256": TEST.sha256(),
    "path": "models/digits/3",
    "metrics": {**METRICS, "accuracy": 0.9905},
}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    (tmp_path / "models" / "champion").mkdir(parents=True)
    put_metrics(workspace, METRICS)
    save_split(workspace.stage_dir("prepare") / "test.npz", TEST)
    return workspace


def put_metrics(workspace: Workspace, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)  # json writes NaN as NaN
    (workspace.stage_dir("evaluate") / "metrics.json").write_text(text)


def put_champion(workspace: Workspace, content: Any) -> None:
    workspace.champion_file.write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_good_first_candidate_is_accepted_as_first_release(workspace: Workspace) -> None:
    decision = judge(workspace, PARAMS)
    assert decision.accepted
    assert decision.first_release
    assert decision.champion is None
    assert any("first release" in check.detail for check in decision.checks)


def test_the_first_release_must_reach_the_floors_too(workspace: Workspace) -> None:
    put_metrics(workspace, {**METRICS, "accuracy": 0.97})
    decision = judge(workspace, PARAMS)
    assert not decision.accepted
    assert "accuracy: 0.9700, at least 0.98" in decision.reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracy": 0.9799}, "accuracy: 0.9799"),
        ({"macro_f1": 0.5}, "macro_f1"),
        ({"min_class_recall": 0.5}, "min_class_recall"),
        ({"ece": 0.051}, "ece"),
        ({"accuracy": None}, "accuracy is None, not a number"),
        ({"accuracy": "0.99"}, "accuracy is '0.99', not a number"),
        ({"accuracy": True}, "accuracy is True, not a number"),
        ({"accuracy": float("nan")}, "accuracy is 'nan'"),
        ({"ece": float("nan")}, "ece is 'nan'"),
        ({"accuracy": float("inf")}, "accuracy is 'inf'"),
        ({"accuracy": 99.2}, "accuracy is 99.2, not between 0 and 1"),
        ({"ece": -0.1}, "ece is -0.1, not between 0 and 1"),
        ({"model_sha256": None}, "model_sha256 is missing"),
        ({"test_sha256": "short"}, "test_sha256 is missing"),
    ],
)
def test_a_poor_or_impossible_figure_is_a_rejection_with_its_reason(
    workspace: Workspace, change: dict[str, Any], said: str
) -> None:
    put_metrics(workspace, {**METRICS, **change})
    decision = judge(workspace, PARAMS)
    assert not decision.accepted
    assert said in decision.reason


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "min_class_recall", "ece"])
def test_a_missing_metric_is_a_rejection_that_names_it(workspace: Workspace, name: str) -> None:
    put_metrics(workspace, {key: value for key, value in METRICS.items() if key != name})
    decision = judge(workspace, PARAMS)
    assert not decision.accepted
    assert f"{name} is missing" in decision.reason


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_unreadable_metrics_are_a_rejection(workspace: Workspace, content: str) -> None:
    put_metrics(workspace, content)
    decision = judge(workspace, PARAMS)
    assert not decision.accepted
    assert "metrics cannot be read" in decision.reason


def test_absent_metrics_are_a_rejection(workspace: Workspace) -> None:
    (workspace.stage_dir("evaluate") / "metrics.json").unlink()
    assert not judge(workspace, PARAMS).accepted


@pytest.mark.parametrize(
    ("accuracy", "accepted"),
    [(0.9915, True), (0.9905, True), (0.9895, True), (0.9894, False), (0.985, False)],
)
def test_a_candidate_may_fall_behind_the_champion_by_the_allowed_drop_and_no_more(
    workspace: Workspace, accuracy: float, accepted: bool
) -> None:
    put_champion(workspace, CHAMPION)
    put_metrics(workspace, {**METRICS, "accuracy": accuracy})
    decision = judge(workspace, PARAMS)
    assert decision.accepted == accepted
    assert not decision.first_release
    assert any("0.9905 of version 3" in check.detail for check in decision.checks)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold a JSON object"),
        ({}, "no version number"),
        ({**CHAMPION, "version": "3"}, "no version number"),
        ({**CHAMPION, "model_sha256": None}, "no model_sha256"),
        ({**CHAMPION, "test_sha256": ""}, "no test_sha256"),
        ({**CHAMPION, "metrics": None}, "accuracy is missing"),
        ({**CHAMPION, "metrics": {}}, "accuracy is missing"),
        ({**CHAMPION, "metrics": {"accuracy": float("nan")}}, "accuracy is 'nan'"),
        ({**CHAMPION, "test_sha256": "c" * 64, "path": None}, "no path"),
        ({**CHAMPION, "test_sha256": "c" * 64}, "no complete version"),
    ],
)
def test_an_unreadable_champion_is_a_rejection_with_its_reason(workspace: Workspace, content: Any, said: str) -> None:
    put_champion(workspace, content)
    decision = judge(workspace, PARAMS)
    assert not decision.accepted
    assert not decision.first_release
    assert said in decision.reason


def test_a_champion_measured_on_other_images_is_not_compared_when_the_test_split_is_not_the_candidates(
    workspace: Workspace,
) -> None:
    put_champion(workspace, {**CHAMPION, "test_sha256": "c" * 64})
    put_metrics(workspace, {**METRICS, "test_sha256": "d" * 64})
    decision = judge(workspace, PARAMS)
    assert not decision.accepted
    assert "not what the candidate saw" in decision.reason


def test_the_champion_itself_is_accepted_as_already_published(workspace: Workspace) -> None:
    put_champion(workspace, {**CHAMPION, "model_sha256": METRICS["model_sha256"]})
    decision = judge(workspace, PARAMS)
    assert decision.accepted
    assert any("already published" in check.detail for check in decision.checks)


def params_with_gate() -> Params:
    content = small_params()
    content["gate"] = PARAMS.model_dump()
    return Params.model_validate(content)


def test_approval_is_the_same_bytes_once_the_candidate_is_the_champion(workspace: Workspace, quiet: Console) -> None:
    """So that a publication does not make the export stale."""
    gate(workspace, params_with_gate(), quiet)
    before = (workspace.stage_dir("gate") / "approval.json").read_bytes()
    put_champion(workspace, {**CHAMPION, "model_sha256": METRICS["model_sha256"]})
    gate(workspace, params_with_gate(), quiet)
    assert (workspace.stage_dir("gate") / "approval.json").read_bytes() == before


def test_a_rejection_is_written_as_json_even_when_metrics_hold_nan(workspace: Workspace, quiet: Console) -> None:
    put_metrics(workspace, {**METRICS, "accuracy": float("nan")})
    gate(workspace, params_with_gate(), quiet)
    decision = json.loads((workspace.stage_dir("gate") / "decision.json").read_text(), parse_constant=pytest.fail)
    assert decision["accepted"] is False
    assert {check["name"]: check["passed"] for check in decision["checks"]}["accuracy"] is False
    approval = json.loads((workspace.stage_dir("gate") / "approval.json").read_text())
    assert approval == {"schema": 1, "approved": False, "model_sha256": "a" * 64}
