"""What all tests share: the real data, the workspace they run in, and a plan for the workers."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
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


_WITH_PREFECT = {f"tests/pipelines/test_{name}.py" for name in ("release", "maintenance", "deployments")}


class OneStack(LoadScopeScheduling):
    """Tests of one file stay on one worker, and all of tests/stack on one, and all that share a Prefect server."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        if file.startswith("tests/stack/"):
            return "stack"
        return "prefect" if file in _WITH_PREFECT else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneStack:
    return OneStack(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest group first, so that the other workers fill the time beside it.
    items.sort(key=lambda item: (ROOT / "tests" / "stack") in item.path.parents, reverse=True)
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


def copy_checkout(target: Path) -> Path:
    """A fresh checkout of the working tree as it is now, in ``target``: its own git and DVC, nothing built.

    All such checkouts share a DVC cache, so that what was built once is taken from there, and not the user's cache.
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
