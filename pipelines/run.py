"""``python -m pipelines run``, which is ``make run``: everything, in the foreground, until Ctrl-C.

The two servers are started first, since loading TensorFlow takes as long as seeing whether anything is to be built; the
model server waits for its first version by itself. supervisord keeps them running and starts again what falls over. All
of it is on a leash (leash.py): should this process be killed with -9, nothing stays behind.
"""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from rich.console import Console

from digits import contract
from digits.errors import DigitsError
from pipelines import serving_config, versioning
from pipelines.candidate import CandidateError, read_verdict
from pipelines.champion import champion_record, served_version
from pipelines.dataset import check_folder, require_undamaged
from pipelines.exit_codes import Exit
from pipelines.ingest import expected_files
from pipelines.locks import only_one
from pipelines.processes import LEASH, leashed, stop_session
from pipelines.settings import Settings
from pipelines.stages import GATE
from pipelines.stopping import never_lost
from pipelines.versions import newest_version

_STOP_GRACE_S: Final = 20
"""For a server to finish what it is doing after SIGTERM."""

_MODEL_SERVER, _GATEWAY = "model-server", "gateway"

_BEGIN_S: Final = 3.0
"""supervisord starts the servers a second after it was started itself."""

_TOO_YOUNG_S: Final = 0.2
"""A process that was started so long ago is sure to hear a signal."""


class CannotRun(DigitsError):
    """Something on this machine is in the way."""

    code = "cannot_run"


class _Stop(BaseException):
    """Ctrl-C, SIGTERM, or the terminal was closed."""


