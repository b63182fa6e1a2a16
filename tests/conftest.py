"""What all tests share: the real data, the workspace they run in, and a plan for the workers."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from filelock import FileLock
from ruamel.yaml import YAML
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
ANY_ROBUSTNESS = {
    "robustness_images": 1,
    "corruption_accuracy": 0.0,
    "corruption_gain": -1.0,
    "shift1_accuracy": 0.0,
    "shift2_accuracy": 0.0,
    "thin_accuracy": 0.0,
    "thick_accuracy": 0.0,
    "nondigit_abstention": 0.0,
}
"""``gate.robustness`` of params.yaml for a network that was hardly trained, or for other data."""
OUTPUT = ROOT / "test-output"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--stack", action="store_true", help="also run the container stack; needs Docker")
    parser.addoption("--restart-engine", metavar="COMMAND", help="with --stack: what restarts Docker on this machine")


HANG_S = 600
"""A hang's limit, not a claim about speed: other tests, perhaps other people's work, share the machine. What a test
expects to be ended must go on for longer by itself."""

HTTP = httpx.Client(timeout=HANG_S, limits=httpx.Limits(max_keepalive_connections=0))
"""For requests to servers that come and go. ``httpx.get`` waits for 5 s at most, and reads all certificates for each
request, which takes 24 ms."""

_STACK, _PREFECT = "tests/stack", "prefect"
_WITH_PREFECT = {f"tests/pipelines/test_{name}.py" for name in ("release", "maintenance", "deployments")}
_RECOVERY = "tests/pipelines/test_recovery.py"
_LONGEST_FIRST = (
    _STACK,
    _PREFECT,
    _RECOVERY,
    "tests/pipelines/test_other_data.py",
    "tests/training/test_path.py",
    "tests/pipelines/test_run.py",
    "tests/pipelines/test_promotion.py",
    "tests/serving/gateway/test_fuzz.py",
    "tests/training/test_search.py",
    "tests/training/test_workers.py",
    "tests/pipelines/test_data_guide.py",
    "tests/pipelines/test_scoring.py",
    "tests/monitoring/test_rules.py",
    "tests/monitoring/test_live.py",
    "tests/training/test_notebook.py",
    "tests/pipelines/test_publish.py",
    "tests/pipelines/test_rollback.py",
    "tests/serving/gateway/test_workers.py",
    "tests/k8s/test_manifests.py",
    "tests/training/test_receptive_fields.py",
)
"""Groups of tests that take over 15 s. Begun last, one of them would leave the other workers without work."""


def _group(nodeid: str) -> str:
    """What stays on one worker: a file, all of tests/stack, or all that share a Prefect server."""
    file = nodeid.split("::")[0]
    if file.startswith(f"{_STACK}/"):
        return _STACK
    return _PREFECT if file in _WITH_PREFECT else file


class OneStack(LoadScopeScheduling):
    """Each group on one worker; but the tests of recovery, long ones that share nothing, wherever there is room."""

    def _split_scope(self, nodeid: str) -> str:
        group = _group(nodeid)
        return nodeid if group == _RECOVERY else group


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneStack:
    return OneStack(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {group: number for number, group in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(_group(item.nodeid), len(place)))
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def raw_data() -> Path:
    """The folder with the four MNIST files, fetched and verified by the product's own ingest if need be."""
    OUTPUT.mkdir(exist_ok=True)
    with FileLock(OUTPUT / "ingest.lock"):
        subprocess.run([sys.executable, "-m", "pipelines", "ingest"], cwd=ROOT, check=True, timeout=300)
    return ROOT / "data"


def change_params(project: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a project's params.yaml; its comments stay."""
    yaml = YAML()
    params = yaml.load((project / "params.yaml").read_text())
    change(params)
    with (project / "params.yaml").open("w") as file:
        yaml.dump(params, file)


def copy_checkout(target: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """A fresh checkout of the working tree as it is now, in ``target``: its own git and DVC, nothing built.

    ``change`` alters its params.yaml first. All such checkouts share a DVC cache, so that what was built once is taken
    from there, and not the user's cache.
    """
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in listing.stdout.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    if change is not None:
        change_params(target, change)
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in ([*git, "init", "-q", "-b", "main"], [*git, "add", "-A"], [*git, "commit", "-qm", "a checkout"]):
        subprocess.run(command, cwd=target, check=True, capture_output=True)
    cache = OUTPUT / "dvc-cache"
    (target / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {cache}\n")
    return target


def running_below(pid: int) -> list[tuple[psutil.Process, str]]:
    """The processes that ``pid`` started, at any depth, with their command lines."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile, or a zombie
                found.append((process, " ".join(process.cmdline())))
    return found


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without any DIGITS_* or PREFECT_* setting of its user."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DIGITS_", "PREFECT_"))}
    return {**kept, "DO_NOT_TRACK": "1", **extra}
