"""What is served by default: one file decides, whatever kills the one who writes it, and each change is a row."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from digits import contract
from pipelines import ledger, recovery, serving_config
from pipelines.__main__ import app
from pipelines.champion import champion_record
from pipelines.disk import DiskError
from pipelines.ledger import Kind
from pipelines.promotion import PromotionError, is_withdrawn, promote, rollback
from pipelines.prune import prune
from pipelines.publish import publish
from pipelines.settings import Settings
from pipelines.versions import NoSuchVersion
from tests.pipelines.conftest import environment_for, run
from tests.pipelines.killing import die_at

NOBODY = "http://127.0.0.1:9"
"""No model server is there."""


def add_version(settings: Settings, number: int) -> None:
    """A published version, as far as promotions look at it."""
    folder = settings.versions_dir / str(number)
    lineage = {
        "version": number, "model_sha256": f"{number:064x}", "published_at": f"2026-01-{number:02}T00:00:00+00:00",
        "published_by": "tests@localhost", "previous_version": number - 1 or None, "data_md5": "0.dir",
        "git": {"commit": "c" * 40, "dirty": False}, "metrics": {"accuracy": 0.99, "test_sha256": "sealed"},
        "files_sha256": {"saved_model.pb": "0" * 64}, "decision": {"checks": [{"name": "ece", "passed": True}]},
    }  # fmt: skip
    (folder / contract.LINEAGE_FILE).parent.mkdir(parents=True)
    (folder / "saved_model.pb").write_text("graph")
    (folder / contract.LINEAGE_FILE).write_text(json.dumps(lineage))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """No version yet, and no model server."""
    settings = Settings(project=tmp_path, model_server_url=NOBODY)
    serving_config.ensure(settings)
    return settings


@pytest.fixture
def three(settings: Settings) -> Settings:
    """Three versions, each promoted in its turn."""
    for number in (1, 2, 3):
        add_version(settings, number)
        promote(settings, number)
    return settings


def loaded(settings: Settings) -> tuple[tuple[int, ...], int | None]:
    """The versions that models.config has loaded, and the promoted one."""
    config = serving_config.read(settings)
    assert config is not None
    return config.versions, config.promoted


def decisions(settings: Settings) -> list[tuple[str, int | None, int | None]]:
    """Kind, version, previous version of the ledger's promotions and rollbacks."""
    rows = ledger.read(settings, kinds=[Kind.PROMOTION, Kind.ROLLBACK])
    return [(str(e.decision.kind), e.decision.version, e.decision.previous_version) for e in rows]


def champion(settings: Settings) -> int:
    return (champion_record(settings) or {})["version"]


def test_before_the_first_promotion_the_newest_version_is_served(settings: Settings) -> None:
    """TensorFlow Serving's own text format, its own words for it, and no label."""
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    text = settings.serving_config_file.read_text()
    message = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (model,) = message.model_config_list.config
    assert (model.name, model.base_path) == ("digits", str(settings.versions_dir))
    assert model.model_version_policy.latest.num_versions == 1
    assert not model.version_labels


def test_promotion_keeps_the_version_before_it_loaded(three: Settings) -> None:
    """Champion and ledger follow; a second time it changes nothing."""
    assert loaded(three) == ((2, 3), 3)
    assert champion(three) == 3
    assert promote(three, 3).new is False
    assert decisions(three) == [("promotion", 1, None), ("promotion", 2, 1), ("promotion", 3, 2)]
    row = ledger.read(three)[-1].decision
    assert (row.model_sha256, row.data_md5, row.git_commit) == (f"{3:064x}", "0.dir", "c" * 40)


def test_rollback_goes_to_the_version_promoted_before_and_withdraws_what_it_left(three: Settings) -> None:
    """The champion, which the gate compares with, is what is served. Again, and it goes one further down."""
    done = rollback(three)
    assert (done.version, done.previous, done.new) == (2, 3, True)
    assert loaded(three) == ((1, 2), 2)
    assert champion(three) == 2
    assert [number for number in (1, 2, 3) if is_withdrawn(three, number)] == [3]
    assert rollback(three, note="worse on sevens").version == 1
    assert loaded(three) == ((1,), 1)
    with pytest.raises(PromotionError, match="no version was promoted before"):
        rollback(three)
    assert decisions(three)[-2:] == [("rollback", 2, 3), ("rollback", 1, 2)]
    assert ledger.read(three)[-1].decision.note == "worse on sevens"


