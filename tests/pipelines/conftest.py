"""Projects to try the pipelines in: real git, real DVC; small data and stages that take no time."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines import prefect_server, versioning
from pipelines.arrays import idx_header, read_images, read_labels
from pipelines.dataset import digest_of
from pipelines.settings import Settings
from tests.conftest import HANG_S, ROOT, clean_environment

TRAIN, TEST = 400, 200
"""Images of a team's own data."""

DVC_YAML = """
stages:
  export:
    cmd: python -m training export
    deps: [artifacts/gate/approval.json, artifacts/evaluate/metrics.json]
    outs: [artifacts/export/saved_model, artifacts/export/export.json]
  gate:
    cmd: python -m training gate
    deps: [artifacts/evaluate/metrics.json, models/champion]
    outs: [artifacts/gate/decision.json, artifacts/gate/approval.json]
  evaluate:
    cmd: python -m training evaluate
    deps: [data, weights.txt, accuracy.txt]
    outs: [artifacts/evaluate/metrics.json]
"""


def run(project: Path, *words: str, timeout_s: float = HANG_S, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m …` in a project, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=project, env=environment_for(project, **environment), text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_s,
    )  # fmt: skip


def environment_for(project: Path, **extra: str) -> dict[str, str]:
    """Our packages can be imported, but a project's own `training` comes first. No model server can be asked."""
    defaults = {
        "PYTHONPATH": f"{project}:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DIGITS_MODEL_SERVER_URL": "http://127.0.0.1:9",
    }
    return clean_environment(**defaults | extra)


@pytest.fixture(scope="session")
def bare_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty project under git and DVC, with our own DVC settings."""
    project = tmp_path_factory.mktemp("bare") / "project"
    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    for name in (".dvcignore", ".gitignore", "params.yaml", "data.dvc"):
        shutil.copy(ROOT / name, project / name)
    (project / "models" / "champion").mkdir(parents=True)
    shutil.copy(ROOT / "models" / "champion" / "README.md", project / "models" / "champion")
    commit(project)
    return project


@pytest.fixture
def bare(bare_template: Path, tmp_path: Path) -> Path:
    """A fresh clone, as far as data goes: data.dvc says what is wanted, nothing of it is here."""
    return Path(shutil.copytree(bare_template, tmp_path / "project"))


@pytest.fixture(scope="session")
def toy_template(bare_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with data of its own and stages that take no time."""
    project = Path(shutil.copytree(bare_template, tmp_path_factory.mktemp("toy") / "project"))
    (project / "data").mkdir()
    for name in ("images", "labels"):
        (project / "data" / name).write_text(name)
    (project / "params.yaml").write_text("seed: 7\nprofile: quick\nprofiles: {quick: {}, full: {}}\n")
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "weights.txt").write_text("first")
    (project / "accuracy.txt").write_text("0.99")
    (project / "training").mkdir()
    (project / "training" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("toy_stages.py"), project / "training" / "__main__.py")
    (project / "data.dvc").unlink()
    done = run(project, "dvc", "add", "-q", "data")
    assert done.returncode == 0, done.stderr
    commit(project)
    return project


@pytest.fixture
def toy(toy_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_template, tmp_path / "project"))


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(idx_header(*array.shape) + np.ascontiguousarray(array, np.uint8).tobytes())


@pytest.fixture(scope="session")
def mnist(raw_data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, test images and labels."""
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    return tuple((read_images if "idx3" in name else read_labels)(raw_data / name) for name in names)  # type: ignore[return-value]


@pytest.fixture(scope="session")
def team_template(bare_template: Path, mnist: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data is a team's own: the first 400 and 200 of the real digits, pinned in params.yaml."""
    project = Path(shutil.copytree(bare_template, tmp_path_factory.mktemp("team") / "project"))
    (project / "data").mkdir()
    arrays = (mnist[0][:TRAIN], mnist[1][:TRAIN], mnist[2][:TEST], mnist[3][:TEST])
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    params = (project / "params.yaml").read_text()
    for name, array in zip(names, arrays, strict=True):
        write_idx(project / "data" / name, array)
        params = params.replace(digest_of(ROOT / "data" / name), digest_of(project / "data" / name))
    params = params.replace("train_images: 60000", f"train_images: {TRAIN}")
    params = params.replace("validation_images: 5000", "validation_images: 100")
    (project / "params.yaml").write_text(params.replace("test_images: 10000", f"test_images: {TEST}"))
    (project / "data.dvc").unlink()
    with versioning.open_repo(Settings(project=project)) as repo:
        versioning.record_data(repo, replace=True)
    commit(project)
    return project


@pytest.fixture
def team(team_template: Path, tmp_path: Path) -> Settings:
    return Settings(project=Path(shutil.copytree(team_template, tmp_path / "project")))


@pytest.fixture(scope="session")
def first_release(
    toy_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess]:
    """A project after its first release, which brought its own Prefect server; and what the release said."""
    project = Path(shutil.copytree(toy_template, tmp_path_factory.mktemp("released") / "project"))
    return project, run(project, "pipelines", "release")


@pytest.fixture
def released(first_release: tuple[Path, subprocess.CompletedProcess], tmp_path: Path) -> Path:
    """A copy of a project with version 1 published."""
    return Path(shutil.copytree(first_release[0], tmp_path / "project"))


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One temporary Prefect server, as the product starts it, for all tests of this worker."""
    settings = Settings(project=tmp_path_factory.mktemp("prefect"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        prefect_server.prepare_environment(settings)
        with prefect_server.server(settings):
            prefect_server.wait_until_ready(settings)
            url = os.environ["PREFECT_API_URL"]
            for name in ("PREFECT_API_URL", "PREFECT_HOME"):
                patch.delenv(name)
            yield url


def commit(project: Path) -> None:
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for words in ([*git, "init", "-q", "-b", "main"], [*git, "add", "-A"], [*git, "commit", "-qm", "as it is"]):
        subprocess.run(words, cwd=project, check=True, capture_output=True)


@pytest.fixture
def candidate(toy: Path) -> Callable[[str, float], Settings]:
    """Makes a judged and exported candidate with the given weights and accuracy, by the stages themselves."""

    def make(weights: str, accuracy: float = 0.99) -> Settings:
        (toy / "weights.txt").write_text(weights)
        (toy / "accuracy.txt").write_text(str(accuracy))
        for stage in ("evaluate", "gate", "export"):
            done = run(toy, "training", stage)
            if done.returncode:
                assert stage == "export", done.stderr
        return Settings(project=toy)

    return make
