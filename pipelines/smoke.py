"""Ask a published version for the answers it was exported with, before it is served by default."""

from collections.abc import Callable
from typing import Final

import numpy as np

from digits.errors import DigitsError
from pipelines import model_server
from pipelines.publish import why_not_verified
from pipelines.settings import Settings
from pipelines.versions import Version

_GOLDEN_FILE: Final = "assets.extra/golden.npz"
"""In a version folder: ``images`` uint8 (N, 28, 28) and ``probabilities`` float32 (N, C), from the trained network."""

_TOLERANCE: Final = 1e-3
"""Greatest difference of a probability: the server may run on another kind of processor than the training did."""


class SmokeFailed(DigitsError):
    """The version does not answer, or answers otherwise than it was trained to. What was served stays served."""

    code = "smoke"


def ask_model_server(settings: Settings, version: Version) -> int:
    """Send the golden images to the model server, for this very version. Returns how many it answered rightly: all.

    Raises:
        SmokeFailed: it does not answer, or not as the trained network did.
    """
    try:
        with np.load(version.folder / _GOLDEN_FILE, allow_pickle=False) as golden:
            images, expected = golden["images"], golden["probabilities"]
    except Exception as err:  # zipfile, zlib and numpy raise their own kinds
        raise SmokeFailed(f"version {version.number} has no readable {_GOLDEN_FILE}: {type(err).__name__}") from err
    probabilities, digits = model_server.predict(settings, version.number, images)
    same_shape = probabilities.shape == expected.shape
    difference = float(np.abs(probabilities - expected).max()) if same_shape else float("inf")
    # Written so that NaN fails.
    if not difference <= _TOLERANCE or not np.array_equal(digits, expected.argmax(axis=1)):
        raise SmokeFailed(
            f"the model server answers otherwise with version {version.number} than it was trained to: probabilities "
            f"differ by {difference:.2g}, at most {_TOLERANCE} is allowed, and every digit must be the same"
        )
    return len(images)


def ask_fresh_process(settings: Settings, version: Version, tell: Callable[[str], None]) -> None:
    """The same without a model server: load the version in a fresh process and ask it there.

    Raises:
        SmokeFailed: it does not load, or does not answer as the trained network did.
    """
    if problem := why_not_verified(settings, version.folder, tell):
        raise SmokeFailed(f"version {version.number} {problem}: not promoted")
