"""The ledger: rows are added and never changed, none is lost or there twice, whatever happens to the database."""

import io
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from rich.console import Console

from pipelines import ledger, serving_config
from pipelines.history import history_table
from pipelines.ledger import Kind, database, spool
from pipelines.settings import Settings
from tests.pipelines.conftest import environment_for
from tests.postgres import Postgres, running_postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """An empty ledger on each engine."""
    if request.param == "sqlite":
        return Settings(project=tmp_path)
    return Settings(project=tmp_path, ledger_url=request.getfixturevalue("postgres").new_database())


def decision(number: int) -> ledger.Decision:
    return ledger.Decision(
        Kind.PROMOTION, version=number, previous_version=number - 1, git_dirty=False, note="å ↶",
        metrics={"accuracy": 0.99}, checks=[{"name": "ece", "passed": True}], details={"n": [1, None]},
    )  # fmt: skip


def engine_of(settings: Settings) -> sa.Engine:
    return sa.create_engine(database._url(settings))


def test_rows_come_back_as_they_went_in_and_in_order(settings: Settings) -> None:
    rows = [decision(number) for number in (3, 1, 2)]
    for row in rows:
        assert ledger.record(settings, row)
    entries = ledger.read(settings)
    assert [entry.decision for entry in entries] == rows
    assert [entry.seq for entry in entries] == [1, 2, 3]
    assert [entry.decision.version for entry in ledger.read(settings, limit=2)] == [1, 2]
    assert [entry.decision.version for entry in ledger.read(settings, version=1)] == [1, 2]  # to it, and away from it
    assert ledger.read(settings, kinds=[Kind.ROLLBACK]) == []
    assert json.loads(json.dumps(entries[0].as_json()))["note"] == "å ↶"


CHANGES = {
    "sqlite": [
        "UPDATE decisions SET note = 'nothing happened'",
        "DELETE FROM decisions",
        "INSERT OR REPLACE INTO decisions SELECT * FROM decisions",
    ],
    "postgresql": [
        "UPDATE decisions SET note = 'nothing happened'",
        "DELETE FROM decisions",
        "TRUNCATE decisions",
    ],
}


def test_database_itself_refuses_to_change_a_row(settings: Settings) -> None:
    """Also to its owner: only a migration could take the triggers away."""
    ledger.record(settings, decision(1))
    engine = engine_of(settings)
    for change in CHANGES[engine.dialect.name]:
        with engine.connect() as connection, pytest.raises(sa.exc.DBAPIError, match="append-only"):
            connection.execute(sa.text(change))
    (entry,) = ledger.read(settings)
    assert entry.decision.note == "å ↶"


def test_many_writers_at_once_leave_no_gap(settings: Settings) -> None:
    """Each row once, numbered 1 to n, each writer's own in its order."""

    def write(writer: int) -> None:
        for number in range(5):
            database.append(settings, [ledger.Decision(Kind.RELEASE, version=number, who=str(writer))])

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = ledger.read(settings)
    assert [entry.seq for entry in entries] == list(range(1, 21))
    for writer in range(4):
        assert [e.decision.version for e in entries if e.decision.who == str(writer)] == [0, 1, 2, 3, 4]


def test_delivered_again_a_row_is_there_once(settings: Settings) -> None:
    """As after a kill between the database's answer and the removal of the waiting file."""
    folder = spool.spool_dir(settings)
    deliver = spool.deliver
    spool_only = pytest.MonkeyPatch()
    spool_only.setattr(spool, "deliver", lambda *_a, **_k: False)
    rows = [decision(number) for number in (1, 2)]
    for row in rows:
        ledger.record(settings, row)
    spool_only.undo()
    shutil.copytree(folder, folder.with_name("copy"))
    assert deliver(settings)
    assert ledger.waiting(settings) == []
    folder.rmdir()
    folder.with_name("copy").rename(folder)
    assert deliver(settings)
    assert [entry.decision for entry in ledger.read(settings)] == rows


def test_damaged_waiting_file_is_put_aside_and_holds_up_no_other(tmp_path: Path) -> None:
    settings = Settings(project=tmp_path)
    spool.spool_dir(settings).mkdir(parents=True)
    (spool.spool_dir(settings) / "00000001-x.json").write_text("{")
    said: list[str] = []
    ledger.record(settings, decision(1), tell=said.append)
    assert [entry.decision.version for entry in ledger.read(settings)] == [1]
    assert "00000001-x.damaged holds no decision" in said[0]


def test_table_is_what_the_migrations_make(settings: Settings) -> None:
    """The newest migration is the one that the code expects, and leaves nothing to be changed."""
    ledger.record(settings, decision(1))
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == database.SCHEMA
    with engine_of(settings).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), database.metadata) == []


def test_table_of_newer_code_is_left_alone_and_the_row_waits(settings: Settings) -> None:
    """An old checkout beside a new one: nothing is lost, and it says what to do."""
    ledger.record(settings, decision(1))
    with engine_of(settings).begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    said: list[str] = []
    assert ledger.record(settings, decision(2), tell=said.append)
    assert "of a newer version of this code" in said[0]
    assert len(ledger.waiting(settings)) == 1
    with pytest.raises(ledger.LedgerError, match="update the code"):
        ledger.read(settings)


