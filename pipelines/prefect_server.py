"""Prefect's surroundings: its settings, and a temporary server where none is configured.

Prefect can start a temporary server by itself, but on a random port between 8000 and 8999 (ours are there), with a
start limit that a slow machine misses, and it outlives a killed flow. So we start it: on a port the system picks, while
Prefect is still being imported, on a leash. Its database is kept in ``.prefect/``, so ``prefect server start`` with
``PREFECT_HOME=.prefect`` shows past runs in the browser.
"""

import contextlib
import gc
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from digits.errors import DigitsError
from pipelines.processes import leashed, stop_session
from pipelines.settings import Settings

_CODE: Final = Path(__file__).resolve().parent.parent
_STARTS: Final = 5
"""How often the temporary server is started, should it end by itself."""


class PrefectUnavailable(DigitsError):
    """The Prefect server did not start or does not answer."""

    code = "prefect_unavailable"


def prepare_environment(settings: Settings) -> None:
    """Set what Prefect reads when it is imported; what the user has set stays. Call before the first import."""
    defaults = {
        "PREFECT_HOME": str(settings.project / ".prefect"),
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The flow prints its own list of steps; Prefect's log goes to its server and, when it matters, to the terminal.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def server(settings: Settings, *, with_services: bool = False) -> Iterator[None]:
    """A Prefect server while the block runs: the one PREFECT_API_URL names, or a temporary one of ours.

    On entry the named one has answered; the temporary one is only started, and ``wait_until_ready`` waits for it.

    Args:
        settings: where, and the port for the browser.
        with_services: also what a lasting server has: the scheduler, and the UI on ``settings.prefect_port``.

    Raises:
        PrefectUnavailable: the named one does not answer in time.
    """
    if os.environ.get("PREFECT_API_URL"):
        await_named(settings)  # before Prefect is imported, which takes seconds
        yield
        return
    with _listener(settings.prefect_port if with_services else 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        environment = {
            **os.environ,
            # The project may be another folder than the one this code lies in.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_CODE), os.environ.get("PYTHONPATH")))),
            "PREFECT_UI_API_URL": url,
            "PREFECT_UI_STATIC_DIRECTORY": str(settings.project / ".prefect" / "ui"),
        }
        if not with_services:
            # Else it imports every Prefect integration, Kubernetes' and Dask's, for pages that nobody opens here.
            environment["PREFECT_SERVER_REGISTER_BLOCKS_ON_START"] = "false"
            environment["PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION"] = "false"
        command = [sys.executable, "-m", "pipelines.prefect_server", str(listener.fileno()), str(int(with_services))]
        process = _KeptRunning(command, settings.project, environment, listener)
        os.environ["PREFECT_API_URL"] = url
        try:
            yield
        finally:
            _send_the_rest()
            os.environ.pop("PREFECT_API_URL", None)
            process.stop()


class _KeptRunning(threading.Thread):
    """The temporary server's process, started again when it ends: its clients find it on the same socket."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str], listener: socket.socket) -> None:
        super().__init__(daemon=True)
        self._command, self._cwd, self._environment, self._listener = command, cwd, environment, listener
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self.start()

    def run(self) -> None:
        for _ in range(_STARTS):
            with self._lock:
                if self._stopping:
                    return
                # This thread lives as long as the process does: the leash is tied to the thread that starts it.
                self._process = process = subprocess.Popen(
                    leashed(self._command),
                    cwd=self._cwd,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[self._listener.fileno()],
                    start_new_session=True,
                )
            process.wait()

    def stop(self) -> None:
        """End the server for good."""
        with self._lock:
            self._stopping = True
        if self._process is not None:
            stop_session(self._process)
        self.join()


def ui_url() -> str:
    """Where the server in use shows its UI."""
    return os.environ["PREFECT_API_URL"].rstrip("/").removesuffix("/api")


def _send_the_rest() -> None:
    """Send the log lines and events still queued: without their server they would hold up the exit for a minute."""
    if "prefect" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def wait_until_ready(settings: Settings) -> None:
    """Wait until the server of ``server`` answers.

    Raises:
        PrefectUnavailable: it does not, in time.
    """
    _wait(settings.prefect_start_timeout_s)


def await_named(settings: Settings) -> None:
    """Wait until the server that PREFECT_API_URL names answers; return at once when it names none.

    Raises:
        PrefectUnavailable: it does not, in time.
    """
    if os.environ.get("PREFECT_API_URL"):
        _wait(settings.prefect_answer_timeout_s)


def _wait(limit_s: float) -> None:
    url = os.environ["PREFECT_API_URL"].rstrip("/") + "/health"
    deadline = time.monotonic() + limit_s
    problem = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with urllib.request.urlopen(url, timeout=left) as answer:  # noqa: S310  # the user's own setting
                if answer.status == 200:
                    return
        except urllib.error.HTTPError as err:
            problem = f"answers {err.code}"
        except OSError as err:
            problem = str(getattr(err, "reason", err))
        except (ValueError, http.client.InvalidURL) as err:
            raise PrefectUnavailable(
                f"PREFECT_API_URL: expected an address such as http://127.0.0.1:4200/api ({err})"
            ) from err
        except http.client.HTTPException as err:
            raise PrefectUnavailable(
                f"PREFECT_API_URL: expected a Prefect server at {url}; what answers does not speak HTTP "
                f"({type(err).__name__})"
            ) from err
        time.sleep(0.05)
    raise PrefectUnavailable(
        f"expected a Prefect server at {url} within {limit_s:.0f} s; {problem}. Check PREFECT_API_URL, or unset it to "
        "use a temporary server"
    )


def _listener(port: int) -> socket.socket:
    """A socket that listens on the port of this machine's loopback, or on any free one when that is taken."""
    for wanted in (port, 0):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", wanted))
            listener.listen(128)
        except OSError:
            listener.close()
            continue
        return listener
    raise PrefectUnavailable("no free port was found for a temporary Prefect server")


def _serve(descriptor: int, with_services: bool) -> None:
    gc.disable()  # a quarter of the start would be looking for garbage among what is imported
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=not with_services, final=True)
    gc.freeze()
    gc.enable()
    config = uvicorn.Config(app, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]), with_services=sys.argv[2] == "1")