def test_a_person_can_promote_again_what_was_rolled_back(three: Settings) -> None:
    rollback(three)
    promote(three, 3)
    assert loaded(three) == ((2, 3), 3)
    assert not is_withdrawn(three, 3)


def test_a_new_version_after_a_rollback_has_the_rolled_back_to_one_before_it(three: Settings) -> None:
    """Going back from 4 leads to 2, not to 3, which was bad."""
    rollback(three)
    add_version(three, 4)
    promote(three, 4)
    assert loaded(three) == ((2, 4), 4)
    assert rollback(three).version == 2


def test_wrong_directions_and_numbers_are_refused_with_the_right_command(three: Settings) -> None:
    before = three.serving_config_file.read_bytes()
    with pytest.raises(PromotionError, match="To go back: rollback --to 1"):
        promote(three, 1)
    rollback(three)
    after = three.serving_config_file.read_bytes()
    with pytest.raises(PromotionError, match="To go there: promote 3"):
        rollback(three, 3)
    with pytest.raises(NoSuchVersion, match=r"there is no version 9 in .* \(1, 2, 3\)"):
        promote(three, 9)
    assert before != after == three.serving_config_file.read_bytes()


def test_versions_from_before_there_was_a_models_config_stay_served(tmp_path: Path) -> None:
    """The newest counts as promoted, so that the next release can be rolled back to it."""
    settings = Settings(project=tmp_path, model_server_url=NOBODY)
    for number in (4, 5):
        add_version(settings, number)
    serving_config.ensure(settings)
    assert loaded(settings) == ((5,), 5)
    add_version(settings, 6)
    promote(settings, 6)
    assert rollback(settings).version == 5


def test_project_that_was_moved_names_its_new_folder(three: Settings, tmp_path: Path) -> None:
    """As it starts; nothing else changes."""
    moved = tmp_path.with_name("moved")
    shutil.copytree(tmp_path, moved)
    settings = Settings(project=moved, model_server_url=NOBODY)
    serving_config.ensure(settings)
    config = serving_config.read(settings)
    assert config is not None
    assert config.base_path == str(moved / "models" / "digits")
    assert (config.versions, config.promoted, config.predecessor) == ((2, 3), 3, 2)
    in_container = settings.model_copy(update={"served_models_dir": Path("/models")})
    serving_config.ensure(in_container)
    assert 'base_path: "/models/digits"' in settings.serving_config_file.read_text()


def test_file_that_is_no_configuration_is_never_overwritten(three: Settings) -> None:
    three.serving_config_file.write_text("model_config_list { config { name: ")
    for command in (lambda: promote(three, 3), lambda: rollback(three), lambda: serving_config.ensure(three)):
        with pytest.raises(serving_config.ServingConfigError, match="Move it away"):
            command()
    assert three.serving_config_file.read_text() == "model_config_list { config { name: "


