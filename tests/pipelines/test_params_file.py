"""params.yaml is changed as a person would change it."""

import difflib
import shutil
from pathlib import Path

import pytest

from pipelines.params_file import BadProfile, choose_profile
from pipelines.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return Settings(project=tmp_path)


def test_choosing_a_profile_changes_one_line(settings: Settings) -> None:
    """Comments, order and quotes stay, so that a diff shows what was done."""
    said: list[str] = []
    choose_profile(settings, "full", said.append)
    before, after = ((folder / "params.yaml").read_text().splitlines() for folder in (ROOT, settings.project))
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert [line[:16] for line in changed] == ["- profile: quick", "+ profile: full "]
    assert said == ["params.yaml: profile quick is now full"]


def test_choosing_the_profile_that_stands_there_writes_nothing(settings: Settings) -> None:
    before = (settings.project / "params.yaml").stat()
    choose_profile(settings, "quick", pytest.fail)
    after = (settings.project / "params.yaml").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_unknown_profile_is_refused_with_those_there_are(settings: Settings) -> None:
    with pytest.raises(BadProfile, match=r"profile is 'fast'; params\.yaml has quick, full"):
        choose_profile(settings, "fast", pytest.fail)


def test_a_file_without_profiles_is_refused(settings: Settings) -> None:
    (settings.project / "params.yaml").write_text("seed: 7\n")
    with pytest.raises(BadProfile, match=r"params\.yaml has none"):
        choose_profile(settings, "full", pytest.fail)
    (settings.project / "params.yaml").unlink()
    with pytest.raises(BadProfile, match="No such file"):
        choose_profile(settings, "full", pytest.fail)
