"""docker/pipeline.py, what the pipeline's image starts: what is wrong is one line before anything else begins."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import HANG_S, ROOT, clean_environment
from tests.postgres import Postgres, running_postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


def refused(*words: str, **environment: str) -> str:
    """The one line that it ends with."""
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "pipeline.py", *words], env=clean_environment(**environment),
        capture_output=True, text=True, check=False, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("USER", "nobody", 'role "nobody" does not exist'),
        ("NAME", "none", 'database "none" does not exist'),
        ("PORT", "9", "Connect call failed"),
        ("PORT", "many", "invalid literal"),
        ("PASSWORD_FILE", "/run/none", "cannot read the database's password from /run/none"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_with_the_reason(
    postgres: Postgres, name: str, value: str, words: str
) -> None:
    """Prefect's own server would end in pages of traceback."""
    settings = {"HOST": "127.0.0.1", "PORT": str(postgres.port), "USER": "digits", "NAME": "postgres", name: value}
    line = refused("prefect-server", **{f"PREFECT_SERVER_DATABASE_{key}": text for key, text in settings.items()})
    assert words in line
    assert f"_{name}" in line


def test_a_port_that_is_taken_is_named(postgres: Postgres) -> None:
    """With the setting that moves it; the database was fine."""
    settings = {"HOST": "127.0.0.1", "PORT": str(postgres.port), "USER": "digits", "NAME": "postgres"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(
            "prefect-server",
            PREFECT_SERVER_API_PORT=port,
            **{f"PREFECT_SERVER_DATABASE_{key}": text for key, text in settings.items()},
        )
    assert f"port {port} " in line
    assert "PREFECT_SERVER_API_PORT" in line


def test_secrets_are_made_once_and_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """What is there stays: its users have it already."""
    command = [sys.executable, ROOT / "docker" / "pipeline.py", "make-secrets", tmp_path / "a", tmp_path / "b"]
    subprocess.run(command, check=True, timeout=HANG_S)
    first = (tmp_path / "a").read_text()
    (tmp_path / "b").unlink()
    subprocess.run(command, check=True, timeout=HANG_S)
    assert (tmp_path / "a").read_text() == first
    assert len(first) == 48
    assert (tmp_path / "b").read_text() not in ("", first)
    assert str(tmp_path / "no" / "a") in refused("make-secrets", str(tmp_path / "no" / "a"))
