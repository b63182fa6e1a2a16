"""What runs in the pipeline's container.

``pipeline.py serve`` releases if nothing is published yet, then releases on the schedule of DIGITS_CRON, each in the
profile that DIGITS_PROFILE names.
``pipeline.py is-published`` is the container's health: exit code 0 when a version is published.
``pipeline.py prefect …`` is Prefect's own command, in the workspace: how Prefect's workers start a flow run.
``pipeline.py prefect-server`` is Prefect's API and UI, for other containers.
``pipeline.py metrics …`` says in Prometheus' terms how releases go; it only reads the workspace.
``pipeline.py make-secrets FILE…`` makes those of the files that are missing: a password each.
``pipeline.py release``, or any other command, is that of ``python -m pipelines``.
"""

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

CODE = Path("/app")
PROJECT = Path("/project")
CHAMPION = PROJECT / "models" / "champion" / "champion.json"
SERVING_CONFIG = PROJECT / "models" / "models.config"
PASSWORD_FILE = "PREFECT_SERVER_DATABASE_PASSWORD_FILE"  # noqa: S105  # a variable's name
DEFAULT_CRON = "0 3 * * *"
DEFAULT_PROFILE = "full"


def main(arguments: list[str]) -> int:
    """Do what the command says; the exit code."""
    if arguments == ["is-published"]:
        if not (CHAMPION.is_file() and SERVING_CONFIG.is_file()):
            sys.stderr.write("no version is published yet\n")
            return 1
        return 0
    match arguments:
        case ["prefect-server"]:
            return prefect_server()
        case ["make-secrets", *files]:
            return make_secrets(files)
        case ["metrics", *_]:
            os.environ["DIGITS_PROJECT"] = str(PROJECT)
            os.chdir(CODE)
            return become([sys.executable, "-m", "pipelines", *arguments])
    try:
        bring_code()
    except OSError as err:
        sys.stderr.write(
            f"error: cannot write {err.filename} ({err.strerror}); the volume at {PROJECT} must be writable for user "
            f"{os.getuid()}\n"
        )
        return 1
    os.chdir(PROJECT)
    if arguments[:1] == ["prefect"]:
        return to_its_end("await-prefect") or become([sys.executable, "-m", *arguments])
    if arguments == ["serve"]:
        # Volumes from before there was a models.config get one.
        if code := to_its_end("ensure-serving-config"):
            return code
        if not CHAMPION.is_file() and (code := to_its_end("release")):
            return code
        arguments = ["schedule", "--cron", os.environ.get("DIGITS_CRON") or DEFAULT_CRON]
        arguments += ["--profile", os.environ.get("DIGITS_PROFILE") or DEFAULT_PROFILE]
    return become([sys.executable, "-m", "pipelines", *arguments])


def become(command: list[str]) -> NoReturn:
    """Run the command in place of this process, so that signals reach it."""
    os.execv(command[0], command)  # noqa: S606  # no shell is meant


def prefect_server() -> int:
    """Prefect's server, on all interfaces; the database's password comes from a file, not from the environment."""
    if name := os.environ.pop(PASSWORD_FILE, ""):
        try:
            password = Path(name).read_text(encoding="utf-8").strip()
        except OSError as err:
            sys.stderr.write(
                f"error: cannot read the database's password from {name} ({err.strerror}); {PASSWORD_FILE}\n"
            )
            return 1
        os.environ[PASSWORD_FILE.removesuffix("_FILE")] = password
    if problem := asyncio.run(database_problem()):
        sys.stderr.write(f"error: {problem}\n")
        return 1
    port = os.environ.get("PREFECT_SERVER_API_PORT", "4200")
    try:
        socket.create_server(("0.0.0.0", int(port))).close()  # noqa: S104  # a container
    except (OSError, ValueError) as err:
        sys.stderr.write(f"error: cannot listen on port {port} ({err}); PREFECT_SERVER_API_PORT\n")
        return 1
    os.environ.setdefault("PREFECT_UI_STATIC_DIRECTORY", "/tmp/prefect-ui")  # noqa: S108  # all else is read-only
    os.environ.pop("PREFECT_API_URL", None)
    return become([sys.executable, "-m", "prefect", "server", "start", "--host", "0.0.0.0"])  # noqa: S104  # a container


async def database_problem() -> str | None:
    """Why Prefect's server could not use its PostgreSQL; None when it can, or is to keep a file of its own."""
    host, port, user, password, database = (
        os.environ.get(f"PREFECT_SERVER_DATABASE_{name}") for name in ("HOST", "PORT", "USER", "PASSWORD", "NAME")
    )
    if not host:
        return None
    import asyncpg  # here only: half a second

    port = port or "5432"
    try:
        connection = await asyncpg.connect(
            host=host, port=int(port), user=user, password=password, database=database, timeout=10
        )
        await connection.close()
    except (asyncpg.PostgresError, OSError, ValueError, TimeoutError) as err:
        reason = " ".join(str(err).split()) or "no answer within 10 s"
        return f"no database to use at {host}:{port} ({reason}); PREFECT_SERVER_DATABASE_HOST, _PORT, _USER, _NAME"
    return None


def make_secrets(files: list[str]) -> int:
    """A random password in each file that is not there yet."""
    for path in map(Path, files):
        if path.is_file() and path.stat().st_size:
            continue
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_text(secrets.token_hex(24), encoding="ascii")
            part.chmod(0o444)  # its readers run under other users; who may read it is who mounts the volume
            part.replace(path)
        except OSError as err:
            sys.stderr.write(f"error: cannot write {path} ({err.strerror}); its volume must be writable\n")
            return 1
    return 0


def bring_code() -> None:
    """Make the workspace's code that of the image. What was made in the workspace stays; so does an equal file."""
    for package in ("digits", "training", "pipelines", "serving"):
        wanted = {path.relative_to(CODE) for path in (CODE / package).rglob("*")}
        for path in sorted((PROJECT / package).rglob("*.py")):
            if path.relative_to(PROJECT) not in wanted:
                path.unlink()
    for source in sorted(CODE.rglob("*")):
        target = PROJECT / source.relative_to(CODE)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not target.is_file() or target.read_bytes() != source.read_bytes():
            part = target.with_name(f".{target.name}.part")
            shutil.copyfile(source, part)
            part.replace(target)


def to_its_end(command: str) -> int:
    """`python -m pipelines COMMAND` to its end; its exit code. Stops when told to."""
    process = subprocess.Popen([sys.executable, "-m", "pipelines", command], stdin=subprocess.DEVNULL)

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        process.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, pass_on)
    code = process.wait()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
