"""A gateway for the documents' commands: it answers at an address of its own in place of the one that they name."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import HANG_S, ROOT, clean_environment
from tests.serving.gateway.conftest import Here, LoopThread, start_gateway, stop_gateway


@pytest.fixture(scope="session")
def here() -> Iterator[Here]:
    """A gateway with version 1, which is `stable`."""
    here = start_gateway(LoopThread(), ready=False)
    here.behaviour.version = 1
    here.behaviour.labels = {"stable": 1}
    here.wait_ready()
    yield here
    stop_gateway(here)


def run(script: str, *, python: bool = False, home: Path | None = None) -> str:
    """What a documented script prints, run in the repository's folder as its reader would. An HTTP error fails it."""
    words = [sys.executable, "-c", script] if python else ["bash", "-euo", "pipefail", "-c", script]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = clean_environment(PATH=path, **({"CURL_HOME": str(home)} if home else {}))
    done = subprocess.run(words, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=HANG_S)
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout
