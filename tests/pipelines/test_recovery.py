"""A pipeline that is killed, poisoned or made worse, on real digits and real stages."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import ANY_ROBUSTNESS, HANG_S, clean_environment, copy_checkout, running_below

STAGES = ["validate", "prepare", "train", "twin", "evaluate", "probe", "gate", "export"]
PNG_MAGIC = b"\x89PNG"


def run(root: Path, *module_and_arguments: str, timeout_s: float = HANG_S) -> subprocess.CompletedProcess[str]:
    """`python -m …` in a checkout, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", *module_and_arguments], cwd=root, env=environment(), capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=timeout_s,
    )  # fmt: skip


def environment() -> dict[str, str]:
    return clean_environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + np.ascontiguousarray(array, np.uint8).tobytes())


def read_idx(path: Path) -> np.ndarray:
    data = path.read_bytes()
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


@pytest.fixture
def small(raw_data: Path, tmp_path: Path) -> Path:
    """A checkout whose data is a team's own: 3,000 and 800 of the real digits, and parameters to match."""
    root = copy_checkout(tmp_path / "checkout")
    # A cache of its own: every stage is to run, also where these tests ran before.
    (root / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {tmp_path / 'cache'}\n")
    (root / "data").mkdir()
    for prefix, count in (("train", 3000), ("t10k", 800)):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{prefix}-{kind}-ubyte"
            write_idx(root / "data" / name, read_idx(raw_data / name)[:count])
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["validate"].update(sha256={}, train_images=3000, test_images=800, class_share=[0.05, 0.2])
    params["prepare"].update(validation_images=500)
    params["model"].update(hidden_widths=[128])
    params["train"].update(epochs=3, batch_size=100)
    params["twin"].update(epochs=1)
    params["evaluate"].update(robustness_images=50, nondigit_images=16)
    params["gate"].update(min_accuracy=0.8, min_macro_f1=0.8, min_class_recall=0.5, max_ece=0.5, max_nll=2.0)
    params["gate"].update(robustness=ANY_ROBUSTNESS)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=root, env=environment(), check=True)
    return root


def kill_during(root: Path, stage: str) -> None:
    """Starts `dvc repro` and ends it and all it started with kill -9 as soon as ``stage`` is at work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"], cwd=root, env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while process.poll() is None:
            if any(f"training {stage}" in command for _, command in running_below(process.pid)):
                time.sleep(0.7)
                return
            time.sleep(0.2)
        pytest.fail(f"dvc repro ended before {stage} began:\n{process.stdout.read() if process.stdout else ''}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(HANG_S)


def test_killed_at_any_stage_the_next_run_finishes(small: Path) -> None:
    """Kill -9 in each stage in turn; then one `dvc repro` completes, and another has nothing to do."""
    for stage in STAGES:
        kill_during(small, stage)
    finished = run(small, "dvc", "repro")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    status = run(small, "dvc", "status", "--json")
    assert json.loads(status.stdout) == {}
    decision = json.loads((small / "artifacts" / "gate" / "decision.json").read_text())
    assert decision["accepted"] is True
    assert decision["first_release"] is True
    assert (small / "artifacts" / "export" / "saved_model" / "saved_model.pb").stat().st_size > 0
    for picture in (small / "artifacts").rglob("*.png"):
        assert picture.read_bytes().startswith(PNG_MAGIC)
    verified = run(small, "training", "verify", "artifacts/export/saved_model")
    assert verified.returncode == 0, verified.stderr


def flip_one_bit(data: Path) -> None:
    with (data / "train-images-idx3-ubyte").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))


def put_a_label_out_of_range(data: Path) -> None:
    with (data / "train-labels-idx1-ubyte").open("r+b") as file:
        file.seek(8 + 1234)
        file.write(bytes([10]))


def empty_a_file(data: Path) -> None:
    (data / "t10k-images-idx3-ubyte").write_bytes(b"")


@pytest.mark.parametrize(
    ("poison", "named", "command"),
    [
        pytest.param(flip_one_bit, "train-images-idx3-ubyte", ("dvc", "repro"), id="one bit flipped, dvc repro"),
        pytest.param(flip_one_bit, "train-images-idx3-ubyte", ("pipelines", "release"), id="one bit flipped, release"),
        pytest.param(put_a_label_out_of_range, "train-labels-idx1-ubyte", ("dvc", "repro"), id="a label out of range"),
        pytest.param(empty_a_file, "t10k-images-idx3-ubyte", ("dvc", "repro"), id="an emptied file"),
    ],
)
def test_poisoned_data_stops_before_training(raw_data, tmp_path, poison, named, command) -> None:
    """The damaged file is named, what to do is said, nothing was trained or published."""
    root = copy_checkout(tmp_path / "checkout")
    (root / "data").mkdir()
    for file in raw_data.glob("*ubyte"):
        (root / "data" / file.name).write_bytes(file.read_bytes())
    poison(root / "data")
    stopped = run(root, *command)
    said = stopped.stdout + stopped.stderr
    assert stopped.returncode != 0
    assert named in said
    assert "python -m pipelines ingest" in said
    assert "Traceback" not in said
    assert not (root / "artifacts" / "prepare").exists()
    assert not (root / "artifacts" / "train").exists()
    assert not list((root / "models").glob("digits/*"))
