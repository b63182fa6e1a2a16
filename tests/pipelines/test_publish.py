"""A version appears whole or not at all, once, and only when it was approved; whatever kills the publisher."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from digits import contract
from pipelines import ledger, recovery
from pipelines.candidate import CandidateError, Rejected
from pipelines.dataset import digest_of
from pipelines.disk import DiskError
from pipelines.locks import Busy, only_one
from pipelines.promotion import promote, rollback
from pipelines.publish import PublishError, publish
from pipelines.settings import Settings
from pipelines.versions import newest_version
from tests.conftest import HANG_S
from tests.pipelines.conftest import environment_for
from tests.pipelines.killing import die_at


@pytest.fixture(autouse=True)
def _own_training_first(monkeypatch: pytest.MonkeyPatch, toy: Path) -> None:
    """`python -m training verify` is the project's own."""
    monkeypatch.setenv("PYTHONPATH", environment_for(toy)["PYTHONPATH"])


def versions(settings: Settings) -> list[str]:
    """Whatever a model server could take for a version."""
    return sorted((path.name for path in settings.versions_dir.iterdir() if path.name.isdecimal()), key=int)


def leftovers(settings: Settings) -> list[str]:
    return [path.name for path in settings.versions_dir.iterdir() if path.name.startswith(".incoming")]


def require_whole(version: Path) -> None:
    """Every file that its lineage names is there with its SHA-256, and no other."""
    lineage = json.loads((version / contract.LINEAGE_FILE).read_text())
    files = {str(p.relative_to(version)) for p in version.rglob("*") if p.is_file()}
    assert files == {*lineage["files_sha256"], contract.LINEAGE_FILE}
    for name, digest in lineage["files_sha256"].items():
        assert digest_of(version / name) == digest


def champion(settings: Settings) -> dict:
    return json.loads(settings.champion_file.read_text())


def test_versions_count_up_and_the_same_weights_are_published_once(candidate) -> None:
    """First 1; the same again changes nothing; other weights become 2, and 1 stays as it was."""
    settings = candidate("first")
    first = publish(settings)
    assert (first.new, first.version.number) == (True, 1)
    before = {p: p.stat().st_mtime_ns for p in (settings.versions_dir / "1").rglob("*")}
    again = publish(settings)
    assert (again.new, again.version.number) == (False, 1)
    second = publish(candidate("second"))
    assert (second.new, second.version.number) == (True, 2)
    assert second.version.lineage["previous_version"] == 1
    assert {p: p.stat().st_mtime_ns for p in (settings.versions_dir / "1").rglob("*")} == before
    assert versions(settings) == ["1", "2"]


def test_weights_that_were_rolled_back_do_not_come_back_under_another_number(candidate) -> None:
    """Not even after other versions: they are found in the version that a person went back from."""
    for weights in ("first", "bad"):
        settings = candidate(weights).model_copy(update={"model_server_url": "http://127.0.0.1:9"})
        promote(settings, publish(settings).version.number)
    rollback(settings)
    candidate("third")
    promote(settings, publish(settings).version.number)
    candidate("bad")
    again = publish(settings)
    assert (again.new, again.version.number) == (False, 2)
    assert versions(settings) == ["1", "2", "3"]


def test_lineage_leads_back_to_commit_data_and_parameters(candidate, toy: Path) -> None:
    """From a version alone one finds what it was made of, and can check its files."""
    settings = candidate("other")
    lineage = publish(settings).version.lineage
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=toy, capture_output=True, text=True, check=True).stdout
    assert lineage["git"]["commit"] == commit.strip()
    assert lineage["git"]["dirty"] is True
    assert lineage["git"]["changed_files"] == ["weights.txt"]
    assert f"md5: {lineage['data_md5']}\n" in (toy / "data.dvc").read_text()
    assert lineage["params"] == {"seed": 7, "profile": "quick", "profiles": {"quick": {}, "full": {}}}
    assert lineage["params_sha256"] == digest_of(toy / "params.yaml")
    assert lineage["metrics"]["accuracy"] == 0.99
    assert lineage["decision"]["accepted"] is True
    assert "tensorflow" in lineage["packages"]
    require_whole(settings.versions_dir / "1")


def test_champion_record_is_what_the_gate_reads(candidate) -> None:
    """Version, weights, path in the project, metrics and the test split's hash, as agreed with the gate."""
    settings = candidate("first")
    done = publish(settings)
    record = champion(settings)
    assert record["version"] == 1
    assert record["path"] == "models/digits/1"
    assert record["model_sha256"] == done.version.model_sha256
    assert record["metrics"]["accuracy"] == 0.99
    assert record["test_sha256"] == "sealed"
    assert record["published_at"] == done.version.lineage["published_at"]


def test_rejected_candidate_is_never_published(candidate) -> None:
    """Also when an export of it lies there, as from an earlier approval."""
    settings = candidate("first")
    publish(settings)
    with pytest.raises(Rejected, match="accuracy is below its floor"):
        publish(candidate("worse", 0.5))
    assert versions(settings) == ["1"]
    assert champion(settings)["version"] == 1


