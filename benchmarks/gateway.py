"""What the gateway costs: beside handlers that do nothing, and beside calling the model server directly.

The process under test is pinned to core 0; the model server and the load generator (h2load) share core 1. All variants
run in one session, interleaved; the median of the repeats is shown with its range.
"""

import contextlib
import os
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from digits.contract import IMAGE_BYTES, MODEL_NAME, SIGNATURE

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = 64
SERVER_CORE, LOAD_CORE = "0", "1"


class NotAllGood(Exception):
    """What was loaded answered something else than 2xx."""


@dataclass(frozen=True)
class Variant:
    """One thing to load: where, with what body, and against which other variant it is judged."""

    name: str
    url: str
    body: bytes
    headers: tuple[str, ...]
    grpc: bool = False
    baseline: str | None = None
    streams: int = CONNECTIONS
    """Calls in flight over gRPC."""


def run(seconds: float, repeats: int) -> None:
    """Prints the table. Needs h2load (Debian: nghttp2-client) and a published model (`make run` once)."""
    check_ready()
    console = Console()
    with contextlib.ExitStack() as stack:
        variants, gateway_pid, cold_start_s = start_everything(stack)
        rates: dict[str, list[float]] = {v.name: [] for v in variants}
        rounds = [v for _ in range(repeats) for v in variants]
        for variant in track(rounds, description="loading", console=Console(stderr=True)):
            rates[variant.name].append(requests_per_second(variant, seconds))
        memory_mb = resident_mb(gateway_pid)
    table = Table(title=f"gateway: {CONNECTIONS} in flight, median of {repeats} × {seconds:g} s (range)")
    for column in ("what", "requests/s", "against", "ratio"):
        table.add_column(column, justify="left" if column in ("what", "against") else "right")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    grpc_empty = max(("empty gRPC handler, aio", "empty gRPC handler, threads"), key=lambda name: medians[name])
    for variant in variants:
        values = rates[variant.name]
        baseline = grpc_empty if variant.baseline == "empty gRPC" else variant.baseline
        ratio = f"{medians[variant.name] / medians[baseline]:.2f}" if baseline else ""
        spread = f"{medians[variant.name]:,.0f} ({min(values):,.0f}-{max(values):,.0f})"
        table.add_row(variant.name, spread, baseline or "", ratio)
    console.print(table)
    console.print(
        f"gateway: {memory_mb:.0f} MB resident after the load, {cold_start_s:.2f} s from start to /readyz 200"
    )


def check_ready() -> None:
    """Ends the program where a benchmark cannot run, and says what is missing."""
    if shutil.which("h2load") is None:
        sys.exit("expected h2load on PATH; found none. Install Debian's nghttp2-client")
    if newest_version() is None:
        sys.exit(f"expected a published model under models/{MODEL_NAME}; found none. Run `make run` once")


def newest_version() -> Path | None:
    """The folder of the highest version."""
    versions = [path for path in (ROOT / "models" / MODEL_NAME).glob("*") if path.name.isdecimal()]
    return max(versions, key=lambda path: int(path.name), default=None)


def start_everything(stack: contextlib.ExitStack, *, bare: bool = True) -> tuple[list[Variant], int, float]:
    """Starts the servers; gives the variants, the gateway's process id and its seconds from start to ready.

    Without ``bare`` the handlers that do nothing are not started, and their variants must not be loaded.
    """
    empty, aio, threads, rest, rpc, upstream, upstream_rest = (free_port() for _ in range(7))
    models = ROOT / "models" / MODEL_NAME
    server = [sys.executable, "-m", "serving.model_server", f"--port={upstream}", f"--rest_api_port={upstream_rest}"]
    server += ["--prefer_tflite_model=true"]  # as `make run` starts it
    stack.enter_context(process([*server, f"--model_name={MODEL_NAME}", f"--model_base_path={models}"], LOAD_CORE))
    if bare:
        start_bare(stack, empty, aio, threads)
    wait_for_port(upstream, limit_s=120)
    wait_for_model(f"127.0.0.1:{upstream_rest}")
    started = time.perf_counter()
    gateway = stack.enter_context(
        process(
            [sys.executable, "-m", "serving.gateway"],
            SERVER_CORE,
            DIGITS_REST_PORT=str(rest),
            DIGITS_GRPC_PORT=str(rpc),
            DIGITS_UPSTREAM=f"127.0.0.1:{upstream}",
        )
    )
    wait_for_ready(f"http://127.0.0.1:{rest}/readyz")
    cold_start_s = time.perf_counter() - started

    pixels, picture = sample_image()
    octets, png = ("content-type: application/octet-stream",), ("content-type: image/png",)
    call = f"http://127.0.0.1:{rest}/classify"
    classify = "/digits.v1.Digits/Classify"
    predict = "/tensorflow.serving.PredictionService/Predict"
    message = grpc_frame(classify_request(pixels))
    bare_http, bare_aio, bare_threads = "bare ASGI on uvicorn", "empty gRPC handler, aio", "empty gRPC handler, threads"
    direct = "model server, gRPC Predict"
    variants = [
        Variant(bare_http, f"http://127.0.0.1:{empty}/", pixels, octets),
        Variant("gateway REST, raw 784 bytes", call, pixels, octets, baseline=bare_http),
        Variant("gateway REST, PNG", call, picture, png, baseline=bare_http),
        Variant(bare_aio, f"http://127.0.0.1:{aio}{classify}", message, (), grpc=True),
        Variant(bare_threads, f"http://127.0.0.1:{threads}{classify}", message, (), grpc=True),
        Variant("gateway gRPC Classify", f"http://127.0.0.1:{rpc}{classify}", message, (), True, "empty gRPC"),
        Variant(direct, f"http://127.0.0.1:{upstream}{predict}", grpc_frame(predict_request(pixels)), (), grpc=True),
        Variant("gateway gRPC Classify again", f"http://127.0.0.1:{rpc}{classify}", message, (), True, direct),
    ]
    return variants, gateway.pid, cold_start_s