def test_database_gone_stops_nothing_and_back_gets_every_row_in_order(tmp_path: Path) -> None:
    """PostgreSQL is crashed, then started again: what was decided meanwhile arrives once, before what comes after."""
    with running_postgres() as server:
        settings = Settings(project=tmp_path, ledger_url=server.new_database())
        said: list[str] = []
        ledger.record(settings, decision(1), tell=said.append)
        server.stop(signal.SIGQUIT)
        assert ledger.record(settings, decision(2), tell=said.append)
        assert ledger.record(settings, decision(3), tell=said.append)
        with pytest.raises(ledger.LedgerAway, match="postgresql"):
            ledger.read(settings)
        assert "the ledger is away (postgresql+psycopg://digits@" in said[0]
        assert "2 decisions wait in" in said[1]
        server.start()
        ledger.record(settings, decision(4), tell=said.append)
        assert said[2] == "3 decisions that waited are in the ledger now"
        entries = ledger.read(settings)
        assert [(entry.seq, entry.decision.version) for entry in entries] == [(1, 1), (2, 2), (3, 3), (4, 4)]
        assert ledger.waiting(settings) == []


def test_publish_goes_on_without_the_database(candidate: Callable, monkeypatch: pytest.MonkeyPatch, toy: Path) -> None:
    """Here the ledger's file cannot be opened: a folder lies in its place. The version is published, its row waits."""
    from pipelines.publish import publish

    monkeypatch.setenv("PYTHONPATH", environment_for(toy)["PYTHONPATH"])
    settings = candidate("first")
    (settings.run_dir / "ledger.sqlite").mkdir(parents=True)
    said: list[str] = []
    assert publish(settings, tell=said.append).version.number == 1
    assert "the ledger is away" in said[-1]
    (settings.run_dir / "ledger.sqlite").rmdir()
    assert ledger.deliver(settings)
    (entry,) = ledger.read(settings)
    lineage = json.loads((settings.versions_dir / "1" / "assets.extra" / "lineage.json").read_text())
    assert (entry.decision.kind, entry.decision.version) == (Kind.RELEASE, 1)
    assert entry.decision.git_commit == lineage["git"]["commit"]
    assert entry.decision.data_md5 == lineage["data_md5"]
    assert entry.decision.params_sha256 == lineage["params_sha256"]
    assert entry.decision.saved_model_sha256 == lineage["saved_model_sha256"]
    assert entry.decision.metrics["accuracy"] == 0.99
    assert [check["name"] for check in entry.decision.checks] == ["accuracy"]
    assert "@" in entry.decision.who


def test_same_rejection_met_again_is_one_row(candidate: Callable) -> None:
    """A nightly release that finds the same verdict adds nothing; another candidate's rejection does."""
    from pipelines.candidate import read_verdict, record_rejection

    for accuracy in (0.5, 0.5, 0.4):
        settings = candidate(f"worse {accuracy}", accuracy)
        record_rejection(settings, read_verdict(settings))
    entries = ledger.read(settings)
    assert [(e.decision.kind, e.decision.metrics["accuracy"]) for e in entries] == [
        ("rejection", 0.5),
        ("rejection", 0.4),
    ]
    assert entries[0].decision.note == "accuracy is below its floor"
    assert entries[0].decision.checks[0]["passed"] is False
    assert entries[0].decision.data_md5


def test_clock_set_back_does_not_change_the_order(tmp_path: Path) -> None:
    """A promotion six years ago by the clock is still the last row; people see that the clock was turned."""
    if shutil.which("faketime") is None:
        pytest.skip("needs faketime: apt-get install faketime")
    for number in (1, 2):
        (tmp_path / "models" / "digits" / str(number)).mkdir(parents=True)
    promote = [sys.executable, "-m", "pipelines", "promote"]
    settings = Settings(project=tmp_path)
    (tmp_path / "models" / "digits" / "2").rename(tmp_path / "2")  # so that 1 is what was served
    serving_config.ensure(settings)
    (tmp_path / "2").rename(tmp_path / "models" / "digits" / "2")
    ledger.record(settings, decision(1))
    done = subprocess.run(
        ["faketime", "2020-02-02 02:02:02", *promote, "2"],
        cwd=tmp_path, env=environment_for(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entries = ledger.read(settings)
    assert [(e.seq, e.decision.version, e.decision.at.year >= 2026) for e in entries] == [(1, 1, True), (2, 2, False)]
    with Console(file=io.StringIO(), width=100) as console:
        console.print(history_table(entries, title="ledger"))
    shown = console.file.getvalue()
    assert "2020-02-02 02:02 ↶" in shown
    assert shown.index("1 → 2") < shown.index("0 → 1")  # newest first


def test_sqlite_file_is_one_file_that_any_tool_reads(tmp_path: Path) -> None:
    settings = Settings(project=tmp_path)
    ledger.record(settings, decision(7))
    with sqlite3.connect(tmp_path / "run" / "ledger.sqlite") as connection:
        assert connection.execute("SELECT version FROM decisions").fetchall() == [(7,)]


@pytest.mark.parametrize("url", ["mysql://host/db", "no address"])
def test_address_that_cannot_be_used_is_named_without_its_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(ledger.LedgerError, match="DIGITS_LEDGER_URL"):
        ledger.read(Settings(project=tmp_path, ledger_url=url))
    secret = Settings(project=tmp_path, ledger_url="postgresql://me:hidden@127.0.0.1:9/db")
    with pytest.raises(ledger.LedgerAway) as caught:
        ledger.read(secret)
    assert "hidden" not in str(caught.value)
    assert "hidden" not in repr(secret)


def test_postgresql_is_asked_for_with_a_plain_address(postgres: Postgres, tmp_path: Path) -> None:
    """The driver is ours to choose; psycopg sees the same rows."""
    url = postgres.new_database()
    ledger.record(Settings(project=tmp_path, ledger_url=url), decision(5))
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT version, seq FROM decisions").fetchall() == [(5, 1)]
