"""dvc.yaml depends on what the stages really read: no less, and no more."""

import ast
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.training.conftest import ROOT
from training.params import Params

STAGES: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]

# Dispatch and checks only: dvc.yaml says why they are left out.
LEFT_OUT = {"training/__init__.py", "training/params.py", "digits/__init__.py", "digits/errors.py"}


def imported_files(path: Path) -> set[str]:
    """The repository's own modules that a module imports, and theirs."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        name = str(current.relative_to(ROOT))
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(current.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("training", "digits"):
                base = ROOT / node.module.replace(".", "/")
                modules = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
                waiting += [module for module in modules if module.exists()]
    return found


def test_the_stages_are_in_their_order() -> None:
    assert list(STAGES) == ["validate", "prepare", "train", "twin", "evaluate", "probe", "gate", "export"]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_exactly_the_modules_it_imports(name: str) -> None:
    code = {dep for dep in STAGES[name]["deps"] if dep.endswith(".py")}
    assert code == imported_files(ROOT / "training" / f"{name}.py") - LEFT_OUT


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_params_are_sections_that_exist(name: str) -> None:
    sections = {field.alias or key for key, field in Params.model_fields.items()}
    assert set(STAGES[name]["params"]) <= sections


def test_every_section_of_params_reaches_a_stage() -> None:
    """A value that nothing depends on could be changed without effect. A search is no stage: it proposes values."""
    sections = {field.alias or key for key, field in Params.model_fields.items()} - {"search"}
    assert {param for stage in STAGES.values() for param in stage["params"]} == sections


def test_only_evaluate_and_gate_read_the_sealed_test_split() -> None:
    readers = {name for name, stage in STAGES.items() if "artifacts/prepare/test.npz" in stage["deps"]}
    assert readers == {"evaluate", "gate"}


def test_stages_write_below_artifacts_only() -> None:
    for name, stage in STAGES.items():
        for out in [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]:
            assert out.startswith(f"artifacts/{name}/")


def test_the_champion_is_a_dependency_of_the_gate_and_the_approval_of_the_export() -> None:
    assert "models/champion" in STAGES["gate"]["deps"]
    assert "artifacts/gate/approval.json" in STAGES["export"]["deps"]
    assert "artifacts/gate/decision.json" not in STAGES["export"]["deps"]
