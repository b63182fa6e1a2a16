"""What training costs: seconds to 97.55 %, beside Keras's own `model.fit`, and how an epoch grows with the data.

Both sides fit the same network, params.yaml's or a plain perceptron, to the same 55,000 images in float, without
augmentation, and are asked for their accuracy on the 5,000 validation images after every epoch; start-up (building and
tracing the graph) is not counted on either side. `model.fit` is used as its documentation shows it: Adam at its
defaults, batches of 32. Our side has the setting of params.yaml but for batch, learning rate and the length of the
schedule.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from training.data import read_raw_split, split_stratified
from training.params import ModelParams, Params, load_params
from training.workspace import Split, import_tensorflow_quietly

ROOT = Path(__file__).resolve().parent.parent
WANTED_ACCURACY = 0.9755
MOST_EPOCHS = 6
COPIES = (1, 10)


@dataclass(frozen=True)
class Course:
    """A network, and our schedule for it: its length must be known beforehand."""

    name: str
    model: ModelParams
    epochs: int
    batch_size: int
    learning_rate: float

    def applied_to(self, params: Params) -> Params:
        """The parameters without augmentation and outliers, with this network and schedule."""
        train = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "outlier_share": 0.0,
        }
        return params.model_copy(
            update={
                "model": self.model,
                "train": params.train.model_copy(update=train),
                "augment": params.augment.turned_off(),
            }
        )


@dataclass(frozen=True)
class Climb:
    """One fit up to the wanted accuracy."""

    seconds: float
    epochs: int
    accuracy: float


def run(seconds: float, repeats: int) -> None:
    """Prints the tables; ``seconds`` means nothing here. Needs the data (`python -m pipelines ingest`)."""
    del seconds
    import_tensorflow_quietly()
    console, quiet = Console(), Console(quiet=True)
    params = load_params(ROOT / "params.yaml")
    learn, held_out = read_splits(params)
    # For each the quickest of what was tried, 1 or 2 epochs of batches of 64 to 256, that got there with two seeds.
    plain = params.model.model_copy(update={"receptive_fields": (), "hidden_widths": (512, 256), "paper_share": 0.0})
    courses = (
        Course("a perceptron of 512 and 256 units", plain, 2, 256, 0.003),
        Course(f"the {params.profile} profile's network", params.model, 1, 256, params.train.learning_rate),
    )
    for course in courses:
        setting = course.applied_to(params)
        climbs: dict[str, list[Climb]] = {"model.fit, batch 32": [], "this project": []}
        for repeat in track(range(repeats), description=f"climbing: {course.name}", console=Console(stderr=True)):
            climbs["model.fit, batch 32"].append(climb_with_keras(setting, learn, held_out, seed=repeat))
            climbs["this project"].append(climb(setting, learn, held_out, quiet, seed=repeat))
        console.print(climbs_table(course.name, climbs))
    console.print(epochs_table(params, learn, held_out, quiet, repeats))


def read_splits(params: Params) -> tuple[Split, Split]:
    """Training and validation images, split as the stage `prepare` does."""
    raw = read_raw_split(ROOT / "data", "train")
    kept, out = split_stratified(raw.labels, params.prepare.validation_images, params.data.classes, params.seed)
    return Split(raw.images[kept], raw.labels[kept]), Split(raw.images[out], raw.labels[out])


def climb(params: Params, learn: Split, held_out: Split, quiet: Console, seed: int) -> Climb:
    """Our loop."""
    from training.train import fit

    _, history = fit(learn, held_out, params.model_copy(update={"seed": seed}), quiet)
    return climb_of([(epoch.seconds, epoch.validation_accuracy) for epoch in history])


def climb_with_keras(params: Params, learn: Split, held_out: Split, seed: int) -> Climb:
    """Keras's own loop, stopped after the first epoch that reaches the accuracy."""
    import keras

    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((*learn.images.shape[1:], 1)), keras.layers.Rescaling(1 / 255)])
    for field in params.model.receptive_fields:
        shape = field.features, field.size, field.stride, field.padding
        model.add(keras.layers.Conv2D(*shape, activation="relu"))
    model.add(keras.layers.Flatten())
    for width in params.model.hidden_widths:
        model.add(keras.layers.Dense(width, activation="relu"))
    model.add(keras.layers.Dense(int(learn.labels.max()) + 1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    before = model.get_weights()
    model.fit(learn.images[:64], learn.labels[:64], batch_size=32, verbose=0)  # start-up: traces the graph
    model.evaluate(held_out.images, held_out.labels, batch_size=1000, verbose=0)
    model.set_weights(before)
    for variable in model.optimizer.variables:
        if variable is not model.optimizer.learning_rate:
            variable.assign(np.zeros(variable.shape))
    epochs: list[tuple[float, float]] = []
    while len(epochs) < MOST_EPOCHS and (not epochs or epochs[-1][1] < WANTED_ACCURACY):
        started = time.perf_counter()
        model.fit(learn.images, learn.labels, batch_size=32, verbose=0)
        _, accuracy = model.evaluate(held_out.images, held_out.labels, batch_size=1000, verbose=0)
        epochs.append((time.perf_counter() - started, accuracy))
    return climb_of(epochs)


def climb_of(epochs: Sequence[tuple[float, float]]) -> Climb:
    """Up to the first epoch of (seconds, accuracy) that reaches the accuracy; to the last if none does."""
    reached = next((i for i, (_, accuracy) in enumerate(epochs, start=1) if accuracy >= WANTED_ACCURACY), len(epochs))
    return Climb(sum(took for took, _ in epochs[:reached]), reached, epochs[reached - 1][1])


def climbs_table(network: str, climbs: dict[str, list[Climb]]) -> Table:
    """Medians with ranges, and how many times faster the last row is than the first."""
    count = len(next(iter(climbs.values())))
    title = f"{network} to {WANTED_ACCURACY:.2%} of the validation images"
    table = Table(title=f"{title}: median of {count} (range)")
    for column in ("loop", "seconds of fitting", "epochs", "accuracy there", "times as fast"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    first: float | None = None
    for name, runs in climbs.items():
        took = [run.seconds for run in runs]
        reached = [run.accuracy for run in runs]
        first = first or statistics.median(took)
        missed = sum(accuracy < WANTED_ACCURACY for accuracy in reached)
        table.add_row(
            name,
            f"{statistics.median(took):.1f} ({min(took):.1f}-{max(took):.1f})",
            f"{statistics.median(run.epochs for run in runs):.0f}",
            f"{statistics.median(reached):.2%}" + (f", {missed} of {count} not reached" if missed else ""),
            f"{first / statistics.median(took):.1f}",
        )
    return table


def epochs_table(params: Params, learn: Split, held_out: Split, quiet: Console, repeats: int) -> Table:
    """Seconds of an epoch as params.yaml has it: plain, augmented, and augmented with ten times the images."""
    plain = params.model_copy(update={"augment": params.augment.turned_off()})
    cases: list[tuple[str, Params, int]] = [
        ("not augmented", plain, 1),
        *(("augmented", params, copies) for copies in COPIES),
    ]
    took: list[list[float]] = [[] for _ in cases]
    for _ in track(range(repeats), description="epochs", console=Console(stderr=True)):
        for (_, setting, copies), seconds in zip(cases, took, strict=True):
            seconds.append(epoch_seconds(setting, learn, copies, held_out, quiet))
    table = Table(title=f"an epoch: median of {repeats} (range)")
    for column in ("images", "augmentation", "seconds", "microseconds an image"):
        table.add_column(column, justify="left" if column == "augmentation" else "right")
    for (name, _, copies), seconds in zip(cases, took, strict=True):
        images = len(learn.labels) * copies
        middle = statistics.median(seconds)
        table.add_row(
            f"{images:,}",
            name,
            f"{middle:.1f} ({min(seconds):.1f}-{max(seconds):.1f})",
            f"{middle / images * 1e6:.0f}",
        )
    return table


def epoch_seconds(params: Params, learn: Split, copies: int, held_out: Split, quiet: Console) -> float:
    """One epoch on that many copies of the images."""
    from training.train import fit

    many = Split(np.tile(learn.images, (copies, 1, 1)), np.tile(learn.labels, copies))
    once = params.model_copy(update={"train": params.train.model_copy(update={"epochs": 1})})
    _, history = fit(many, held_out, once, quiet)
    return history[0].seconds