def run(settings: Settings, *, skip_release: bool = False) -> int:
    """Bring everything up to date, serve it, stay until told to stop; return the exit code.

    Raises:
        DigitsError: what is in the way. Nothing is left running.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    preflight(settings)
    with (
        only_one(settings.run_dir / "run.lock", "run"),
        contextlib.suppress(_Stop),
        _stoppable(),
        _Servers(settings, console) as servers,
    ):
        if not skip_release and not _bring_up_to_date(settings, console, servers):
            return 1
        if newest_version(settings.versions_dir) is None:
            raise CannotRun("nothing is published yet, so there is nothing to serve. Run: python -m pipelines release")
        servers.wait_until_ready()
        _print_addresses(settings)
        servers.watch()
    console.print("stopped")
    return 0


def preflight(settings: Settings) -> None:
    """What would fail later, asked first.

    Raises:
        CannotRun: with the one thing that is in the way.
    """
    for name in (versioning.DATA_RECORD, "dvc.yaml", "params.yaml"):
        if not (settings.project / name).is_file():
            raise CannotRun(
                f"expected {name} in {settings.project}; it is not there. Run this in the repository's folder"
            )
    for folder in (settings.project, settings.run_dir, settings.versions_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as err:
            otherwise = (
                "name another with DIGITS_MODELS_DIR" if folder == settings.versions_dir else "move the repository"
            )
            raise CannotRun(
                f"cannot write in {folder}: {err.strerror}. Make it writable for you, free space, or {otherwise}"
            ) from err
    free_mb = shutil.disk_usage(settings.project).free // 2**20
    if free_mb < settings.min_free_mb:
        raise CannotRun(f"only {free_mb:,} MB of disk are free, {settings.min_free_mb:,} are needed. Free some first")
    _require_free_ports(settings)


def why_not_up_to_date(settings: Settings) -> str | None:
    """Why a release is needed; None when what is published is what the data, code and parameters give.

    Raises:
        DataError: a raw file is damaged.
        VersioningError: no git or DVC here.
    """
    with versioning.open_repo(settings) as repo:
        state = check_folder(settings.data_dir, expected_files(settings, repo) or ())
        require_undamaged(state)
        if state.missing or not settings.data_dir.is_dir():
            return "the raw data is not here yet"
        newest = newest_version(settings.versions_dir)
        if newest is None:
            return "nothing is published yet"
        changed = versioning.changed_stages(repo)
    try:
        verdict = read_verdict(settings)
    except CandidateError:
        return "there is no judged candidate"
    if not verdict.approved:
        # After a rejection the stages behind the gate have not run, and that is as it should be.
        order = [stage.name for stage in versioning.stages_in_order(settings)]
        judged = set(order[: order.index(GATE) + 1]) | {versioning.DATA_RECORD}
        changed &= judged
    if changed:
        return f"changed: {', '.join(sorted(changed))}"
    served, champion = served_version(settings), champion_record(settings) or {}
    if served is None or champion.get("version") != served.number:
        return "the champion's record is not about what is served"
    if not verdict.approved or verdict.model_sha256 == served.model_sha256:
        return None
    if verdict.model_sha256 in {version.model_sha256 for version in serving_config.withdrawn_versions(settings)}:
        return None  # a person went back from it
    if verdict.model_sha256 != newest.model_sha256:
        return "the candidate is not published"
    return f"version {newest.number} is not promoted"


def _bring_up_to_date(settings: Settings, console: Console, servers: "_Servers") -> bool:
    """Release if anything changed. False when that failed; it has said why."""
    with console.status("looking whether anything changed"):
        reason = why_not_up_to_date(settings)
    if reason is None:
        verdict = read_verdict(settings)
        console.print("up to date" if verdict.approved else f"the last candidate was rejected: {verdict.reason}")
    else:
        console.print(f"release: {reason}")
        code = _run_to_its_end([sys.executable, "-m", "pipelines", "release"], settings.project, servers)
        if code not in (Exit.DONE, Exit.REJECTED):
            if served := served_version(settings):
                console.print(f"to serve version {served.number} as it is: python -m pipelines run --skip-release")
            return False
    served = served_version(settings)
    if served is not None:
        console.print(f"serving version {served.number}")
    return True


def _run_to_its_end(command: list[str], cwd: Path, servers: "_Servers") -> int:
    """The exit code of a command; it is stopped when there will be no server to serve what it makes."""
    process = subprocess.Popen(leashed(command), cwd=cwd, stdin=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(0.5)
            servers.require_alive()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()


class _Servers:
    """The model server and the gateway under supervisord; a context manager that leaves nothing running."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings, self._console = settings, console
        self._failed = threading.Event()
        self._stopping = False
        self._begun = threading.Event()
        self._hears_from = 0.0
        self._logs = settings.run_dir / "logs"

    def __enter__(self) -> "_Servers":
        settings = self._settings
        self._logs.mkdir(parents=True, exist_ok=True)
        config = settings.run_dir / "supervisord.conf"
        config.write_text(supervisor_config(settings), encoding="utf-8")
        serving_config.ensure(settings)
        # The label is a default: an empty DIGITS_MODEL_LABEL has the gateway serve the newest version.
        label = {"DIGITS_MODEL_LABEL": serving_config.LABEL}
        upstream = {"DIGITS_UPSTREAM": f"127.0.0.1:{settings.model_server_port}"}
        self._process = subprocess.Popen(
            leashed([sys.executable, "-m", "supervisor.supervisord", "--nodaemon", "--configuration", str(config)]),
            cwd=settings.project,
            env={**label, **os.environ, **upstream},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._relay, daemon=True).start()
        self._console.print(f"starting the model server and the gateway; their logs: {_shown(self._logs)}/")
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, signal.SIG_IGN
            )  # the second Ctrl-C of an impatient person must not leave things behind
        with self._console.status("stopping"):
            self._let_it_begin()
            stop_session(self._process, grace_s=_STOP_GRACE_S + 10)

    def _let_it_begin(self) -> None:
        """Wait until it has started the servers.

        A stop that is asked for before is passed on a millisecond after their start, when they are too young to hear
        it, and supervisord would wait for them in vain.
        """
        deadline = time.monotonic() + _BEGIN_S
        while not self._begun.wait(0.05) and self._process.poll() is None and time.monotonic() < deadline:
            pass
        time.sleep(max(0.0, self._hears_from - time.monotonic()))

    def wait_until_ready(self) -> None:
        """Wait until the gateway says that it can answer. Raises ``CannotRun`` when it will not."""
        settings = self._settings
        deadline = time.monotonic() + settings.ready_timeout_s
        reason: str | None = None
        with self._console.status("waiting for the model to be loaded"):
            while time.monotonic() < deadline:
                self.require_alive()
                reason = why_not_ready(settings)
                if reason is None:
                    return
                time.sleep(0.1)
        raise CannotRun(
            f"the gateway was not ready within {settings.ready_timeout_s:.0f} s: {reason}. {self._log_hint()}"
        )

    def watch(self) -> NoReturn:
        """Stay until told to stop. Raises ``CannotRun`` when a server cannot be kept running."""
        while True:
            self.require_alive()
            time.sleep(0.5)

    def require_alive(self) -> None:
        """Raise ``CannotRun`` when a server cannot be kept running."""
        if self._failed.is_set():
            raise CannotRun(f"a server stopped again and again. {self._log_hint()}")
        if self._process.poll() is not None:
            raise CannotRun(f"supervisord ended with {self._process.returncode}. {self._log_hint()}")

    def _log_hint(self) -> str:
        """The last line of each server's log, in one line."""
        lasts = []
        for name in (_MODEL_SERVER, _GATEWAY):
            with contextlib.suppress(OSError, IndexError):
                lines = (self._logs / f"{name}.log").read_text(errors="replace").splitlines()
                lasts.append(f"{name}: {[line for line in lines if line.strip()][-1].strip()[:300]}")
        return f"Logs: {_shown(self._logs)}/" + (f" ({'; '.join(lasts)})" if lasts else "")

    def _relay(self) -> None:
        """Tell what supervisord does about a server that fell over; the rest is in its log."""
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode("utf-8", "replace")
            if f"spawned: '{_GATEWAY}'" in line:  # the last one
                self._hears_from = time.monotonic() + _TOO_YOUNG_S
                self._begun.set()
            if self._stopping:
                continue
            if ended := re.search(r"exited: (\S+) \((.*)\)", line):
                name, how = ended.groups()
                self._console.print(
                    f"{name} stopped ({how}); starting it again. Its log: {_shown(self._logs)}/{name}.log"
                )
            elif re.search(r"gave up: (\S+)", line) or "Error: " in line:
                self._failed.set()