@pytest.mark.parametrize("kind", ["promote", "rollback"])
def test_killed_between_any_two_file_operations_one_version_is_served_and_the_next_command_completes(
    settings: Settings, tmp_path: Path, kind: str
) -> None:
    """At every point models.config names one version that is there; then the same command ends with one row of it."""
    for number in (1, 2):
        add_version(settings, number)
        if number == 1 or kind == "rollback":
            promote(settings, number)
    work = {"promote": partial(promote, number=2), "rollback": rollback}[kind]
    old, new = (1, 2) if kind == "promote" else (2, 1)
    earlier = decisions(settings)
    template, killed_at = tmp_path.with_name(f"{tmp_path.name}-template"), []
    shutil.copytree(tmp_path, template)
    for operation in range(1, 200):
        project = tmp_path.with_name(f"{tmp_path.name}-{operation}")
        shutil.copytree(template, project)
        mine = settings.model_copy(update={"project": project})
        killed = die_at(operation, partial(work, mine))
        config = serving_config.read(mine)
        assert config is not None
        assert config.promoted in (old, new)
        assert config.promoted in config.versions
        recovery.complete(mine)
        assert champion(mine) == config.promoted
        expected = [*earlier, (str(Kind.PROMOTION if kind == "promote" else Kind.ROLLBACK), new, old)]
        assert decisions(mine) == (expected if config.promoted == new else earlier)
        if config.promoted == old:
            work(mine)
        assert decisions(mine) == expected
        assert loaded(mine) == (((1, 2), 2) if kind == "promote" else ((1,), 1))
        assert champion(mine) == new
        assert ledger.waiting(mine) == []
        assert not list(project.rglob("*.part"))
        shutil.rmtree(project)
        if not killed:
            break
        killed_at.append(operation)
    assert len(killed_at) > 10  # locks, models.config twice, champion, the waiting row, the ledger


def test_prune_keeps_what_is_served_what_one_would_go_back_to_and_the_newest(three: Settings) -> None:
    """Of ten versions; the highest number stays, so that none is ever given twice."""
    for number in range(4, 11):
        add_version(three, number)
    rollback(three)  # serves 2, keeps 1 loaded
    assert prune(three, 1, dry_run=True).removed == (3, 4, 5, 6, 7, 8, 9)
    assert len(list(three.versions_dir.glob("[0-9]*"))) == 10
    done = prune(three, 3)
    assert done.kept == {
        1: "the served one's predecessor", 2: "served",
        **dict.fromkeys((8, 9, 10), "one of the newest 3"),
    }  # fmt: skip
    assert sorted(int(path.name) for path in three.versions_dir.glob("[0-9]*")) == [1, 2, 8, 9, 10]
    rows = ledger.read(three, kinds=[Kind.PRUNE])
    assert [row.decision.version for row in rows] == [3, 4, 5, 6, 7]
    assert rows[0].decision.details["lineage"]["git"]["commit"] == "c" * 40


def test_killed_prune_is_completed_by_the_next_command(settings: Settings, tmp_path: Path) -> None:
    """At every point: whole or gone for a model server; at the end, files gone and one row for each."""
    for number in (1, 2, 3):
        add_version(settings, number)
    promote(settings, 3)
    template = tmp_path.with_name(f"{tmp_path.name}-template")
    shutil.copytree(tmp_path, template)
    for operation in range(1, 200):
        project = tmp_path.with_name(f"{tmp_path.name}-{operation}")
        shutil.copytree(template, project)
        mine = settings.model_copy(update={"project": project})
        killed = die_at(operation, partial(prune, mine, 1))
        for folder in mine.versions_dir.glob("[0-9]*"):
            assert (folder / "saved_model.pb").is_file()
            assert (folder / contract.LINEAGE_FILE).is_file()
        recovery.complete(mine)
        prune(mine, 1)
        assert [e.decision.version for e in ledger.read(mine, kinds=[Kind.PRUNE])] == [1, 2]
        assert [path.name for path in mine.versions_dir.iterdir() if not path.name.startswith(".publish")] == ["3"]
        shutil.rmtree(project)
        if not killed:
            break
    assert operation > 10


