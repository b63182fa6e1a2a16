"""docs/gateway.md, "Who may call": its block, line by line, as its reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx

from tests.conftest import HTTP, ROOT, clean_environment
from tests.docs.commands import documented
from tests.serving.gateway.conftest import HANG_S, Here, eventually
from tests.stack.conftest import free_ports


def test_the_keys_block_makes_a_key_that_lets_its_owner_in(here: Here, tmp_path: Path) -> None:
    """A key is made, a gateway asks for it, curl and the client get answers with it and none with another."""
    make, serve, *ask = documented(
        "tests/docs/test_gateway_page.py::test_the_keys_block_makes_a_key_that_lets_its_owner_in"
    )
    rest, grpc = free_ports(2)
    environment = clean_environment(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", PYTHONPATH=str(ROOT),
        DIGITS_UPSTREAM=here.upstream.target,
        DIGITS_REST_PORT=str(rest), DIGITS_GRPC_PORT=str(grpc), DIGITS_ADDRESS=f"127.0.0.1:{grpc}",
    )  # fmt: skip
    (tmp_path / "docs").symlink_to(ROOT / "docs")

    def shell(command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euc", command.replace("localhost:8080", f"localhost:{rest}")], cwd=tmp_path,
            env={**environment, **more}, text=True, capture_output=True, timeout=HANG_S,
        )  # fmt: skip

    made = shell(make.text)
    key = re.findall(r"\S{20,}", made.stderr)[-1]
    gateway = subprocess.Popen(
        ["bash", "-c", f"exec env {serve.text}"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: gateway.poll() is not None or ready(rest))
        for command in ask:
            answered = shell(command.text, KEY=key)
            assert answered.returncode == 0, answered.stderr
            refused = shell(command.text, KEY="wrong")
            assert "API key" in refused.stdout + refused.stderr
            assert "API key" not in answered.stdout + answered.stderr
    finally:
        gateway.terminate()
        assert gateway.wait(HANG_S) == 0


def ready(port: int) -> bool:
    try:
        return HTTP.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False
