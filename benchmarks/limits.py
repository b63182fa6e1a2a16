"""Whole batches, waiting time at half load, and what happens at twice the load: gateway on core 0, the rest on core 1.

Half and twice are of the highest rate that the same minute showed. The open-loop generator is `benchmarks.open_loop`.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import gateway
from benchmarks.gateway import LOAD_CORE, ROOT, Variant, requests_per_second, resident_mb

BATCH = 512
OVERLOAD_TIMES = 15
"""The overload lasts so many times as long as the other measurements: a minute by default."""


def run(seconds: float, repeats: int) -> None:
    """Prints the tables."""
    gateway.check_ready()
    console = Console()
    with contextlib.ExitStack() as stack:
        variants, pid, _ = gateway.start_everything(stack)
        by_name = {variant.name: variant for variant in variants}
        rest, grpc = by_name["gateway REST, raw 784 bytes"], by_name["gateway gRPC Classify"]
        batches(console, grpc, seconds, repeats)
        table = Table(title=f"open loop, {seconds:g} s each; the last {OVERLOAD_TIMES * seconds:g} s")
        for column in ("load", "offered/s", "accepted/s", "refused", "p50 ms", "p99 ms", "refused p99", "lost"):
            table.add_column(column, justify="left" if column == "load" else "right", overflow="fold")
        for variant in (rest, grpc):
            best = statistics.median(requests_per_second(variant, seconds) for _ in range(repeats))
            half = [open_loop(variant, best / 2, seconds) for _ in range(repeats)]
            add_row(table, f"{'gRPC' if variant.grpc else 'REST'}, half", median_of(half))
        before = resident_mb(pid)
        add_row(table, "gRPC, twice", open_loop(grpc, 2 * best, OVERLOAD_TIMES * seconds))
        console.print(table)
        console.print(f"gateway: {before:.0f} MB before the overload, {resident_mb(pid):.0f} MB after")


def batches(console: Console, grpc: Variant, seconds: float, repeats: int) -> None:
    """Images a second in calls of 512: through the gateway, and the SavedModel called in process on one core."""
    address = grpc.url.removesuffix("/digits.v1.Digits/Classify")
    pixels, _ = gateway.sample_image()
    body = gateway.grpc_frame(gateway.predict_request(pixels * BATCH, BATCH))
    url = f"{address}/tensorflow.serving.PredictionService/Predict"
    through = Variant("through", url, body, (), grpc=True, streams=4)
    rates: dict[str, list[float]] = {"in process": [], "through": []}
    for _ in track(range(repeats), "batches", console=_stderr()):
        rates["in process"].append(in_process(seconds))
        rates["through"].append(requests_per_second(through, seconds) * BATCH)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    console.print(
        f"{BATCH} images a call: {medians['through']:,.0f} images/s through the gateway (4 calls in flight), "
        f"{medians['in process']:,.0f} in process on one core: {medians['through'] / medians['in process']:.2f}"
    )


def in_process(seconds: float) -> float:
    folder = gateway.newest_version()
    command = ["taskset", "-c", LOAD_CORE, sys.executable, "-m", "benchmarks.in_process", str(folder), str(BATCH)]
    ended = subprocess.run(
        [*command, f"{seconds:g}"], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    return float(ended.stdout)


def open_loop(variant: Variant, rate: float, seconds: float) -> dict[str, float]:
    """One run of the generator on the load's core."""
    _, _, rest = variant.url.partition("://")
    address, slash, path = rest.partition("/")
    kind, body = ("grpc", variant.body[5:]) if variant.grpc else ("rest", variant.body)
    content_type = next((h.partition(": ")[2] for h in variant.headers if h.startswith("content-type")), "x/x")
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(body)
        command = [sys.executable, "-m", "benchmarks.open_loop", kind, address, slash + path, file.name, content_type]
        ended = subprocess.run(
            ["taskset", "-c", LOAD_CORE, *command, f"{rate:.1f}", f"{seconds:g}"],
            check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
    return json.loads(ended.stdout)


def median_of(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in results) for name in results[0]}


def add_row(table: Table, name: str, result: dict[str, float]) -> None:
    columns = {
        "offered_per_s": ",.0f", "accepted_per_s": ",.0f", "refused_share": ".1%", "p50_ms": ".1f", "p99_ms": ".1f",
        "refused_p99_ms": ".1f", "lost": ".0f",
    }  # fmt: skip
    table.add_row(name, *(format(result[column], form) for column, form in columns.items()))


def _stderr() -> Console:
    return Console(stderr=True)
