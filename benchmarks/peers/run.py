"""Our gateway and model server beside other servers of the same SavedModel: REST, gRPC, and waiting at half load.

Every side has the same two cores, on the second of which the load generator runs too. Each peer runs in an environment
of its own (`make bench-peers` installs them) at the settings that suit it; the better counts. Ours is measured right
before each. ``BENCH_PEERS=ray,mlserver`` takes only those.
"""

import base64
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import gateway, limits
from benchmarks.gateway import ROOT, NotAllGood, Variant, free_port, requests_per_second

HERE = Path(__file__).resolve().parent
OCTETS = ("content-type: application/octet-stream",)
START_LIMIT_S = 60.0

SHORT_RUNS = 5
"""So many times both sides wait in turns, shortly, and the median of each counts: a shared machine is slower for
tenths of a second now and then, and who has the longer turn has more of that."""


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to run a peer. ``{port}`` and ``{grpc_port}`` stand for free ports."""

    peer: str
    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    path: str = "/classify"
    kind: str = "raw"
    grpc_path: str = ""


SETTINGS = (
    Setting("fastapi", "1 worker", ("uvicorn", "fastapi_app:app", "--port={port}", "--no-access-log")),
    Setting("fastapi", "2 workers", ("uvicorn", "fastapi_app:app", "--port={port}", "--no-access-log", "--workers=2")),
    Setting("litserve", "batches, 1 worker", ("python", "litserve_app.py", "{port}", "64", "1"), kind="base64"),
    Setting("litserve", "single, 2 workers", ("python", "litserve_app.py", "{port}", "1", "2"), kind="base64"),
    Setting(
        "bentoml", "single, 2 workers", ("bentoml", "serve", "bentoml_app:Digits", "--port={port}"),
        {"PEER_WORKERS": "2"},
    ),
    Setting(
        "bentoml", "batches, 1 worker", ("bentoml", "serve", "bentoml_app:Digits", "--port={port}"),
        path="/batched", kind="json",
    ),
    Setting(
        "mlserver", "batches", ("mlserver", "start", "mlserver"),
        {"MLSERVER_MODEL_MAX_BATCH_SIZE": "64", "MLSERVER_MODEL_MAX_BATCH_TIME": "0.002"},
        path="/v2/models/digits/infer", kind="v2", grpc_path="/inference.GRPCInferenceService/ModelInfer",
    ),
    Setting(
        "mlserver", "single", ("mlserver", "start", "mlserver"),
        path="/v2/models/digits/infer", kind="v2", grpc_path="/inference.GRPCInferenceService/ModelInfer",
    ),
    Setting(
        "ray", "batches, 1 replica", ("python", "ray_app.py", "{port}", "{grpc_port}", "64", "1"),
        grpc_path="/digits.v1.Digits/Classify",
    ),
    Setting(
        "ray", "single, 2 replicas", ("python", "ray_app.py", "{port}", "{grpc_port}", "1", "2"),
        grpc_path="/digits.v1.Digits/Classify",
    ),
)  # fmt: skip


@dataclass
class Measured:
    """Calls a second and milliseconds; 0 where there is nothing to measure."""

    rest: float = 0.0
    grpc: float = 0.0
    p99_ms: float = 0.0
    ours_p99_ms: float = 0.0
    """Of the gateway, at the load of a peer's ``p99_ms``."""


