"""The gateway carries no training framework: what it imports, what it weighs."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import HANG_S, ROOT

HEAVY = {
    "tensorflow",
    "tensorflow_serving",
    "keras",
    "prefect",
    "dvc",
    "great_expectations",
    "pandas",
    "scipy",
    "matplotlib",
}

PROBE = """
import asyncio, io, json, resource, sys
import uvloop
import serving.gateway.__main__
from serving.gateway.logs import Logs
from serving.gateway.running import Running
from serving.gateway.settings import Settings

async def main():
    settings = Settings(rest_port=0, grpc_port=0, upstream="127.0.0.1:1")
    running = await Running.start(settings, Logs(stream=io.StringIO()))
    reader, writer = await asyncio.open_connection(*running.rest_address.rsplit(":", 1), limit=2**20)
    for path in (b"/healthz", b"/docs", b"/openapi.json", b"/metrics"):
        writer.write(b"GET " + path + b" HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
        await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"POST /classify HTTP/1.1\\r\\nhost: x\\r\\ncontent-length: 784\\r\\n\\r\\n" + bytes(784))
    await asyncio.sleep(0.2)
    writer.close()
    rss = int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
    names = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps({"names": names, "rss": rss, "server": "serving.model_server" in sys.modules}))
    await running.drain()

uvloop.run(main())
"""


@pytest.fixture(scope="module")
def probe() -> dict:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIGITS_")}
    ended = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_gateway_at_work_has_imported_no_training_framework(probe: dict) -> None:
    """After it has started and answered on its routes, sys.modules holds none of them, nor the model server."""
    assert HEAVY & set(probe["names"]) == set()
    assert not probe["server"]


def test_a_gateway_weighs_less_than_120_mb(probe: dict) -> None:
    """Resident memory after its first requests."""
    assert probe["rss"] < 120e6


def test_the_client_is_light_too() -> None:
    """A command line that starts at once."""
    code = "import json, sys, serving.client; print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=True
    )
    assert HEAVY & set(json.loads(ended.stdout)) == set()
