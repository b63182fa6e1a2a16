"""docs/data.md is followed from its first command to its last, on a team's own small data."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines import versioning
from pipelines.arrays import read_images
from pipelines.settings import Settings
from tests.docs.commands import documented
from tests.pipelines.conftest import TRAIN, environment_for

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
            ["bash", "-euc", command.text.replace("COMMIT", "HEAD~1")], cwd=project, env=environment, text=True,
            capture_output=True, stdin=subprocess.DEVNULL, timeout=120,
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