@contextmanager
def mounted(*words: str, folder: Path) -> Iterator[None]:
    """A file system there; skips the test where this user may not mount one."""
    done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_read_only_store_stops_publish_promotion_and_pruning_in_one_line(
    candidate: Callable, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system mounted read-only. What is served stays; writable again, the same commands go through."""
    monkeypatch.setenv("PYTHONPATH", environment_for(toy)["PYTHONPATH"])
    monkeypatch.setenv("DIGITS_MODEL_SERVER_URL", NOBODY)
    for weights in ("first", "second"):
        settings = candidate(weights)
        publish(settings)
    promote(settings, 1)
    candidate("third")
    models = toy / "models"
    before = settings.serving_config_file.read_bytes()
    subprocess.run(["mount", "--bind", str(models), str(models)], check=False)
    try:
        with mounted("--options", "remount,bind,ro", folder=models):
            for words in (["publish"], ["promote", "2"], ["prune", "--keep", "1"]):
                done = run(toy, "pipelines", *words)
                assert done.returncode == 1, words
                assert done.stderr.startswith("error: cannot store "), done.stderr
                assert "read-only file system" in done.stderr
                assert done.stderr.count("\n") == 1
            assert settings.serving_config_file.read_bytes() == before
    finally:
        subprocess.run(["umount", "--lazy", str(models)], check=False, capture_output=True)
    assert publish(settings).version.number == 3
    assert promote(settings, 3).new


def test_full_disk_while_publishing_and_promoting_leaves_what_is_served(
    candidate: Callable, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file system of 3 MB for the models. One line says so; with room again the same commands go through."""
    monkeypatch.setenv("PYTHONPATH", environment_for(toy)["PYTHONPATH"])
    settings = candidate("first").model_copy(update={"model_server_url": NOBODY})
    store = toy / "models"
    shutil.copytree(store, toy / "kept")
    with mounted("--types", "tmpfs", "--options", "size=3m", "tmpfs", folder=store):
        shutil.copytree(toy / "kept", store, dirs_exist_ok=True)
        publish(settings)
        promote(settings, 1)
        candidate("second " * 1000)  # 7 MB of variables
        with pytest.raises(DiskError, match="no space left"):
            publish(settings)
        assert [path.name for path in settings.versions_dir.glob("[0-9]*")] == ["1"]
        assert not list(settings.versions_dir.glob(".incoming*"))
        publish(candidate("second"))
        fill(store / "filler")
        before = settings.serving_config_file.read_bytes()
        with pytest.raises(DiskError, match="cannot store which version is served"):
            promote(settings, 2)
        assert settings.serving_config_file.read_bytes() == before
        assert champion(settings) == 1
        (store / "filler").unlink()
        assert promote(settings, 2).new
        assert champion(settings) == 2


def fill(path: Path) -> None:
    """Take all the room that is left."""
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(os.urandom(size))
            except OSError:
                continue


def said(project: Path, *words: str) -> str:
    """What a command prints, in this process."""
    done = CliRunner().invoke(app, list(words), env={"DIGITS_PROJECT": str(project), "DIGITS_MODEL_SERVER_URL": NOBODY})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_commands_speak_to_people_and_to_machines(three: Settings, tmp_path: Path) -> None:
    """History, show, rollback, prune; from a version's number to its data and commit."""
    back = run(tmp_path, "pipelines", "rollback", "--to", "2", "--note", "sevens")
    assert (back.returncode, back.stdout.partition(" (")[0]) == (0, "version 2 is served, in place of 3")
    assert "no model server answers" in back.stderr
    rows = json.loads(said(tmp_path, "history", "--json"))
    assert [(row["kind"], row["version"]) for row in rows][:4] == [
        ("promotion", 1), ("promotion", 2), ("promotion", 3), ("rollback", 2),
    ]  # fmt: skip
    assert {row["version"] for row in rows if row["kind"] == "release"} == {1, 2, 3}  # completed from the folders
    shown = said(tmp_path, "show", "3")
    assert "version 3: rolled back" in shown
    assert "0.dir" in shown
    assert "c" * 40 in shown
    known = json.loads(said(tmp_path, "show", "3", "--json"))
    assert (known["lineage"]["data_md5"], known["lineage"]["git"]["commit"]) == ("0.dir", "c" * 40)
    assert known["files_unchanged"] is False  # the file is not the one that its lineage names
    pruned = json.loads(said(tmp_path, "prune", "--keep", "1", "--json"))
    assert pruned["removed"] == []
    nothing = run(tmp_path, "pipelines", "show", "9")
    assert (nothing.returncode, nothing.stderr.count("\n")) == (1, 1)
    assert "nor the ledger knows a version 9" in nothing.stderr
    assert run(tmp_path, "pipelines", "history", "--kind", "coup").returncode == 2
