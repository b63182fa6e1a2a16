"""Where a candidate comes from: the commit, data, parameters and code that it was made of, as hashes."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from ruamel.yaml.error import YAMLError

from pipelines import versioning
from pipelines.dataset import digest_of
from pipelines.disk import read_yaml
from pipelines.settings import Settings

_PACKAGES: Final = ("tensorflow", "keras", "numpy", "dvc", "prefect", "great-expectations")


def provenance(settings: Settings) -> dict[str, Any]:
    """Enough to find the commit, data and parameters of what the stages have made, and to make it again."""
    params = settings.project / "params.yaml"
    stages = stage_hashes(settings.project / "dvc.lock")
    return {
        "git": git_state(settings),
        "data_md5": versioning.data_hash(settings),
        "params_sha256": digest_of(params),
        "params": read_yaml(params),
        "code_sha256": code_digest(stages),
        "stages": stages,
        "packages": package_versions(),
        "python": sys.version.split()[0],
    }


def code_digest(stages: Mapping[str, Any]) -> str:
    """One SHA-256 over the modules that the stages depend on: of the sorted lines ``<MD5>  <path>``."""
    modules = {
        f"{md5}  {path}\n"
        for stage in stages.values()
        for path, md5 in (stage.get("deps") or {}).items()
        if path.endswith(".py")
    }
    return hashlib.sha256("".join(sorted(modules)).encode()).hexdigest()


def files_digest(files_sha256: Mapping[str, str]) -> str:
    """One SHA-256 over a SavedModel's files: of the sorted lines ``<SHA-256>  <path>``."""
    lines = sorted(f"{digest}  {path}\n" for path, digest in files_sha256.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def git_state(settings: Settings) -> dict[str, Any]:
    """The commit, and which files differ from it. ``dvc.lock`` is left out: every training changes it."""

    def git(*words: str) -> str | None:
        if shutil.which("git") is None:
            return None
        done = subprocess.run(["git", *words], cwd=settings.project, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    changed = [line[3:] for line in (status or "").splitlines() if line[3:] != "dvc.lock"]
    return {
        "commit": commit.strip() if commit else settings.revision,
        "dirty": bool(changed),
        "changed_files": changed[:50],
    }


def package_versions() -> dict[str, str]:
    """The versions of the packages that a trained model depends on, as installed here."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def stage_hashes(lock_file: Path) -> dict[str, Any]:
    """For each stage, what DVC recorded of its dependencies and outputs: path -> MD5."""
    try:
        stages = read_yaml(lock_file)["stages"]
    except (OSError, YAMLError, KeyError, TypeError):
        return {}
    return {
        name: {part: {item["path"]: item.get("md5") for item in stage.get(part, [])} for part in ("deps", "outs")}
        for name, stage in stages.items()
    }
