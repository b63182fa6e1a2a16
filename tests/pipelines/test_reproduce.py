"""From a version back to what it was made of: built again apart, and compared."""

import json
import subprocess
from pathlib import Path

from pipelines import ledger
from pipelines.ledger import Kind
from pipelines.settings import Settings
from tests.pipelines.conftest import commit, run


def test_version_is_built_again_from_its_commit_and_nothing_else_is_touched(released: Path) -> None:
    """The project has gone on meanwhile: other code, other weights, other parameters. The version is identical."""
    (released / "weights.txt").write_text("later")
    (released / "params.yaml").write_text("seed: 8\n")
    commit(released)
    before = {path: path.stat().st_mtime_ns for path in (released / "artifacts").rglob("*")}
    done = run(released, "pipelines", "reproduce", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical: weights ")
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("✓")] == [
        "evaluate",
        "gate",
        "export",
    ]
    assert {path: path.stat().st_mtime_ns for path in (released / "artifacts").rglob("*")} == before
    assert not list((released / "run").glob("reproduce-*"))
    (entry,) = ledger.read(Settings(project=released), kinds=[Kind.REPRODUCTION])
    assert entry.decision.version == 1
    assert entry.decision.details["variables_identical"] is True


def test_version_that_comes_out_otherwise_says_where_and_why(released: Path) -> None:
    """Its weights came from a change that was never committed: exit code 4, the stage and the file are named.

    What an earlier reproduction left when it was killed is removed.
    """
    (released / "weights.txt").write_text("never committed")
    for words in (("dvc", "repro"), ("pipelines", "publish")):
        assert run(released, *words).returncode == 0
    (released / "weights.txt").write_text("first")
    (released / "run" / "reproduce-leftover").mkdir()
    done = run(released, "pipelines", "reproduce", "2", "--json")
    assert done.returncode == 4, done.stderr
    found = json.loads(done.stdout)
    assert (found["identical"], found["variables_identical"]) == (False, False)
    assert found["differing_outputs"][0] == "evaluate: artifacts/evaluate/metrics.json"
    assert found["differing_sources"] == ["weights.txt"]
    assert "! weights.txt is not what it was" in done.stderr
    assert not list((released / "run").glob("reproduce-*"))
    (entry,) = ledger.read(Settings(project=released), kinds=[Kind.REPRODUCTION])
    assert (
        "first difference in evaluate: artifacts/evaluate/metrics.json (weights.txt was changed" in entry.decision.note
    )


def test_commit_that_is_not_here_is_named(released: Path) -> None:
    """One line that says what to fetch; likewise for data that the cache has not."""
    lineage = released / "models" / "digits" / "1" / "assets.extra" / "lineage.json"
    content = json.loads(lineage.read_text())
    lineage.write_text(json.dumps({**content, "data_md5": f"{'0' * 32}.dir"}))
    no_data = run(released, "pipelines", "reproduce", "1")
    assert no_data.returncode == 1
    assert "the data of that version" in no_data.stderr.splitlines()[-1]
    lineage.write_text(json.dumps({**content, "git": {"commit": "0" * 40}}))
    no_commit = run(released, "pipelines", "reproduce", "1")
    assert no_commit.returncode == 1
    assert f"commit {'0' * 40} is not in this repository; fetch it first" in no_commit.stderr.splitlines()[-1]
    subprocess.run(["rm", "-rf", str(released / ".git")], check=True)
    assert "Clone it" in run(released, "pipelines", "reproduce", "1").stderr.splitlines()[-1]
