"""The candidate's twin: the same network from the same seed, fitted to the images as they are.

Beside it one sees what the deformed copies of training do for the candidate on images unlike the training images.
"""

import time

from rich.console import Console

from training.model import model_sha256
from training.params import Params
from training.train import fit
from training.workspace import Workspace, load_split, whole_file, write_json


def twin(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: write artifacts/twin/{model.keras, twin.json}.

    Without new copies to learn from a few epochs are enough: after them the twin errs on none of its training images.
    """
    learn = load_split(workspace.artifact("prepare", "train.npz"))
    held_out = load_split(workspace.artifact("prepare", "validation.npz"))
    out = workspace.stage_dir("twin")

    started = time.perf_counter()
    model, history = fit(learn, held_out, plain(params), console)
    fit_seconds = time.perf_counter() - started

    with whole_file(out / "model.keras") as part:
        model.save(part)
    write_json(
        out / "twin.json",
        {
            "schema": 1,
            "model_sha256": model_sha256(model),
            "epochs": len(history),
            "training_accuracy": history[-1].accuracy,
            "validation_accuracy": history[-1].validation_accuracy,
            "fit_seconds": round(fit_seconds, 1),
        },
    )
    console.print(
        f"trained the twin without augmentation in {fit_seconds:.0f} s ({len(history)} epochs): "
        f"validation accuracy {history[-1].validation_accuracy:.2%} (n = {len(held_out.labels):,})"
    )


def plain(params: Params) -> Params:
    """The parameters without augmentation, and as many epochs as ``twin.epochs`` says."""
    return params.model_copy(
        update={
            "train": params.train.model_copy(update={"epochs": params.twin.epochs, "free_epochs": 0}),
            "augment": params.augment.turned_off(),
        }
    )
