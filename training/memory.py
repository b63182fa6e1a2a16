"""Is there memory for a batch? Asked before the first step: a system short of memory ends processes without a word."""

import contextlib
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import psutil
import tensorflow as tf

from digits.contract import IMAGE_BYTES
from digits.errors import DigitsError

_BYTES_OF_WEIGHT = 7 * 4
"""The weight, its average, its gradient, two moments of the optimiser, a cast and a temporary; float32."""
_BYTES_OF_ACTIVATION = 2 * 4
"""What a layer answers is kept for its gradient, which takes as much."""
_BYTES_OF_PIXEL = 20 * 4
"""An image is drawn twice at a time, with its places in the original and the fields that deform it."""
_CGROUP = Path("/sys/fs/cgroup")


class OutOfMemory(DigitsError):
    """Training does not fit into memory."""

    code = "out_of_memory"


@contextmanager
def memory_for(model: keras.Model, batch_size: int, image_count: int, worker_count: int = 1) -> Iterator[None]:
    """Run what trains ``model``, if there is room for it. Each of several workers holds its share of a batch.

    Raises:
        OutOfMemory: there is too little at the beginning, or it ran out within; names a batch size that would fit.
    """
    room = available_bytes()
    need = bytes_needed(model, batch_size // worker_count, image_count)
    fitting = worker_count * largest_batch(model, image_count, room)
    if need > room:
        raise OutOfMemory(
            f"train.batch_size is {batch_size}: about {need / 1e6:,.0f} MB of memory are needed, "
            f"{room / 1e6:,.0f} MB are to be had; {_advice(fitting)}"
        )
    try:
        yield
    except (MemoryError, tf.errors.ResourceExhaustedError) as err:
        fitting = min(fitting, batch_size // (2 * worker_count) * worker_count)
        raise OutOfMemory(
            f"train.batch_size is {batch_size}: memory ran out, of {room / 1e6:,.0f} MB; {_advice(fitting)}"
        ) from err


def bytes_needed(model: keras.Model, batch_size: int, image_count: int) -> int:
    """About what training takes at its height, TensorFlow itself aside."""
    activations = sum(math.prod(layer.output.shape[1:]) for layer in model.layers)
    of_image = _BYTES_OF_ACTIVATION * activations + _BYTES_OF_PIXEL * IMAGE_BYTES
    return _BYTES_OF_WEIGHT * model.count_params() + IMAGE_BYTES * image_count + of_image * batch_size


def largest_batch(model: keras.Model, image_count: int, room: int) -> int:
    """The largest power of two of images that ``room`` bytes suffice for, 0 if not even one."""
    fixed = bytes_needed(model, 0, image_count)
    images = (room - fixed) // (bytes_needed(model, 1, image_count) - fixed)
    return 1 << (images.bit_length() - 1) if images > 0 else 0


def available_bytes() -> int:
    """What this process may still take: of the machine's memory, of its container's, of its own limits."""
    process = psutil.Process()
    used = process.memory_info()
    rooms = [psutil.virtual_memory().available]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups of version 2, and 1
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            rooms.append(int((_CGROUP / name).read_text()) - used.rss)
    for limit, taken in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", 0))):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY:
            rooms.append(allowed - taken)
    return max(0, min(rooms))


def _advice(fitting: int) -> str:
    if fitting:
        return f"{fitting} would fit"
    return "no batch size would fit: make model.hidden_widths smaller"
