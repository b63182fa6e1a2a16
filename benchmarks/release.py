"""What the flow adds to DVC: `release` beside `dvc repro`, when nothing changed and when all stages ran.

Each starts in a fresh process on the real data, in a clone of its own; the release brings its own Prefect server, as it
does where none is configured. Training is cut to three epochs and the gate is lenient, for this is not about them. What
the release does beyond `dvc repro` counts too: publishing, which asks the model in a fresh process, promotion, and
artifacts for Prefect's pages.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
REPRO, RELEASE = ("dvc", "repro"), ("pipelines", "release")


def run(seconds: float, repeats: int) -> None:
    """Prints the table; ``seconds`` means nothing here. Needs the data (`python -m pipelines ingest`)."""
    del seconds
    took: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        project = clone(Path(folder))
        for at in track(range(repeats), description="releasing", console=Console(stderr=True)):
            for command, other in ((REPRO, RELEASE), (RELEASE, REPRO)):
                change_all(project, seed=100 + 2 * at + (command is RELEASE))
                took.setdefault(("all stages ran", command), []).append(timed(project, *command))
                timed(project, *other)  # brings the rest up to date: publishes, or notes what was published
            for command in (REPRO, RELEASE):
                took.setdefault(("nothing changed", command), []).append(timed(project, *command))
    table = Table(title=f"seconds, median of {repeats} (range)")
    for column in ("", "dvc repro", "release", "added"):
        table.add_column(column, justify="right")
    for what in ("nothing changed", "all stages ran"):
        repro, release = took[what, REPRO], took[what, RELEASE]
        added = statistics.median(release) - statistics.median(repro)
        table.add_row(what, spread(repro), spread(release), f"{added:.1f}")
    Console().print(table)


def clone(folder: Path) -> Path:
    """The last commit and its data, with a DVC cache of its own."""
    project = folder / "project"
    subprocess.run(["git", "clone", "-q", ROOT, project], check=True)
    shutil.copytree(ROOT / "data", project / "data")
    (project / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {folder / 'cache'}\n")
    return project


def change_all(project: Path, seed: int) -> None:
    """Parameters that each stage depends on."""
    yaml, path = YAML(), project / "params.yaml"
    params = yaml.load(path.read_text(encoding="utf-8"))
    params["seed"] = seed
    params["train"]["epochs"] = 3
    params["validate"]["ink_share"][0] = 0.1 + seed / 1e5
    params["gate"].update(min_accuracy=0.9, min_macro_f1=0.9, min_class_recall=0.8, max_ece=0.5, max_accuracy_drop=0.5)
    # How good they are is not what is measured here.
    params["gate"].update(max_nll=10.0, significance=1e-9)
    floors = params["gate"]["robustness"]
    floors.update(dict.fromkeys(floors, 0.0), robustness_images=1, corruption_gain=-1.0)
    yaml.dump(params, path)


def timed(project: Path, *module_and_arguments: str) -> float:
    """Wall seconds of a command; ends this one when it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DIGITS_", "PREFECT_"))}
    environment = {**kept, "DO_NOT_TRACK": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *module_and_arguments], cwd=project, env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    took = time.monotonic() - started
    if done.returncode:
        sys.exit(f"{' '.join(module_and_arguments)} failed: {done.stdout}{done.stderr}")
    return took


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"
