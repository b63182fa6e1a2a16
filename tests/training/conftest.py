"""Real digits in small: the first images of the real files, in a workspace of their own."""

import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from ruamel.yaml import YAML

from tests.conftest import ANY_ROBUSTNESS
from training.data import read_raw_split
from training.params import Params, load_params
from training.workspace import Split, Workspace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def raw_dir(request: pytest.FixtureRequest) -> Path:
    """The four real files: in the folder DIGITS_TEST_DATA, or fetched by the product's own ingest."""
    folder = os.environ.get("DIGITS_TEST_DATA")
    return Path(folder) if folder else request.getfixturevalue("raw_data")


@pytest.fixture(scope="session")
def real(raw_dir: Path) -> dict[str, Split]:
    return {name: read_raw_split(raw_dir, name) for name in ("train", "test")}


@pytest.fixture
def quiet() -> Console:
    return Console(file=sys.stderr, quiet=True)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_raw(folder: Path, train: Split, test: Split) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, split in (("train", train), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", split.images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", split.labels)


def small_params(**changes: Any) -> dict[str, Any]:
    """params.yaml of the repository, made small: 1,500 + 300 images and a little network. Dotted keys change it."""
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    small = {
        "validate.sha256": {},
        "validate.train_images": 1500,
        "validate.test_images": 300,
        "validate.class_share": [0.05, 0.2],
        "prepare.validation_images": 300,
        "model.hidden_widths": [64, 32],
        "train.epochs": 3,
        "train.batch_size": 50,
        "twin.epochs": 2,
        "evaluate.robustness_images": 40,
        "evaluate.nondigit_images": 16,
        "export.golden_images": 20,
        "export.warmup_batch_sizes": [1, 4],
        "gate.min_accuracy": 0.7,
        "gate.min_macro_f1": 0.7,
        "gate.min_class_recall": 0.4,
        "gate.max_ece": 0.3,
        "gate.max_nll": 2.0,
        "gate.robustness": dict(ANY_ROBUSTNESS),
        "gate.max_accuracy_drop": 0.1,
    }
    for key, value in {**small, **changes}.items():
        *sections, leaf = key.split(".")
        section = params
        for name in sections:
            section = section[name]
        section[leaf] = value
    return params


def make_workspace(folder: Path, real: dict[str, Split], **changes: Any) -> tuple[Workspace, Params]:
    """A workspace with the first 1,500 training and 300 test images, and its params.yaml."""
    train, test = real["train"], real["test"]
    write_raw(
        folder / "data", Split(train.images[:1500], train.labels[:1500]), Split(test.images[:300], test.labels[:300])
    )
    (folder / "models" / "champion").mkdir(parents=True)
    workspace = Workspace(folder)
    YAML().dump(small_params(**changes), workspace.params_file)
    return workspace, load_params(workspace.params_file)
