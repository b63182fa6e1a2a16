"""A candidate made worse on purpose, beside a running stack. The last file here: it leaves other data behind."""

import json
import subprocess
import sys

import numpy as np
import yaml

from tests.conftest import HANG_S, HTTP
from tests.stack.conftest import Stack
from tests.stack.test_bad_requests import drawn_seven, encode


def test_a_worse_candidate_is_rejected_and_the_served_version_stays(stack: Stack) -> None:
    """One epoch on scrambled labels: `release` exits 3 with the reasons; version 1 still answers."""
    labels_file = stack.data_dir / "train-labels-idx1-ubyte"
    raw = labels_file.read_bytes()
    scrambled = np.random.default_rng(0).permutation(np.frombuffer(raw, np.uint8, offset=8))
    labels_file.write_bytes(raw[:8] + scrambled.tobytes())
    params_file = stack.root / "params.yaml"
    params = yaml.safe_load(params_file.read_text())
    params["validate"]["sha256"] = {}
    # Validation would stop at such labels: the gate is what is tried here.
    for limits in ("doubtful_labels", "contradicted_labels"):
        params["validate"][limits] = {"warn": 1, "stop": 1}
    params["validate"]["drift"] = {"warn": 100, "stop": 100}
    params["train"]["epochs"] = 1
    params_file.write_text(yaml.safe_dump(params))
    dvc_add = [sys.executable, "-m", "dvc", "add", "-q", "data"]
    subprocess.run(dvc_add, cwd=stack.root, env=stack.environment, check=True)

    release = subprocess.run(
        [sys.executable, "-m", "pipelines", "release"], cwd=stack.root, env=stack.environment, capture_output=True,
        text=True, stdin=subprocess.DEVNULL, timeout=HANG_S,
    )  # fmt: skip
    said = release.stdout + release.stderr
    assert release.returncode == 3, said
    assert "accuracy" in said
    assert "served version stays" in said
    decision = json.loads((stack.root / "artifacts" / "gate" / "decision.json").read_text())
    assert decision["accepted"] is False
    assert not all(check["passed"] for check in decision["checks"])
    assert [p.name for p in stack.model_dir.iterdir() if p.is_dir()] == ["1"]
    answer = HTTP.post(stack.rest_url + "/classify", content=encode(drawn_seven())).json()
    assert (answer["digit"], answer["model_version"]) == (7, "1")
