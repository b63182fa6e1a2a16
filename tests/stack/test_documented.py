"""Commands of the documents that ask what `make run` started, run as they stand."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import HANG_S
from tests.docs.commands import documented
from tests.stack.conftest import Stack

HERE = "tests/stack/test_documented.py::test_a_documented_command_does_what_it_says"


@pytest.mark.parametrize("command", sorted({command.text for command in documented(HERE)}))
def test_a_documented_command_does_what_it_says(stack: Stack, tmp_path: Path, command: str) -> None:
    """In the repository's folder, in a shell; an HTTP error fails it. Only the addresses are the stack's own."""
    (tmp_path / ".curlrc").write_text("fail-with-body\n")
    addresses = {"DIGITS_URL": stack.rest_url, "DIGITS_ADDRESS": stack.grpc_address, "CURL_HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace("localhost:8080", stack.rest_url)],
        cwd=stack.root, env={**stack.environment, **addresses}, text=True, capture_output=True, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    if "docs/seven.png" in command:
        assert '"digit":7' in done.stdout or "\t7\t" in done.stdout
