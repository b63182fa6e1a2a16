"""Build a published version again from its lineage, apart from everything else, and say whether it is the same.

A clone of the repository at the version's commit, with its data and parameters, and a DVC cache of its own: every stage
runs for real, and nothing of the project is touched.
"""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from ruamel.yaml import YAML

from digits.errors import DigitsError
from pipelines import ledger, versioning
from pipelines.dataset import digest_of
from pipelines.disk import disk_errors
from pipelines.ledger import Kind
from pipelines.lineage import package_versions, stage_hashes
from pipelines.locks import only_one
from pipelines.settings import Settings
from pipelines.stages import Stages
from pipelines.text import duration
from pipelines.versions import find_version

_WORKPLACE: Final = "reproduce-"


class CannotReproduce(DigitsError):
    """What the version was made of is not all here."""

    code = "cannot_reproduce"


@dataclass(frozen=True)
class Reproduction:
    """The outcome.

    Attributes:
        version: which one.
        identical: whether the weights are the same to the last bit.
        published_sha256: the weights that are published.
        rebuilt_sha256: the weights that were built now.
        variables_identical: whether the SavedModel's variables are the same files; its graph's file never is.
        differing_outputs: ``stage: path`` of each stage output with another content, in the order of the stages.
        differing_sources: files that the stages depend on and that had changes which were not committed.
        differing_packages: package -> version then and now.
        duration_s: for all of it.
    """

    version: int
    identical: bool
    published_sha256: str
    rebuilt_sha256: str
    variables_identical: bool
    differing_outputs: list[str]
    differing_sources: list[str]
    differing_packages: dict[str, list[str | None]]
    duration_s: float

    @property
    def summary(self) -> str:
        """In one sentence: identical or not, and where the two part."""
        if self.identical:
            return f"identical: weights {self.rebuilt_sha256[:12]} again"
        where = self.differing_outputs[0] if self.differing_outputs else "the weights"
        why = [f"{path} was changed and not committed" for path in self.differing_sources]
        why += [f"{name} was {then}, is {now}" for name, (then, now) in self.differing_packages.items()]
        reason = "; ".join(why) or "code, data and packages are the same: the machine may compute otherwise"
        return (
            f"not identical: weights {self.rebuilt_sha256[:12]}, published {self.published_sha256[:12]}; first "
            f"difference in {where} ({reason})"
        )


def reproduce(
    settings: Settings,
    number: int,
    *,
    tell: Callable[[str], None] = lambda _text: None,
    terminal: TextIO | None = None,
) -> Reproduction:
    """Build a version again and compare; the outcome is a row of the ledger.

    Args:
        settings: where.
        number: the version.
        tell: called with each step.
        terminal: where the stages' own output goes, progress bars and all.

    Raises:
        NoSuchVersion: it is not published.
        CannotReproduce: its commit or data is not here, or its lineage does not name them.
        StageFailed: a stage does not run any more.
    """
    started = time.monotonic()
    lineage = find_version(settings.versions_dir, number).lineage
    with only_one(settings.run_dir / "reproduce.lock", "reproduction"):
        for leftover in settings.run_dir.glob(f"{_WORKPLACE}*/"):  # of one that was killed
            shutil.rmtree(leftover)
        with (
            disk_errors("what is built again", settings.run_dir, "nothing else is touched"),
            tempfile.TemporaryDirectory(dir=settings.run_dir, prefix=_WORKPLACE, ignore_cleanup_errors=True) as place,
        ):
            checkout = settings.model_copy(update={"project": Path(place) / "checkout"})
            tell(
                f"version {number}: commit {_required(lineage, 'git', 'commit')}, data {_required(lineage, 'data_md5')}"
            )
            _check_out(settings, checkout.project, lineage)
            sources = _differing_sources(checkout.project, lineage)
            for path in sources:
                tell(f"! {path} is not what it was: it had changes that were not committed")
            _bring_data(settings, checkout.project, Path(place) / "cache", lineage)
            order = [stage.name for stage in versioning.stages_in_order(checkout)]
            with Stages(checkout, terminal) as stages:
                for name in order:
                    tell(f"▸ {name}")
                    tell(f"✓ {name:<11} {duration(stages.bring_up_to_date(name).duration_s)}")
            done = _compare(checkout, number, lineage, order, sources, started)
    row = ledger.Decision(
        Kind.REPRODUCTION,
        version=number,
        note=done.summary,
        details=asdict(done),
        **{**ledger.about(lineage), "model_sha256": done.rebuilt_sha256, "metrics": {}, "checks": []},
    )
    ledger.record(settings, row, tell=tell)
    return done