def supervisor_config(settings: Settings) -> str:
    """The configuration of supervisord: two programs, restarted when they end, stopped gateway first."""
    logs = settings.run_dir / "logs"
    programs = (
        (_MODEL_SERVER, model_server_command(settings), 100),
        (_GATEWAY, [sys.executable, "-m", "serving.gateway"], 200),
    )
    parts = [
        f"[supervisord]\nlogfile={_escaped(logs / 'supervisord.log')}\nchildlogdir={_escaped(logs)}\n"
        f"pidfile={_escaped(settings.run_dir / 'supervisord.pid')}\nidentifier=digits\n"
    ]
    for name, command, priority in programs:
        # Parent 0: the leash takes whoever started it, supervisord, whose process id is not known yet.
        leash = [sys.executable, "-I", "-S", str(LEASH), "0", "-"]
        parts.append(
            f"[program:{name}]\ncommand={_escaped(shlex.join([*leash, *command]))}\n"
            f"directory={_escaped(settings.project.absolute())}\npriority={priority}\nautorestart=true\nstartsecs=2\n"
            f"startretries=3\nstopsignal=TERM\nstopwaitsecs={_STOP_GRACE_S}\nkillasgroup=true\nredirect_stderr=true\n"
            f"stdout_logfile={_escaped(logs / f'{name}.log')}\nstdout_logfile_maxbytes=10MB\nstdout_logfile_backups=2\n"
        )
    return "\n".join(parts)


