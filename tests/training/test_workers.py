"""Several processes train one network, as TF_CONFIG says."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import HANG_S, ROOT, clean_environment
from tests.ports import free_ports
from tests.training.conftest import make_workspace
from training.params import BadParams, Params
from training.workspace import Split, Workspace, import_tensorflow_quietly


def free_addresses(count: int) -> list[str]:
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


def start_worker(root: Path, addresses: list[str], index: int) -> subprocess.Popen[str]:
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    environment = clean_environment(TF_CONFIG=json.dumps(config))
    command = [sys.executable, "-m", "training", "--root", str(root), "train"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def prepared(folder: Path, real: dict[str, Split]) -> tuple[Workspace, Params]:
    from training.prepare import prepare

    changes: dict[str, Any] = {
        "train.precision": "float32",
        "train.batch_size": 60,
        "train.learning_rate": 0.0003,  # at a higher rate differences in the last digits soon grow
        "augment.neighbour_share": 0.5,
    }
    workspace, params = make_workspace(folder, real, **changes)
    (workspace.stage_dir("validate") / "report.json").write_text('{"valid": true}')
    prepare(workspace, params, Console(quiet=True))
    return workspace, params


def history(workspace: Workspace) -> dict[str, list[float]]:
    with workspace.artifact("train", "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_two_workers_learn_what_one_learns(tmp_path: Path, real: dict[str, Split]) -> None:
    """The same command with TF_CONFIG: the same loss curve, from half of every batch each; the chief alone writes.

    Deformed copies, the order of the images and the statistics of batch normalisation are the same as with one process;
    what differs is the order in which numbers are added up.
    """
    import_tensorflow_quietly()
    from training.model import load_model
    from training.train import train

    alone, params = prepared(tmp_path / "alone", real)
    roots = [tmp_path / "chief", tmp_path / "other"]
    for root in roots:
        shutil.copytree(alone.root, root)
    addresses = free_addresses(2)
    workers = [start_worker(root, addresses, index) for index, root in enumerate(roots)]
    try:
        train(alone, params, Console(quiet=True))
        said = [worker.communicate(timeout=HANG_S)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert "worker 1 of 2 is done; worker 0 writes the files" in said[1]
    assert not list((roots[1] / "artifacts" / "train").iterdir())

    expected, came = history(alone), history(Workspace(roots[0]))
    for name in ("loss", "validation_loss"):
        assert came[name] == pytest.approx(expected[name], rel=1e-3), name
    for name in ("accuracy", "validation_accuracy"):
        assert came[name] == pytest.approx(expected[name], abs=0.005), name
    weights = [load_model(w.artifact("train", "model.keras")).get_weights() for w in (alone, Workspace(roots[0]))]
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(one, two, rtol=0.02, atol=0.005)


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    import_tensorflow_quietly()
    import tensorflow as tf

    from training.workers import Workers

    workers = Workers(tf.distribute.get_strategy(), index=2, count=4)
    assert workers.share(100) == slice(50, 75)
    with pytest.raises(BadParams, match=r"train.batch_size is 250; allowed with 4 workers: a multiple of 4"):
        workers.share(250)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cluster": {"worker": ["a:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}',
    ],
)
def test_a_tf_config_that_is_not_understood_says_what_is_expected(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import_tensorflow_quietly()
    from training.workers import WorkersApart, join_workers

    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(WorkersApart, match=r'TF_CONFIG is .* expected is .*"type": "worker", "index": 0'):
        join_workers()
