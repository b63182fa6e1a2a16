"""The SavedModel as every peer calls it: uint8 (N, 28, 28) in, float32 (N, 10) out."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf


class Model:
    """Loads the version folder that ``PEER_MODEL`` names."""

    def __init__(self) -> None:
        threads = int(os.environ.get("PEER_THREADS", "1"))
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        self._loaded = tf.saved_model.load(os.environ["PEER_MODEL"])
        self._call = self._loaded.signatures["serving_default"]
        for count in (1, 2, 8, 32, 64):
            self.probabilities(np.zeros((count, 28, 28), np.uint8))

    def probabilities(self, images_u8: np.ndarray) -> np.ndarray:
        """uint8 (N, 28, 28) → float32 (N, 10)."""
        return self._call(images=tf.constant(images_u8))["probabilities"].numpy()


def image_of(body: bytes) -> np.ndarray:
    """784 bytes → uint8 (28, 28)."""
    return np.frombuffer(body, np.uint8).reshape(28, 28)


def answer_of(row: np.ndarray) -> dict:
    """float32 (10,) → what the gateway's /classify answers, but for its ids."""
    digit = int(row.argmax())
    return {"digit": digit, "confidence": float(row[digit]), "probabilities": row.tolist()}
