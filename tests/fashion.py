"""Fashion-MNIST as Debian's package has it: MNIST's format, ten classes of garments."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ANY_ROBUSTNESS

FOLDER = Path("/usr/share/datasets/fashion-mnist")
GARMENTS = ("Top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = tuple(f"{prefix}-{kind}-ubyte" for prefix in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def require() -> None:
    """Skip the test where the package is not installed."""
    if not FOLDER.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")


def copy_idx(target: Path, train: int | None = None, test: int | None = None) -> None:
    """The first ``train`` and ``test`` images, all where None, as IDX files in ``target``."""
    require()
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        content = gzip.decompress((FOLDER / f"{name}.gz").read_bytes())
        header_bytes, size = (16, 784) if "idx3" in name else (8, 1)
        count = train if name.startswith("train") else test
        if count is not None:
            content = content[:4] + count.to_bytes(4) + content[8 : header_bytes + count * size]
        (target / name).write_bytes(content)


def describe(params: dict, train: int, test: int, validation: int) -> None:
    """What params.yaml has to say of it, as docs/data.md tells."""
    params["data"] = {"format": "idx", "classes": list(GARMENTS)}
    params["validate"] |= {
        "sha256": {}, "train_images": train, "test_images": test, "ink_share": [0.25, 0.32], "features": {},
        "doubtful_labels": {"warn": 0.05, "stop": 0.2}, "contradicted_labels": {"warn": 0.3, "stop": 0.5},
    }  # fmt: skip
    params["prepare"]["validation_images"] = validation
    deformations = ("rotation_rad", "scale", "shear", "shift_px", "elastic_px", "neighbour_share")
    params["augment"] |= dict.fromkeys(deformations, 0.0)
    params["model"]["paper_share"] = 0.0
    params["gate"] |= {"min_accuracy": 0.85, "min_macro_f1": 0.85, "min_class_recall": 0.6, "max_nll": 0.6}
    params["gate"]["robustness"] = dict(ANY_ROBUSTNESS)


def images_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The test images and labels in a folder of IDX files, read without our own reader."""
    images = np.frombuffer((folder / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer((folder / "t10k-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    return images.reshape(-1, 28, 28), labels