def start_bare(stack: contextlib.ExitStack, http: int, aio: int, threads: int) -> None:
    """The handlers that do nothing, on the core of what is compared with them."""
    uvicorn = [sys.executable, "-m", "uvicorn", "benchmarks.bare:app", f"--port={http}", "--loop=uvloop"]
    stack.enter_context(process([*uvicorn, "--http=httptools", "--no-access-log", "--log-level=error"], SERVER_CORE))
    stack.enter_context(process([sys.executable, "-m", "benchmarks.bare", "grpc-aio", str(aio)], SERVER_CORE))
    stack.enter_context(process([sys.executable, "-m", "benchmarks.bare", "grpc-threads", str(threads)], SERVER_CORE))
    for port in (http, aio, threads):
        wait_for_port(port, limit_s=120)


def requests_per_second(variant: Variant, seconds: float) -> float:
    """h2load's rate for ``seconds``; ends the benchmark if any answer was an error."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(variant.body)
        body.flush()
        command = ["taskset", "-c", LOAD_CORE, "h2load", f"--duration={seconds:g}", f"--data={body.name}"]
        if variant.grpc:  # one connection a client, as gRPC does, with the calls as its streams
            headers = ("content-type: application/grpc", "te: trailers", *variant.headers)
            command += ["--clients=4", f"--max-concurrent-streams={max(1, variant.streams // 4)}"]
        else:
            headers = variant.headers
            command += ["--h1", f"--clients={CONNECTIONS}"]
        for header in headers:
            command += ["--header", header]
        output = subprocess.run([*command, variant.url], check=True, capture_output=True, text=True).stdout
    rate = re.search(r"finished in [\d.]+m?s, ([\d.]+) req/s", output)
    codes = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", output)
    if rate is None or codes is None or any(int(code) for code in codes.groups()[1:]):
        raise NotAllGood(f"{variant.name}: expected only 2xx answers; h2load printed:\n{output}")
    return float(rate.group(1))


@contextlib.contextmanager
def process(command: list[str], core: str, **environment: str) -> Iterator[subprocess.Popen]:
    child = subprocess.Popen(
        ["taskset", "-c", core, *command], cwd=ROOT, env={**os.environ, **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for_port(port: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    sys.exit(f"nothing listened on port {port} within {limit_s:g} s")


def wait_for_model(address: str) -> None:
    import httpx

    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if "AVAILABLE" in httpx.get(f"http://{address}/v1/models/{MODEL_NAME}").text:
                return
        time.sleep(0.1)
    sys.exit("the model server had no version AVAILABLE within 60 s")


def wait_for_ready(url: str) -> None:
    import httpx

    for _ in range(6000):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.01)
    sys.exit("the gateway was not ready within 60 s")


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def sample_image() -> tuple[bytes, bytes]:
    """The first test image: its 784 raw bytes, and the same as a PNG."""
    import io

    from PIL import Image

    with (ROOT / "data" / "t10k-images-idx3-ubyte").open("rb") as file:
        file.seek(16)
        pixels = file.read(IMAGE_BYTES)
    sink = io.BytesIO()
    Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(28, 28)).save(sink, "PNG")
    return pixels, sink.getvalue()


def grpc_frame(message: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(message)) + message


def classify_request(pixels: bytes) -> bytes:
    from serving.protos import digits_pb2

    return digits_pb2.ClassifyRequest(image=pixels).SerializeToString()


def predict_request(pixels: bytes, count: int = 1) -> bytes:
    from serving.protos import upstream_pb2

    request = upstream_pb2.PredictRequest()
    request.model_spec.name = MODEL_NAME
    request.model_spec.signature_name = SIGNATURE
    tensor = request.inputs["images"]
    tensor.dtype = upstream_pb2.DT_UINT8
    for size in (count, 28, 28):
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = pixels
    return request.SerializeToString()