def _check_out(settings: Settings, checkout: Path, lineage: Mapping[str, Any]) -> None:
    """The commit with the parameters and the data's record that the version was made with."""
    commit = _required(lineage, "git", "commit")
    if shutil.which("git") is None or not (settings.project / ".git").exists():
        raise CannotReproduce(
            f"expected the git repository with commit {commit}; {settings.project} has none. Clone it"
        )
    _git(settings.project, "clone", "--quiet", "--shared", "--no-checkout", str(settings.project), str(checkout))
    try:
        _git(checkout, "checkout", "--quiet", "--detach", commit)
    except CannotReproduce as err:
        raise CannotReproduce(f"commit {commit} is not in this repository; fetch it first ({err})") from err
    params, record = checkout / "params.yaml", checkout / versioning.DATA_RECORD
    if not params.is_file() or digest_of(params) != lineage.get("params_sha256"):
        YAML(typ="safe").dump(_required(lineage, "params"), params)
    content = YAML().load(record.read_text(encoding="utf-8"))
    if content["outs"][0]["md5"] != lineage["data_md5"]:
        content["outs"][0] = {"md5": lineage["data_md5"], "hash": "md5", "path": content["outs"][0]["path"]}
        YAML().dump(content, record)


def _bring_data(settings: Settings, checkout: Path, cache: Path, lineage: Mapping[str, Any]) -> None:
    """The raw data out of the project's DVC cache, into a cache apart, so that no stage finds its outputs ready."""
    with versioning.open_repo(settings) as repo:
        source = Path(repo.cache.local_cache_dir)
    local = f"[core]\n    remote = project\n[cache]\n    dir = {cache}\n['remote \"project\"']\n    url = {source}\n"
    (checkout / ".dvc" / "config.local").write_text(local, encoding="utf-8")
    problem = versioning.pull_data(settings.model_copy(update={"project": checkout}), settings.stage_timeout_s)
    if problem:
        raise CannotReproduce(
            f"the data of that version ({lineage['data_md5']}) is not in the DVC cache ({problem}). Fetch it first: "
            f"git checkout {lineage['git']['commit']} -- data.dvc, then dvc fetch data.dvc"
        )


def _compare(
    checkout: Settings, number: int, lineage: Mapping[str, Any], order: list[str], sources: list[str], started: float
) -> Reproduction:
    metrics = json.loads((checkout.artifacts_dir / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    then, now = lineage.get("stages") or {}, stage_hashes(checkout.project / "dvc.lock")
    outputs = [
        f"{stage}: {path}"
        for stage in order
        for path, md5 in (now.get(stage) or {}).get("outs", {}).items()
        if ((then.get(stage) or {}).get("outs") or {}).get(path) != md5
    ]
    exported = checkout.artifacts_dir / "export" / "saved_model"
    variables = {name: sha for name, sha in lineage.get("files_sha256", {}).items() if name.startswith("variables/")}
    packages, installed = lineage.get("packages") or {}, package_versions()
    rebuilt, published = str(metrics.get("model_sha256")), _required(lineage, "model_sha256")
    return Reproduction(
        version=number,
        identical=rebuilt == published,
        published_sha256=published,
        rebuilt_sha256=rebuilt,
        variables_identical=all(
            (exported / name).is_file() and digest_of(exported / name) == sha for name, sha in variables.items()
        ),
        differing_outputs=outputs,
        differing_sources=sources,
        differing_packages={
            name: [version, installed.get(name)] for name, version in packages.items() if installed.get(name) != version
        },
        duration_s=round(time.monotonic() - started, 1),
    )


def _differing_sources(checkout: Path, lineage: Mapping[str, Any]) -> list[str]:
    """The files from git that the stages depend on and that are not, in the checkout, what they were."""
    tracked = set(_git(checkout, "ls-files").splitlines())
    wanted = {
        path: md5
        for stage in (lineage.get("stages") or {}).values()
        for path, md5 in (stage.get("deps") or {}).items()
        if path in tracked or path.endswith(".py")
    }
    return sorted(
        path
        for path, md5 in wanted.items()
        if not (checkout / path).is_file() or digest_of(checkout / path, "md5") != md5
    )


def _required(lineage: Mapping[str, Any], *names: str) -> Any:
    value: Any = lineage
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    if not value:
        raise CannotReproduce(f"the version's lineage does not say its {' '.join(names)}: it cannot be built again")
    return value


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotReproduce(f"git {words[0]}: {' '.join(done.stderr.split())}")
    return done.stdout
