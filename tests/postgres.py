"""A real PostgreSQL server for the tests that need one: Debian's, as another user than root, on a free port."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.conftest import HANG_S
from tests.ports import free_port


def programs() -> Path | None:
    """The folder of the newest installed server's programs; None when there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None


class Postgres:
    """A server with a user ``digits`` who needs no password. It can be stopped, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._programs = programs()
        self._folder = folder / "data"
        # It refuses to run as root.
        self._user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(folder, "postgres", "postgres")
        self.port = free_port()
        self._run("initdb", "--pgdata", str(self._folder), "--username", "digits", "--auth", "trust", "--no-sync")
        self.process: subprocess.Popen | None = None

    def _run(self, program: str, *words: str) -> None:
        command = [str(self._programs / program), *words]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._user)

    def start(self) -> None:
        command = [
            str(self._programs / "postgres"), "-D", str(self._folder), "-p", str(self.port),
            "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._folder}", "-c", "fsync=off",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL, **self._user)
        deadline = time.monotonic() + HANG_S
        while True:
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url("postgres")):
                return
            assert self.process.poll() is None, "PostgreSQL ended"
            assert time.monotonic() < deadline, "PostgreSQL did not start"
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: at once, in order. SIGQUIT: at once, as if it had crashed."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(HANG_S)

    def url(self, database: str) -> str:
        return f"postgresql://digits@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The address of an empty database of its own."""
        name = f"d{uuid.uuid4().hex}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return self.url(name)


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A running server; skips the test where it is not installed."""
    if programs() is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    # Not below pytest's own folder, which only its user may enter.
    folder = Path(tempfile.mkdtemp(prefix="digits-postgres-"))
    try:
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
