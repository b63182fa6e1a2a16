"""Images/s of the SavedModel called directly, one thread: `python -m benchmarks.in_process FOLDER BATCH SECONDS`."""

import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main(folder: str, batch: str, seconds: str) -> None:
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    loaded = tf.saved_model.load(folder)
    call = loaded.signatures["serving_default"]
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (int(batch), 28, 28), np.uint8))
    for _ in range(5):
        call(images=images)["probabilities"].numpy()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < float(seconds):
        call(images=images)["probabilities"].numpy()
        count += int(batch)
    print(count / (time.perf_counter() - start))


if __name__ == "__main__":
    main(*sys.argv[1:])