def model_server_command(settings: Settings) -> list[str]:
    """TensorFlow Serving's own server where it is installed, else ours; the flags are the same but for one.

    TensorFlow Serving would serve nothing but the TF Lite model's signature then, and the gateway asks for others.
    """
    binary = shutil.which("tensorflow_model_server")
    return [
        *([binary] if binary else [sys.executable, "-m", "serving.model_server", "--prefer_tflite_model=true"]),
        f"--port={settings.model_server_port}",
        f"--rest_api_port={settings.model_server_rest_port}",
        f"--model_config_file={settings.serving_config_file}",
        "--model_config_file_poll_wait_seconds=1",
        "--allow_version_labels_for_unavailable_models=true",
    ]


def why_not_ready(settings: Settings) -> str | None:
    """What the gateway's ``/readyz`` says; None when it is ready."""
    url = f"http://{_reachable(settings.host)}:{settings.rest_port}/readyz"
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # our own gateway
            return None if answer.status == 200 else f"it answers {answer.status}"
    except urllib.error.HTTPError as err:
        with contextlib.suppress(ValueError, OSError, AttributeError):
            return str(json.loads(err.read()).get("reason"))
        return f"it answers {err.code}"
    except OSError as err:
        return f"it does not answer ({getattr(err, 'reason', err)})"


def _require_free_ports(settings: Settings) -> None:
    wanted = {
        "rest_port": (settings.host, settings.rest_port, "the gateway's REST API and page"),
        "grpc_port": (settings.host, settings.grpc_port, "the gateway's gRPC API"),
        "model_server_port": ("127.0.0.1", settings.model_server_port, "the model server's gRPC API"),
        "model_server_rest_port": ("127.0.0.1", settings.model_server_rest_port, "the model server's REST API"),
    }
    taken: dict[int, str] = {}
    for field, (host, port, what) in wanted.items():
        variable = f"DIGITS_{field.upper()}"
        if port in taken:
            raise CannotRun(f"port {port} is set for both {taken[port]} and {what}. Set another one: {variable}=…")
        taken[port] = what
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
        except PermissionError as err:
            raise CannotRun(f"port {port} for {what} is reserved for root. Set another one: {variable}=…") from err
        except OSError as err:
            in_use = (
                f"is in use{_by_whom(port)}. Stop that"
                if err.errno == errno.EADDRINUSE
                else f"on {host}: {err.strerror or err}. Mend it"
            )
            raise CannotRun(f"port {port} for {what} {in_use}, or set another one: {variable}=…") from err


def _by_whom(port: int) -> str:
    """The process that listens on a port, where the system lets us see it."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def _print_addresses(settings: Settings) -> None:
    host = _reachable(settings.host)
    host = "localhost" if host == "127.0.0.1" else host
    rest = f"http://{host}:{settings.rest_port}"
    rows = {
        "draw a digit": f"{rest}/",
        "REST": f"{rest}/classify    (all of it: {rest}/docs)",
        "gRPC": f"{host}:{settings.grpc_port}",
        "metrics": f"{rest}/metrics",
        "model server": f"gRPC localhost:{settings.model_server_port}, "
        f"REST http://localhost:{settings.model_server_rest_port}/v1/models/{contract.MODEL_NAME}",
    }
    console = Console(highlight=False, soft_wrap=True)
    console.print("\n[bold green]ready[/]")
    for name, address in rows.items():
        console.print(f"  {name:<14}{address}")
    console.print(
        f"  {'try':<14}curl -s --data-binary @picture.png -H 'Content-Type: image/png' {rest}/classify\n"
        f"  {'stop':<14}Ctrl-C"
    )
    sys.stdout.flush()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the block by ``_Stop``."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _Stop

    before: dict[int, Any] = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with never_lost(_Stop):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reachable(host: str) -> str:
    """An address to reach a server at that listens on ``host``."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104  # compared, not bound


def _escaped(value: object) -> str:
    """For supervisord's configuration, where % begins an expansion and ; a comment."""
    return str(value).replace("%", "%%")


def _shown(path: Path) -> str:
    """A path as short as it can be written from here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
