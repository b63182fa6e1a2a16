"""Too little memory is said in one line, with a batch size that fits; the limits here are real ones."""

import re
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import ROOT

COMMON = """
    import io, os, resource, sys
    import numpy as np
    import psutil
    from pathlib import Path
    from rich.console import Console
    from training.workspace import Split, import_tensorflow_quietly
    import_tensorflow_quietly()
    import tensorflow as tf
    from tests.training.conftest import small_params
    from training.memory import OutOfMemory, available_bytes, memory_for
    from training.model import build_model
    from training.params import Params
    from training.train import fit

    def leave_room(room):
        taken = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (taken + room, resource.RLIM_INFINITY))
"""


def in_a_process(code: str) -> list[str]:
    """The lines that it prints. Few memory arenas, so that what it has taken is what it uses."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMON) + textwrap.dedent(code)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


FIT = """
    params = Params.model_validate(small_params(**{"model.hidden_widths": [16384], "train.epochs": 1}))
    setting = params.train.model_copy(update={"batch_size": BATCH, "precision": "float32"})
    rng = np.random.default_rng(0)
    learn = Split(rng.integers(0, 256, (1200, 28, 28), np.uint8), rng.integers(0, 10, 1200))
    few = Split(learn.images[:50], learn.labels[:50])
    leave_room(900_000_000)
    try:
        fit(learn, few, params.model_copy(update={"train": setting}), Console(file=io.StringIO()))
        print("fitted")
    except OutOfMemory as err:
        print(err)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's limits")
def test_a_batch_that_does_not_fit_is_refused_and_the_one_that_is_named_fits() -> None:
    """One hidden layer of 16,384, which with 1,200 images a batch takes more than the 900 MB that are left."""
    refused = in_a_process(FIT.replace("BATCH", "1200"))[0]
    said = re.fullmatch(
        r"train\.batch_size is 1200: about [\d,]+ MB of memory are needed, [\d,]+ MB are to be had; (\d+) would fit",
        refused,
    )
    assert said, refused
    assert 1 <= int(said[1]) < 1200
    assert in_a_process(FIT.replace("BATCH", said[1])) == ["fitted"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's limits")
def test_memory_that_runs_out_within_names_half_the_batch_or_less() -> None:
    """TensorFlow's own refusal of a tensor of 4 GB, and Python's of as many bytes."""
    lines = in_a_process(
        """
        model = build_model(Params.model_validate(small_params()).model, 10, "float32")
        leave_room(600_000_000)
        for take in (lambda: tf.random.uniform([1_000_000_000]), lambda: bytearray(4_000_000_000)):
            try:
                with memory_for(model, 64, 1200):
                    take()
            except OutOfMemory as err:
                print(err)
        """
    )
    assert len(lines) == 2
    assert all(
        re.fullmatch(r"train\.batch_size is 64: memory ran out, of [\d,]+ MB; 32 would fit", line) for line in lines
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's limits")
def test_each_of_several_workers_holds_its_share_of_a_batch() -> None:
    """Twice what would fit one is too much for one, and let in for three, who are told of three times as many."""
    lines = in_a_process(
        """
        model = build_model(Params.model_validate(small_params()).model, 10, "float32")
        leave_room(600_000_000)

        def room_for(workers, batch_size):
            try:
                with memory_for(model, batch_size, 1200, workers):
                    return 0
            except OutOfMemory as err:
                return int(str(err).removesuffix(" would fit").split()[-1])

        fitting = room_for(1, 3 << 20)
        print(fitting, room_for(3, 3 << 20), room_for(1, 2 * fitting), room_for(3, 2 * fitting))
        """
    )
    fitting, three, again, let_in = map(int, lines[0].split())
    assert 1 <= fitting < 3 << 20
    assert three == 3 * fitting
    assert (again, let_in) == (fitting, 0)
