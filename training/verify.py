"""Load an exported version and ask it: does it still answer as the trained network did? Needs TensorFlow, not Keras."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from digits import contract
from digits.errors import DigitsError
from training.workspace import BadArtifact, chatter_held_back

GOLDEN_FILE = "assets.extra/golden.npz"
GOLDEN_TOLERANCE = 1e-4
"""Greatest difference of a probability between Keras and what is served; rounding alone comes to about 1e-6."""


class NotTheSame(DigitsError):
    """The exported model does not answer as the trained one."""

    code = "not_the_same"


def predict_saved_model(folder: Path, images_u8: np.ndarray, batch: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Ask a SavedModel's serving signature: probabilities float32 (N, C) and digits int64 (N,) for uint8 (N, 28, 28).

    Raises:
        BadArtifact: the folder cannot be loaded, or has not the contract's signature.
    """
    import tensorflow as tf  # slow to load, and what is above is wanted without it

    try:
        signature = tf.saved_model.load(str(folder)).signatures[contract.SIGNATURE]
        answers = [
            signature(**{contract.INPUT_IMAGES: tf.constant(images_u8[i : i + batch])})
            for i in range(0, len(images_u8), batch)
        ]
        probabilities = np.concatenate([a[contract.OUTPUT_PROBABILITIES].numpy() for a in answers])
        digits = np.concatenate([a[contract.OUTPUT_DIGIT].numpy() for a in answers])
    except Exception as err:  # each damaged part raises its own kind
        raise BadArtifact(f"{folder} is no complete version of the model: {_one_line(err)}") from err
    return probabilities, digits


def predict_lite_model(folder: Path, images_u8: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of the TF Lite model beside it.

    Raises:
        BadArtifact: it cannot be loaded, or has not the contract's signature.
    """
    import tensorflow as tf

    try:
        content = (folder / contract.LITE_FILE).read_bytes()
        with (
            warnings.catch_warnings(),
            chatter_held_back(),
        ):  # a greeting, and a word on its successor
            warnings.simplefilter("ignore")
            signature = tf.lite.Interpreter(model_content=content).get_signature_runner(contract.SIGNATURE)
        answer = signature(**{contract.INPUT_IMAGES: images_u8})
        return answer[contract.OUTPUT_PROBABILITIES], answer[contract.OUTPUT_DIGIT]
    except Exception as err:  # each damaged part raises its own kind
        raise BadArtifact(f"{folder / contract.LITE_FILE} is no complete TF Lite model: {_one_line(err)}") from err


@dataclass(frozen=True)
class Golden:
    """Images, and what Keras answered when the version was written."""

    images: np.ndarray
    """uint8 (N, 28, 28)."""
    probabilities: np.ndarray
    """float32 (N, classes)."""


def read_golden(folder: Path) -> Golden:
    """The golden answers of a version folder.

    Raises:
        BadArtifact: there are none that can be read.
    """
    try:
        with np.load(folder / GOLDEN_FILE, allow_pickle=False) as golden:
            return Golden(golden["images"], golden["probabilities"])
    except Exception as err:  # zipfile, zlib and numpy raise their own kinds
        raise BadArtifact(f"{folder} has no readable {GOLDEN_FILE}: {_one_line(err)}") from err


def compare_answers(golden: Golden, probabilities: np.ndarray, digits: np.ndarray) -> tuple[float, int]:
    """The greatest difference of a probability from Keras (infinite for another shape), and how many digits differ."""
    if probabilities.shape != golden.probabilities.shape:
        return float("inf"), len(golden.images)
    difference = float(np.abs(probabilities - golden.probabilities).max())
    return difference, int(np.count_nonzero(digits != golden.probabilities.argmax(axis=1)))


def verify(folder: Path) -> float:
    """Compare a version folder with its golden answers; return the greatest difference of a probability.

    Versions published before there was a TF Lite model beside the SavedModel are complete without one.

    Raises:
        BadArtifact: the folder cannot be loaded, or lacks golden answers or the contract's signature.
        NotTheSame: it answers otherwise than Keras did.
    """
    golden = read_golden(folder)
    answers = {folder: predict_saved_model(folder, golden.images)}
    if (folder / contract.LITE_FILE).exists():
        answers[folder / contract.LITE_FILE] = predict_lite_model(folder, golden.images)
    greatest = 0.0
    for what, answer in answers.items():
        difference, digits_differing = compare_answers(golden, *answer)
        # Written so that NaN fails.
        if not difference <= GOLDEN_TOLERANCE or digits_differing:
            raise NotTheSame(
                f"{what} answers otherwise than Keras did: probabilities differ by {difference:.2g}, at most "
                f"{GOLDEN_TOLERANCE} is allowed, and every digit must be the same. "
                "Export again with `dvc repro -f export`."
            )
        greatest = max(greatest, difference)
    return greatest


def _one_line(err: Exception) -> str:
    text = " ".join(str(err).split())
    return f"{type(err).__name__}: {text[:200]}"
