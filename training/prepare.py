"""Split the raw data once and for all: train, validation, and a sealed test split.

The seal is the test split's hash in summary.json. Only `evaluate` reads the test split, and `gate`, which has the
published version read it beside the candidate; nothing is fitted, chosen or calibrated on it.
"""

import numpy as np
from rich.console import Console

from training.data import read_splits, split_stratified
from training.params import Params
from training.plots import draw_samples
from training.workspace import BadArtifact, Split, Workspace, read_json, save_split, write_json


def prepare(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: write train.npz, validation.npz, test.npz, samples.png and summary.json.

    Images stay uint8 (ink 255 on paper 0): scaling is part of the model, so that no caller can forget it.
    """
    _check_validated(workspace)
    classes = params.data.classes
    raw, test = read_splits(workspace.raw_dir, params.data, console).values()
    kept, held_out = split_stratified(raw.labels, params.prepare.validation_images, classes, params.seed)
    splits = {
        "train": Split(raw.images[kept], raw.labels[kept]),
        "validation": Split(raw.images[held_out], raw.labels[held_out]),
        "test": test,
    }
    out = workspace.stage_dir("prepare")
    for name, split in splits.items():
        save_split(out / f"{name}.npz", split)
    draw_samples(
        out / "samples.png",
        splits["train"].images,
        splits["train"].labels,
        classes,
        params.prepare.samples_per_class,
        f"The first training images of each class (n = {len(kept):,})",
    )
    write_json(
        out / "summary.json",
        {
            "schema": 1,
            "splits": {name: _describe(split, len(classes)) for name, split in splits.items()},
            "test_sha256": test.sha256(),
            "rules": "uint8 pixels, ink 255 on paper 0; the model scales by 1/255",
        },
    )
    console.print(", ".join(f"{name} {len(split.labels):,}" for name, split in splits.items()))


def _check_validated(workspace: Workspace) -> None:
    """Refuse data that validation stopped at, also when this stage is run on its own.

    Raises:
        BadArtifact: there is no report, or it says so.
    """
    report = workspace.artifact("validate", "report.json")
    if read_json(report).get("valid") is not True:
        raise BadArtifact(f"{report} says that the raw data are not valid: mend them, then `dvc repro validate`")


def _describe(split: Split, class_count: int) -> dict[str, object]:
    return {
        "images": len(split.labels),
        "by_digit": np.bincount(split.labels, minlength=class_count).tolist(),
        "mean_ink_share": round(float(split.images.mean()) / 255, 6),
    }
