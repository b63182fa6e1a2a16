"""The quick profile as it comes: what `dvc repro` makes of params.yaml in a fresh checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import copy_checkout
from tests.ports import free_ports
from tests.stack.conftest import run_environment

FLOOR = 0.992  # three seeds: 99.46 to 99.47 %


@pytest.mark.slow
def test_the_quick_profile_reaches_its_accuracy_and_passes_the_gate(raw_data: Path, tmp_path: Path) -> None:
    """On the real 70,000 images, with every limit as it is."""
    root = copy_checkout(tmp_path / "checkout")
    for words in (("pipelines", "ingest"), ("dvc", "repro")):
        subprocess.run([sys.executable, "-m", *words], cwd=root, env=run_environment(free_ports(4)), check=True)
    metrics = json.loads((root / "artifacts" / "evaluate" / "metrics.json").read_text())
    assert metrics["test_images"] == 10_000
    assert metrics["accuracy"] >= FLOOR
    decision = json.loads((root / "artifacts" / "gate" / "decision.json").read_text())
    assert decision["accepted"] is True, decision["reason"]
