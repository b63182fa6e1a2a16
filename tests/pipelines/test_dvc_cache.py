"""A damaged object in the DVC cache is found and named, and the next run has everything again."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from pipelines import versioning
from pipelines.ingest import ingest
from pipelines.settings import Settings
from tests.pipelines.conftest import run


def damage(project: Path, file: str) -> Path:
    """Flips a byte of the cached object of a file, as a failing disk does: size, time and mode stay."""
    digest = hashlib.md5((project / file).read_bytes(), usedforsecurity=False).hexdigest()
    path = project / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)
    return path


@pytest.fixture(scope="module")
def built_template(toy_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of which one stage has run."""
    project = Path(shutil.copytree(toy_template, tmp_path_factory.mktemp("built") / "project"))
    done = run(project, "dvc", "repro", "evaluate")
    assert done.returncode == 0, done.stderr
    return project


@pytest.fixture
def built(built_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built_template, tmp_path / "project"))


def test_damaged_objects_are_put_back_from_the_working_copies(built: Path) -> None:
    """Raw data and a stage's output alike, as a release does it at its start: named, and whole again."""
    paths = [damage(built, file) for file in ("data/labels", "artifacts/evaluate/metrics.json")]
    told: list[str] = []
    ingest(Settings(project=built), repair=False, tell=told.append)
    assert sorted(told) == [
        f"DVC cache: the object of {file} was damaged and is removed; put back from {file}"
        for file in ("artifacts/evaluate/metrics.json", "data/labels")
    ]
    for path, content in zip(paths, ("labels", '"accuracy": 0.99'), strict=True):
        assert content in path.read_text()


def test_damaged_stage_output_is_made_again_by_the_next_run(built: Path) -> None:
    """Its working copy is gone too: DVC would hand the damaged object out; here the stage runs again."""
    good = (built / "artifacts" / "evaluate" / "metrics.json").read_text()
    path = damage(built, "artifacts/evaluate/metrics.json")
    shutil.rmtree(built / "artifacts" / "evaluate")
    done = run(built, "pipelines", "ingest")
    assert "the object of artifacts/evaluate/metrics.json was damaged and is removed; stage evaluate" in done.stderr
    assert not path.exists()
    repro = run(built, "dvc", "repro", "evaluate")
    assert repro.returncode == 0, repro.stderr
    assert (built / "artifacts" / "evaluate" / "metrics.json").read_text() == good
    assert json.loads(run(built, "dvc", "status", "--json", "evaluate").stdout) == {}


def test_damage_to_an_older_version_is_found_by_ingest(toy: Path) -> None:
    """What is recorded now is whole; the command that a person runs looks at all of the cache."""
    settings = Settings(project=toy)
    path = damage(toy, "data/labels")
    (toy / "data" / "labels").write_text("newer labels")
    with versioning.open_repo(settings) as repo:
        versioning.record_data(repo, replace=True)
    told: list[str] = []
    ingest(settings, repair=False, tell=told.append)
    assert (told, path.exists()) == ([], True)
    ingest(settings, tell=told.append)
    assert len(told) == 1
    version = f"an older version ({path.parent.name}{path.name[:10]}…)"
    assert told[0].startswith(f"DVC cache: the object of {version} was damaged and is removed")
    assert not path.exists()
