"""Facts of the wire between the exported model and everything that calls it.

They are not tunables: a change here is a new contract for every client.
"""

from typing import Final

MODEL_NAME: Final = "digits"
"""The model's name at TensorFlow Serving, and the folder of its versions: ``models/digits/<version>/``."""

DIGITS: Final = tuple("0123456789")
"""The names of the classes of MNIST. A model of other data has others, and as many as there are: ``CLASSES_SIGNATURE``
says which."""

IMAGE_HEIGHT: Final = 28
IMAGE_WIDTH: Final = 28
IMAGE_BYTES: Final = IMAGE_HEIGHT * IMAGE_WIDTH
"""A canonical image: uint8 (28, 28), row by row, ink 255 on paper 0."""

SIGNATURE: Final = "serving_default"
"""Input ``images`` uint8 [N, 28, 28] -> outputs ``probabilities`` float32 [N, C] and ``digit`` int64 [N], the most
probable of the C classes: for MNIST the ten digits, class ``k`` being the digit ``k``."""

INPUT_IMAGES: Final = "images"
OUTPUT_PROBABILITIES: Final = "probabilities"
OUTPUT_DIGIT: Final = "digit"

ENCODED_SIGNATURE: Final = "encoded"
"""Input ``image_bytes`` string [N], each a PNG or JPEG of a canonical image -> the same outputs. For trusted callers:
TensorFlow decodes whatever size a picture declares."""

INPUT_IMAGE_BYTES: Final = "image_bytes"

CLASSES_SIGNATURE: Final = "classes"
"""Input ``digit`` int64 [N], each 0 to C - 1 -> outputs ``name`` string [N]: what these classes are called, and
``abstain_below`` float32 [N]: the certainty below which such an answer is better not used. Certainty is
``p1 / (p1 + p2 + 0.2 (1 - p1 - p2))`` of the answer's probability and the next class's, and never below ``p1``."""

OUTPUT_NAME: Final = "name"
OUTPUT_ABSTAIN_BELOW: Final = "abstain_below"

LITE_FILE: Final = "model.tflite"
"""Inside a published version: ``SIGNATURE`` alone as a TF Lite model, for servers that prefer it. TensorFlow Serving's
name for it."""

CLASSES_FILE: Final = "assets.extra/classes.json"
"""Inside a published version: the same names, a JSON list in the order of the labels."""

LINEAGE_FILE: Final = "assets.extra/lineage.json"
"""Inside a published version: where it came from (commit, data, parameters, metrics, decision)."""

WARMUP_FILE: Final = "assets.extra/tf_serving_warmup_requests"
"""Inside a published version: PredictionLog records that a server replays before it serves the version."""