@pytest.mark.parametrize(("stage", "file"), [("evaluate", "metrics.json"), ("export", "export.json")])
def test_parts_of_different_candidates_are_not_published(candidate, toy: Path, stage: str, file: str) -> None:
    """Approval, metrics and export must be about the same weights."""
    settings = candidate("first")
    path = toy / "artifacts" / stage / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_sha256": "0" * 64}))
    with pytest.raises(CandidateError, match=f"{file} is about 000000000000"):
        publish(settings)
    assert versions(settings) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"approved": "yes"}'], ids=["empty", "cut off", "list", "vague"])
def test_unclear_approval_is_no_approval(candidate, toy: Path, content: str) -> None:
    """It fails closed."""
    settings = candidate("first")
    (toy / "artifacts" / "gate" / "approval.json").write_text(content)
    with pytest.raises(CandidateError, match=r"approval\.json"):
        publish(settings)
    assert versions(settings) == []


def test_candidate_that_answers_otherwise_is_not_published(candidate) -> None:
    """The copy that would be served is loaded and asked in a fresh process; its own words say what is wrong."""
    settings = candidate("unloadable")
    with pytest.raises(PublishError, match="answers otherwise than it was trained to"):
        publish(settings)
    assert versions(settings) == []
    assert leftovers(settings) == []
    assert not settings.champion_file.exists()


def with_other_weights(settings: Settings, weights: str) -> None:
    """The candidate as the stages would leave it with other weights, without running them."""
    sha256 = hashlib.sha256(weights.encode()).hexdigest()
    for name in ("gate/approval.json", "evaluate/metrics.json", "export/export.json"):
        path = settings.artifacts_dir / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_sha256": sha256}))
    (settings.artifacts_dir / "export" / "saved_model" / "variables" / "variables.data").write_text(weights)


def test_killed_between_any_two_file_operations_the_next_run_completes(candidate) -> None:
    """At every point: what can be served is whole, and one further run ends with that version, its record, no rests."""
    settings = candidate("first")
    publish(settings)
    number, operation, killed_at = 1, 0, []
    while True:
        operation += 1
        with_other_weights(settings, f"weights {operation}")
        killed = die_at(operation, partial(publish, settings))
        for version in versions(settings):
            require_whole(settings.versions_dir / version)
        recovery.complete(settings)
        done = publish(settings)
        number += 1
        assert versions(settings) == [str(n) for n in range(1, number + 1)]
        assert done.version.number == number
        assert champion(settings)["version"] == number
        assert champion(settings)["model_sha256"] == done.version.model_sha256
        assert leftovers(settings) == []
        if not killed:
            break
        killed_at.append(operation)
    assert len(killed_at) > 10  # folders, copies, the check, lineage, rename, champion, ledger
    assert [entry.decision.version for entry in ledger.read(settings)] == list(range(1, number + 1))
    assert ledger.waiting(settings) == []


def test_two_publishers_at_once_make_one_version(candidate, toy: Path) -> None:
    """The second waits, then finds the work done."""
    settings = candidate("first")
    command = [sys.executable, "-m", "pipelines", "publish"]
    both = [
        subprocess.Popen(command, cwd=toy, env=environment_for(toy), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = sorted(process.communicate(timeout=HANG_S)[0].strip() for process in both)
    assert said == ["version 1 holds these weights already", "version 1 published"]
    assert versions(settings) == ["1"]


def test_a_publisher_that_waits_too_long_names_the_other(candidate, toy: Path) -> None:
    """It does not go ahead, and says which process is in the way."""
    settings = candidate("first").model_copy(update={"lock_timeout_s": 0.0})
    settings.versions_dir.mkdir(parents=True)
    with (
        only_one(settings.versions_dir / ".publish.lock", "publisher"),
        pytest.raises(Busy, match=f"another publisher .process {os.getpid()}."),
    ):
        publish(settings)
    assert versions(settings) == []


def test_full_disk_leaves_what_is_served_alone(candidate, toy: Path) -> None:
    """One line that says so; no half version; with room again the next run publishes."""
    settings = candidate("first")
    publish(settings)
    candidate("second " * 1000)  # 7 MB of variables
    limited = f"ulimit -f 2000; exec {sys.executable} -m pipelines publish"
    full = subprocess.run(["bash", "-c", limited], cwd=toy, env=environment_for(toy), capture_output=True, text=True)
    assert full.returncode == 1
    assert full.stderr.startswith("error: cannot store the new version in ")
    assert "no space left" in full.stderr
    assert "the version served now is untouched" in full.stderr
    assert full.stderr.count("\n") == 1
    assert versions(settings) == ["1"]
    assert leftovers(settings) == []
    assert publish(settings).version.number == 2


def test_store_that_cannot_be_written_is_named(candidate, toy: Path) -> None:
    """Here a file lies where the folder of versions should be."""
    settings = candidate("first")
    (toy / "models" / "digits").write_text("in the way")
    with pytest.raises(DiskError, match=r"cannot store the new version in .*models/digits"):
        publish(settings)


def test_version_without_lineage_is_never_overwritten(candidate) -> None:
    """A folder someone put there by hand counts as a version: the next one comes after it."""
    settings = candidate("first")
    (settings.versions_dir / "7").mkdir(parents=True)
    assert publish(settings).version.number == 8
    newest = newest_version(settings.versions_dir)
    assert newest is not None
    assert newest.number == 8
