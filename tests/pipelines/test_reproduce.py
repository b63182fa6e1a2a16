"""From a version back to what it was made of: built again apart, and compared."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines import ledger
from pipelines.ledger import Kind
from pipelines.reproduce import CannotReproduce, reproduce
from pipelines.settings import Settings
from tests.pipelines.conftest import commit, run


@pytest.fixture(scope="module")
def published(toy_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 of what is committed, and version 2 of a change that never was."""
    project = Path(shutil.copytree(toy_template, tmp_path_factory.mktemp("published") / "project"))
    for weights in ("first", "never committed"):
        (project / "weights.txt").write_text(weights)
        for words in (("dvc", "repro", "-q"), ("pipelines", "publish")):
            done = run(project, *words)
            assert done.returncode == 0, done.stderr
    return project


@pytest.fixture
def project(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "project"))


def test_version_is_built_again_from_its_commit_and_nothing_else_is_touched(project: Path) -> None:
    """The project has gone on meanwhile: other code, other weights, other parameters. The version is identical."""
    (project / "weights.txt").write_text("later")
    (project / "params.yaml").write_text("seed: 8\n")
    commit(project)
    before = {path: path.stat().st_mtime_ns for path in (project / "artifacts").rglob("*")}
    done = run(project, "pipelines", "reproduce", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical: weights ")
    done_stages = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("✓")]
    assert done_stages == ["evaluate", "gate", "export"]
    assert {path: path.stat().st_mtime_ns for path in (project / "artifacts").rglob("*")} == before
    assert not list((project / "run").glob("reproduce-*"))
    (entry,) = ledger.read(Settings(project=project), kinds=[Kind.REPRODUCTION])
    assert entry.decision.version == 1
    assert entry.decision.details["variables_identical"] is True


def test_version_that_comes_out_otherwise_says_where_and_why(project: Path) -> None:
    """Its weights came from a change that was never committed: exit code 4, the stage and the file are named.

    What an earlier reproduction left when it was killed is removed.
    """
    (project / "run" / "reproduce-leftover").mkdir()
    done = run(project, "pipelines", "reproduce", "2", "--json")
    assert done.returncode == 4, done.stderr
    found = json.loads(done.stdout)
    assert (found["identical"], found["variables_identical"]) == (False, False)
    assert found["differing_outputs"][0] == "evaluate: artifacts/evaluate/metrics.json"
    assert found["differing_sources"] == ["weights.txt"]
    assert "! weights.txt is not what it was" in done.stderr
    assert not list((project / "run").glob("reproduce-*"))
    (entry,) = ledger.read(Settings(project=project), kinds=[Kind.REPRODUCTION])
    assert (
        "first difference in evaluate: artifacts/evaluate/metrics.json (weights.txt was changed" in entry.decision.note
    )


def test_commit_that_is_not_here_is_named(project: Path) -> None:
    """One line that says what to fetch; likewise for data that the cache has not."""
    lineage = project / "models" / "digits" / "1" / "assets.extra" / "lineage.json"
    content = json.loads(lineage.read_text())
    lineage.write_text(json.dumps({**content, "data_md5": f"{'0' * 32}.dir"}))
    settings = Settings(project=project)
    with pytest.raises(CannotReproduce, match="the data of that version"):
        reproduce(settings, 1)
    lineage.write_text(json.dumps({**content, "git": {"commit": "0" * 40}}))
    with pytest.raises(CannotReproduce, match=f"commit {'0' * 40} is not in this repository; fetch it first"):
        reproduce(settings, 1)
    shutil.rmtree(project / ".git")
    with pytest.raises(CannotReproduce, match="Clone it"):
        reproduce(settings, 1)