def run(seconds: float, repeats: int) -> None:
    """Prints the table."""
    gateway.check_ready()
    wanted = [one for one in SETTINGS if _environment(one.peer).is_dir()]
    only = os.environ["BENCH_PEERS"].split(",") if "BENCH_PEERS" in os.environ else None
    wanted = [one for one in wanted if only is None or one.peer in only]
    if not wanted:
        sys.exit("expected peers' environments under .peers/; found none. Run `make bench-peers`")
    console = Console()
    found: dict[Setting | None, list[Measured]] = {None: []}
    with contextlib.ExitStack() as stack:
        variants, _, _ = gateway.start_everything(stack, bare=False)
        by_name = {variant.name: variant for variant in variants}
        rest, grpc = by_name["gateway REST, raw 784 bytes"], by_name["gateway gRPC Classify"]
        for setting in wanted:
            try:
                with started(setting) as (peer_rest, peer_grpc):
                    for _ in range(repeats):
                        ours, peer = rates(rest, grpc, seconds), rates(peer_rest, peer_grpc, seconds)
                        measure_waits(ours, rest, peer, peer_rest, seconds)
                        found[None].append(ours)
                        found.setdefault(setting, []).append(peer)
                        said = f"{setting.peer}, {setting.name}: {found[setting][-1]}; ours {found[None][-1]}"
                        print(said, file=sys.stderr)
            except (RuntimeError, NotAllGood, subprocess.CalledProcessError) as err:
                console.print(f"{setting.peer}, {setting.name}: not measured: {err}")
    show(console, {key: median_of(values) for key, values in found.items()})


def rates(rest: Variant, grpc: Variant | None, seconds: float) -> Measured:
    """The highest rates."""
    return Measured(requests_per_second(rest, seconds), requests_per_second(grpc, seconds) if grpc else 0.0)


def measure_waits(ours: Measured, rest: Variant, peer: Measured, peer_rest: Variant, seconds: float) -> None:
    """The 99th percentile of a REST call's time, at half of the highest rate; and of ours at the peer's half."""
    loads = (rest, ours.rest / 2), (peer_rest, peer.rest / 2), (rest, peer.rest / 2)
    runs = [[limits.open_loop(what, rate, seconds / 2)["p99_ms"] for what, rate in loads] for _ in range(SHORT_RUNS)]
    ours.p99_ms, peer.p99_ms, peer.ours_p99_ms = map(statistics.median, zip(*runs, strict=True))


def median_of(values: list[Measured]) -> Measured:
    names = [one.name for one in fields(Measured)]
    return Measured(*(statistics.median(getattr(one, name) for one in values) for name in names))


