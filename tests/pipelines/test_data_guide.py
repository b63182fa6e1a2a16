"""docs/data.md is followed from its first command to its last, on a team's own small data."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from pipelines import versioning
from pipelines.arrays import read_images
from pipelines.settings import Settings
from tests.conftest import ANY_ROBUSTNESS, HANG_S, copy_checkout
from tests.docs.commands import documented
from tests.pipelines.conftest import TRAIN, environment_for, run, write_idx

HERE = "tests/pipelines/test_data_guide.py::test_the_data_guide_can_be_followed"


def draw_batch(folder: Path, mnist: tuple) -> None:
    """Ten pictures of digits, each in the folder of its label."""
    for at in range(1000, 1010):
        path = folder / str(mnist[1][at]) / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(255 - mnist[0][at], np.ones((3, 3), np.uint8))).save(path)


def test_the_data_guide_can_be_followed(team: Settings, mnist: tuple, tmp_path: Path) -> None:
    """Push, pull, add a batch, commit, go back, begin with other data: each command does what the page says of it."""
    project = team.project
    draw_batch(tmp_path / "batch-2026-06", mnist)
    identity = {"GIT_AUTHOR_NAME": "tests", "GIT_AUTHOR_EMAIL": "tests@localhost"}
    identity |= {"GIT_COMMITTER_NAME": "tests", "GIT_COMMITTER_EMAIL": "tests@localhost"}
    environment = environment_for(project, **identity)
    images = project / "data" / "train-images-idx3-ubyte"
    counts = {}
    for command in documented(HERE):
        if command.text == "dvc pull":  # from the remote, not from what is here
            shutil.rmtree(project / "data")
            shutil.rmtree(project / ".dvc" / "cache")
        if command.text == "dvc add data":  # "four files of your own"
            images.write_bytes(images.read_bytes()[:-784] + bytes(784))
        done = subprocess.run(
            ["bash", "-euc", command.text.replace("COMMIT", "HEAD")], cwd=project, env=environment, text=True,
            capture_output=True, input="y\n", timeout=HANG_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{command.text}\n{done.stdout}{done.stderr}"
        counts[command.text] = len(read_images(images))
        if command.text == "dvc status --cloud":
            assert "in sync" in done.stdout
    assert counts["dvc pull"] == counts["python -m pipelines ingest --add ../batch-2026-06 --dry-run"] == TRAIN
    assert counts["python -m pipelines ingest --add ../batch-2026-06"] == TRAIN + 10
    assert counts["dvc checkout data.dvc"] == TRAIN
    with versioning.open_repo(team) as repo:
        assert repo.status(targets=[str(project / "data.dvc")]) == {}


@pytest.mark.slow
def test_data_of_ones_own_go_through_every_stage(mnist: tuple, tmp_path: Path) -> None:
    """3,000 and 1,000 images in place of MNIST, and in params.yaml only the keys that the page names."""
    project = copy_checkout(tmp_path / "project")
    (project / "data").mkdir()
    own = {"train-images-idx3": mnist[0][:3000], "train-labels-idx1": mnist[1][:3000]}
    own |= {"t10k-images-idx3": mnist[2][:1000], "t10k-labels-idx1": mnist[3][:1000]}
    for name, array in own.items():
        write_idx(project / "data" / f"{name}-ubyte", array)
    yaml = YAML()
    params = yaml.load((project / "params.yaml").read_text())
    params["validate"] |= {"sha256": {}, "train_images": 3000, "test_images": 1000, "class_share": [0.06, 0.15]}
    params["prepare"]["validation_images"] = 300
    params["gate"] |= {"min_accuracy": 0.93, "min_macro_f1": 0.93, "min_class_recall": 0.8, "max_nll": 0.5}
    params["gate"]["robustness"] = dict(ANY_ROBUSTNESS)
    with (project / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    for words in (("dvc", "add", "data"), ("dvc", "repro"), ("pipelines", "release")):
        done = run(project, *words)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    assert json.loads((project / "artifacts" / "evaluate" / "metrics.json").read_text())["accuracy"] > 0.93
    assert (project / "models" / "digits" / "1" / "saved_model.pb").exists()
