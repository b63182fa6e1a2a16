"""What validation costs: the 70,000 images of MNIST, and ten times as many.

Each run is `python -m training validate` in a fresh process on files of its own, imports and reading included. The ten
copies of an image differ in one pixel of the border, so that none is a duplicate.
"""

import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ruamel.yaml import YAML

from training.data import read_raw_split
from training.workspace import Split

ROOT = Path(__file__).resolve().parent.parent
COPIES = (1, 10)


@dataclass(frozen=True)
class Cost:
    """One run."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


def run(seconds: float, repeats: int) -> None:
    """Prints the table; ``seconds`` means nothing here. Needs the data (`python -m pipelines ingest`)."""
    del seconds
    console = Console()
    costs: dict[int, list[Cost]] = {copies: [] for copies in COPIES}
    with tempfile.TemporaryDirectory() as folder:
        for copies in COPIES:
            write_workspace(Path(folder) / str(copies), copies)
        rounds = [copies for _ in range(repeats) for copies in COPIES]
        for copies in track(rounds, description="validating", console=Console(stderr=True)):
            costs[copies].append(validate(Path(folder) / str(copies)))
    table = Table(title=f"validation: median of {repeats} (range)")
    for column in ("images", "seconds", "CPU seconds", "peak memory, MB", "times the first"):
        table.add_column(column, justify="right")
    first = statistics.median(c.seconds for c in costs[1])
    for copies, runs in costs.items():
        took = [c.seconds for c in runs]
        table.add_row(
            f"{70_000 * copies:,}",
            f"{statistics.median(took):.1f} ({min(took):.1f}-{max(took):.1f})",
            f"{statistics.median(c.cpu_seconds for c in runs):.1f}",
            f"{max(c.peak_mb for c in runs):,.0f}",
            f"{statistics.median(took) / first:.1f}",
        )
    console.print(table)


def write_workspace(folder: Path, copies: int) -> None:
    """A workspace with that many copies of MNIST."""
    (folder / "data").mkdir(parents=True)
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["validate"]["sha256"] = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        split = read_raw_split(ROOT / "data", name)
        params["validate"][f"{name}_images"] = len(split.labels) * copies
        write_split(folder / "data", prefix, split, copies)
    YAML().dump(params, folder / "params.yaml")


def write_split(folder: Path, prefix: str, split: Split, copies: int) -> None:
    count, height, width = split.images.shape
    with (folder / f"{prefix}-images-idx3-ubyte").open("wb") as file:
        file.write(struct.pack(">4I", 0x0803, count * copies, height, width))
        for copy in range(copies):
            images = split.images.copy()
            images[:, 0, copy] ^= copy > 0
            file.write(images.tobytes())
    labels = np.tile(split.labels, copies).astype(np.uint8)
    header = struct.pack(">2I", 0x0801, len(labels))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def validate(workspace: Path) -> Cost:
    """One run of the stage; ends this command when the stage does not find the data valid."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "training", "--root", str(workspace), "validate"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"validate failed on {workspace}: {said}")
    return Cost(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