def show(console: Console, medians: "dict[Setting | None, Measured]") -> None:
    """The table, and how many times the best peer's rates ours are."""
    table = Table(title="the same SavedModel on the same two cores, 64 in flight; medians")
    for column in ("what", "REST/s", "gRPC/s", "p99 ms at half of its REST", "ours at that load"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for setting, one in medians.items():
        name = "digits gateway" if setting is None else f"{setting.peer}, {setting.name}"
        table.add_row(
            name,
            f"{one.rest:,.0f}",
            f"{one.grpc:,.0f}" if one.grpc else "",
            f"{one.p99_ms:.1f}" if one.p99_ms else "none answered",
            f"{one.ours_p99_ms:.1f}" if setting is not None else "",
        )
    console.print(table)
    ours, peers = medians[None], [one for setting, one in medians.items() if setting is not None]
    if not peers:
        return
    best_rest = max(one.rest for one in peers)
    best_grpc = max(one.grpc for one in peers)
    best_p99 = min((one for one in peers if one.p99_ms), key=lambda one: one.p99_ms, default=None)
    text = f"REST {ours.rest / best_rest:.1f} times the best peer's"
    text += f", gRPC {ours.grpc / best_grpc:.1f} times" if best_grpc else ""
    if best_p99 is not None:
        text += f", p99 {ours.p99_ms / best_p99.p99_ms:.2f} of the best peer's"
        text += f" ({best_p99.ours_p99_ms / best_p99.p99_ms:.2f} at that peer's load)"
    console.print(text)


@contextlib.contextmanager
def started(setting: Setting) -> Iterator[tuple[Variant, Variant | None]]:
    """The peer, answering; ended with all its children."""
    port, grpc_port = free_port(), free_port()
    environment = {
        **os.environ, **setting.environment, "PEER_MODEL": str(gateway.newest_version()),
        "PYTHONPATH": f"{HERE}:{HERE / 'mlserver'}:{ROOT}", "CUDA_VISIBLE_DEVICES": "-1", "DO_NOT_TRACK": "1",
        "BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0", "MLSERVER_HTTP_PORT": str(port),
        "MLSERVER_GRPC_PORT": str(grpc_port), "MLSERVER_METRICS_PORT": str(free_port()), "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_PARALLEL_WORKERS": "0", "MLSERVER_DEBUG": "false",
    }  # fmt: skip
    command = [part.format(port=port, grpc_port=grpc_port) for part in setting.command]
    command[0] = str(_environment(setting.peer) / "bin" / command[0])
    environment["PATH"] = f"{_environment(setting.peer) / 'bin'}:{environment['PATH']}"
    log = ROOT / "test-output" / f"peer-{setting.peer}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as sink:
        child = subprocess.Popen(
            ["taskset", "-c", "0,1", *command], cwd=HERE, env=environment, stdout=sink, stderr=sink,
            start_new_session=True,
        )  # fmt: skip
        try:
            rest = rest_variant(setting, port)
            wait_until_it_reads(setting, rest, child, log)
            yield rest, grpc_variant(setting, grpc_port)
        finally:
            end(child)


def rest_variant(setting: Setting, port: int) -> Variant:
    pixels, _ = gateway.sample_image()
    url = f"http://127.0.0.1:{port}{setting.path}"
    if setting.kind == "raw":
        return Variant(setting.name, url, pixels, OCTETS)
    import orjson

    values = list(pixels)
    body: dict = {"images": [[values[row * 28 : row * 28 + 28] for row in range(28)]]}
    if setting.kind == "base64":
        body = {"image": base64.b64encode(pixels).decode()}
    elif setting.kind == "v2":
        body = {"inputs": [{"name": "images", "shape": [1, 28, 28], "datatype": "UINT8", "data": values}]}
    return Variant(setting.name, url, orjson.dumps(body), ("content-type: application/json",))


def grpc_variant(setting: Setting, port: int) -> Variant | None:
    if not setting.grpc_path:
        return None
    pixels, _ = gateway.sample_image()
    if "ModelInfer" in setting.grpc_path:
        from serving.protos import open_inference_pb2 as pb

        request = pb.ModelInferRequest(model_name="digits", raw_input_contents=[pixels])
        request.inputs.add(name="images", datatype="UINT8", shape=[1, 28, 28])
        message = request.SerializeToString()
    else:
        message = gateway.classify_request(pixels)
    url = f"http://127.0.0.1:{port}{setting.grpc_path}"
    return Variant(setting.name, url, gateway.grpc_frame(message), ("application: digits",), grpc=True)


def wait_until_it_reads(setting: Setting, rest: Variant, child: subprocess.Popen, log: Path) -> None:
    """Until it answers, and what it answers is a seven, as the first test image is."""
    headers = dict(one.split(": ", 1) for one in rest.headers)
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until and child.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(rest.url, content=rest.body, headers=headers, timeout=20)
            if answer.status_code == 200:
                check_seven(setting, answer.json())
                return
        time.sleep(0.2)
    raise RuntimeError(f"it did not answer within {START_LIMIT_S:g} s; its last words: {log.read_text()[-500:]}")


def check_seven(setting: Setting, answer: object) -> None:
    if isinstance(answer, dict) and "digit" in answer:
        digit = answer["digit"]
    else:
        row = answer["outputs"][0]["data"] if isinstance(answer, dict) else answer[0]  # type: ignore[index]
        digit = max(range(10), key=row.__getitem__)
    if digit != 7:
        raise RuntimeError(f"expected {setting.peer} to read a 7, came {digit}")


def end(child: subprocess.Popen) -> None:
    """Its whole session: peers start processes of their own."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(child.pid).children(recursive=True)
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(15)
    whole: list[psutil.Process | subprocess.Popen] = [*family, child]
    for one in whole:
        with contextlib.suppress(psutil.NoSuchProcess):  # both know their process by more than its number
            one.kill()
    child.wait(5)


def _environment(peer: str) -> Path:
    return ROOT / ".peers" / peer
