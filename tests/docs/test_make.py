"""The make targets that write files: what is in the repository is what they would write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HANG_S, ROOT

PROTOS = ROOT / "serving" / "protos"


def test_make_protos_changes_nothing(tmp_path: Path) -> None:
    """It was run after the last change of a .proto file; all that it writes is in the repository."""
    recipe = [line for line in make("-n", "-B", "protos").splitlines() if "grpc_tools.protoc" in line]
    assert recipe
    for line in recipe:
        written = line.replace("python", sys.executable, 1).replace("_out=.", f"_out={tmp_path}")
        subprocess.run(["bash", "-c", written], cwd=ROOT, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "serving" / "protos").iterdir()}
    assert made == {path.name: path.read_text() for path in PROTOS.iterdir() if "_pb2" in path.name}


def test_make_sbom_names_what_each_image_installs(tmp_path: Path) -> None:
    """A CycloneDX document for each image, with every package of its lock at the locked version."""
    if not (ROOT / ".tools" / "bin" / "cyclonedx-py").exists():
        pytest.skip("needs the tools' own environment: `make tools` (make test builds it)")
    make("sbom")
    for image in ("gateway", "model-server", "pipeline"):
        document = json.loads((ROOT / "test-output" / f"{image}.cdx.json").read_text())
        named = {(part["name"], part["version"]) for part in document["components"]}
        lock = (ROOT / "requirements" / f"{image}.txt").read_text()
        locked = [line.split(" ")[0].split("==") for line in lock.splitlines() if "==" in line]
        assert {(name.partition("[")[0], version) for name, version in locked} <= named, image


def make(*words: str) -> str:
    done = subprocess.run(["make", *words], cwd=ROOT, text=True, capture_output=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    return done.stdout
