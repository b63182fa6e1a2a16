"""Facts of the wire between the exported model and everything that calls it.

They are not tunables: a change here is a new contract for every client.
"""

from typing import Final

MODEL_NAME: Final = "digits"
"""The model's name at TensorFlow Serving, and the folder of its versions: ``models/digits/<version>/``."""

CLASS_COUNT: Final = 10
"""Digits 0 to 9; class ``k`` is the digit ``k``."""

IMAGE_HEIGHT: Final = 28
IMAGE_WIDTH: Final = 28
IMAGE_BYTES: Final = IMAGE_HEIGHT * IMAGE_WIDTH
"""A canonical image: uint8 (28, 28), row by row, ink 255 on paper 0."""

SIGNATURE: Final = "serving_default"
"""Input ``images`` uint8 [N, 28, 28] -> outputs ``probabilities`` float32 [N, 10] and ``digit`` int64 [N]."""

INPUT_IMAGES: Final = "images"
OUTPUT_PROBABILITIES: Final = "probabilities"
OUTPUT_DIGIT: Final = "digit"

ENCODED_SIGNATURE: Final = "encoded"
"""Input ``image_bytes`` string [N], each a PNG or JPEG of a canonical image -> the same outputs. For trusted callers:
TensorFlow decodes whatever size a picture declares."""

INPUT_IMAGE_BYTES: Final = "image_bytes"

LINEAGE_FILE: Final = "assets.extra/lineage.json"
"""Inside a published version: where it came from (commit, data, parameters, metrics, decision)."""

WARMUP_FILE: Final = "assets.extra/tf_serving_warmup_requests"
"""Inside a published version: PredictionLog records that a server replays before it serves the version."""
