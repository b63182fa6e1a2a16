"""A command tells how its flow ended, whatever becomes of what it says to Prefect's server."""

import http.client
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import HANG_S
from tests.pipelines.conftest import run


class LostAnswer:
    """Before a Prefect server; the first answer to a flow run's last state is lost on its way back."""

    def __init__(self, prefect_url: str) -> None:
        self.lost: list[str] = []
        behind = urlsplit(prefect_url).netloc
        this = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                server = http.client.HTTPConnection(behind, timeout=HANG_S)
                plain = {name: value for name, value in self.headers.items() if name.lower() != "accept-encoding"}
                server.request(self.command, self.path, body, plain)
                answer = server.getresponse()
                content = answer.read()
                server.close()
                if this.is_last_state(self.path, body):
                    self.send_response(503)
                    self.send_header("retry-after", "0")
                    content = b""
                else:
                    self.send_response(answer.status)
                    self.send_header("content-type", answer.headers.get("content-type", "application/json"))
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PATCH = do_DELETE = pass_on  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/api"

    def is_last_state(self, path: str, body: bytes) -> bool:
        """Whether this is one, the first time."""
        if self.lost or "/flow_runs/" not in path or not path.endswith("/set_state"):
            return False
        kind = json.loads(body)["state"]["type"]
        if kind in ("COMPLETED", "FAILED"):
            self.lost.append(kind)
        return bool(self.lost)


@contextmanager
def losing_an_answer(prefect_url: str) -> Iterator[LostAnswer]:
    between = LostAnswer(prefect_url)
    threading.Thread(target=between.server.serve_forever, daemon=True).start()
    try:
        yield between
    finally:
        between.server.shutdown()
        between.server.server_close()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_release_ends_as_it_ended_when_the_answer_to_its_last_state_is_lost(
    released: Path, prefect_url: str, damaged: bool
) -> None:
    """Sent again it comes back without value and error; the exit code and the last line are those of any other run."""
    if damaged:
        (released / "data" / "images").write_text("something else")
    with losing_an_answer(prefect_url) as between:
        done = run(released, "pipelines", "release", PREFECT_API_URL=between.url)
    usual = run(released, "pipelines", "release", PREFECT_API_URL=prefect_url)
    assert between.lost == ["FAILED" if damaged else "COMPLETED"]
    assert done.returncode == usual.returncode == int(damaged), done.stderr
    assert done.stdout == usual.stdout
    assert usual.stderr.splitlines()[-1] in done.stderr  # Prefect says something of its events after it
