"""Tools that are not ours drive the running stack: a real Prometheus, and h2load as a gRPC client."""

import contextlib
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.protos import digits_pb2
from tests.conftest import HANG_S, HTTP
from tests.ports import free_ports
from tests.stack.conftest import Stack
from tests.stack.test_bad_requests import drawn_seven, encode

needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus")
needs_h2load = pytest.mark.skipif(not shutil.which("h2load"), reason="needs Debian's package nghttp2-client")


@pytest.fixture
def prometheus(stack: Stack, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes the gateway once a second."""
    (port,) = free_ports(1)
    target = stack.rest_url.removeprefix("http://")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: gateway, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    process = subprocess.Popen(
        ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(HANG_S)


def ask(prometheus: str, query: str, limit_s: float = HANG_S) -> list[dict]:
    """The series a query gives, waiting until there are any."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            answer = HTTP.get(f"{prometheus}/api/v1/query", params={"query": query})
            if answer.status_code == 200 and (series := answer.json()["data"]["result"]):
                return series
        time.sleep(0.3)
    return []


@needs_prometheus
def test_a_real_prometheus_scrapes_requests_by_route_and_version(stack: Stack, prometheus: str) -> None:
    """What was asked is counted, with the version that answered; a quantile of the duration can be computed."""
    for _ in range(20):
        HTTP.post(stack.rest_url + "/classify", content=encode(drawn_seven()))
    series = ask(prometheus, 'sum by (model_version) (digits_request_duration_seconds_count{route="/classify"}) >= 20')
    # Refused requests have no version; other tests may have sent many.
    assert "1" in {one["metric"].get("model_version") for one in series}
    (quantile,) = ask(
        prometheus,
        'histogram_quantile(0.5, sum by (le) (digits_request_duration_seconds_bucket{route="/classify"}))',
    )
    assert 0 < float(quantile["value"][1]) < 10
    (up,) = ask(prometheus, 'up{job="gateway"}')
    assert up["value"][1] == "1"


@needs_h2load
def test_h2load_as_a_grpc_client_gets_only_good_answers(stack: Stack, tmp_path: Path) -> None:
    """1,000 calls over 4 connections with 16 streams each: all succeed at the HTTP/2 level."""
    image = digits_pb2.ClassifyRequest(image=encode(drawn_seven())).SerializeToString()
    body = tmp_path / "call"
    body.write_bytes(b"\0" + struct.pack(">I", len(image)) + image)
    load = subprocess.run(
        ["h2load", "-n", "1000", "-c", "4", "-m", "16", "-d", str(body), "-H", "content-type: application/grpc",
         "-H", "te: trailers", f"http://{stack.grpc_address}/digits.v1.Digits/Classify"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert re.search(r"1000 succeeded, 0 failed, 0 errored", load.stdout), load.stdout
    assert re.search(r"status codes: 1000 2xx", load.stdout), load.stdout
