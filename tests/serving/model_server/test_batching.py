"""Joining calls into batches, on real threads and a call that records what it is run on."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tensorflow.core.protobuf import meta_graph_pb2

from serving.model_server.batching import BatchedModel, Batcher
from serving.model_server.config import Batching
from serving.model_server.errors import Code, ServingError
from serving.model_server.model import Call, Model

FLOAT, INT64 = 1, 9


def signature(*shape, output=(-1,)):
    built = meta_graph_pb2.SignatureDef()
    for infos, alias, sizes in ((built.inputs, "x", shape), (built.outputs, "sum", output)):
        infos[alias].dtype = FLOAT
        for size in sizes:
            infos[alias].tensor_shape.dim.add(size=size)
    return built


class Summing(Model):
    """Sums each row. Refuses NaN, as a graph refuses a picture that it cannot decode. Waits while ``gate`` is shut."""

    def __init__(self, path):
        super().__init__(
            path, {"serving_default": signature(-1, -1), "scalar": signature(output=()), "fixed": signature(2, -1)}
        )
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def _make_call(self, _name, signature, output_filter):
        model = self

        class Sum(Call):
            def compute(self, feeds):
                model.batches.append(np.shape(feeds[0]))
                model.entered.release()
                assert model.gate.wait(30)
                if np.isnan(feeds[0]).any():
                    raise ServingError(Code.INVALID_ARGUMENT, "not a number")
                return {"sum": feeds[0].sum(-1) if feeds[0].ndim else feeds[0]}

        return Sum(signature, output_filter)

    def close(self):
        pass


@pytest.fixture
def model(tmp_path):
    return Summing(tmp_path)


@pytest.fixture
def callers():
    with ThreadPoolExecutor(64) as pool:
        yield pool


def rows(*values):
    return {"x": np.array(values, np.float32).reshape(len(values), -1)}


def blocked(model, callers, **options):
    """A batched model whose one batch thread is at work on a first call, behind which others queue up."""
    batched = BatchedModel(model, Batcher(Batching(num_batch_threads=1, **options)))
    model.gate.clear()
    callers.submit(batched.run, "", rows(0))
    assert model.entered.acquire(timeout=30)
    return batched


def queued(batched, callers, *inputs):
    """Callers who are surely in the queue when this returns, in their order."""
    calls = []
    for each in inputs:
        before = waiting(batched)
        calls.append(callers.submit(batched.run, "", each))
        deadline = time.monotonic() + 30
        while waiting(batched) == before and not calls[-1].done():
            assert time.monotonic() < deadline
            time.sleep(0.001)
    return calls


def waiting(batched):
    return sum(len(batch.tasks) for queue in list(batched._batcher._queues.values()) for batch in list(queue))


def test_calls_that_wait_run_as_one_and_each_gets_its_own_rows(model, callers):
    """In the order in which they came."""
    batched = blocked(model, callers, max_batch_size=100, capacity=100)
    calls = queued(batched, callers, rows(1, 2), rows(3), rows(4, 5, 6))
    model.gate.set()
    assert [call.result()["sum"].tolist() for call in calls] == [[1, 2], [3], [4, 5, 6]]
    assert model.batches == [(1, 1), (6, 1)]


def test_a_batch_is_run_when_it_is_full(model, callers):
    """The rest is another batch."""
    batched = blocked(model, callers, max_batch_size=3, capacity=3)
    calls = queued(batched, callers, rows(1, 2), rows(3), rows(4, 5))
    model.gate.set()
    assert [call.result()["sum"].tolist() for call in calls] == [[1, 2], [3], [4, 5]]
    assert model.batches == [(1, 1), (3, 1), (2, 1)]


def test_a_first_call_waits_for_others_no_longer_than_the_timeout(model, callers):
    """And with others to fill its batch, not even so long."""
    batched = BatchedModel(
        model, Batcher(Batching(num_batch_threads=1, max_batch_size=2, capacity=2, batch_timeout_s=0.2))
    )
    started = time.monotonic()
    assert batched.run("", rows(1))["sum"].tolist() == [1]
    assert time.monotonic() - started >= 0.2
    patient = BatchedModel(
        model, Batcher(Batching(num_batch_threads=1, max_batch_size=2, capacity=2, batch_timeout_s=3600))
    )
    calls = [callers.submit(patient.run, "", rows(value)) for value in (2, 3)]
    assert sorted(call.result(30)["sum"].item() for call in calls) == [2, 3]
    assert model.batches == [(1, 1), (2, 1)]


def test_a_full_queue_refuses_at_once_with_unavailable(model, callers):
    """So that callers go elsewhere rather than wait for ever."""
    batched = blocked(model, callers, max_batch_size=2, capacity=2, max_enqueued_batches=2)
    calls = queued(batched, callers, rows(1, 2), rows(3, 4))
    with pytest.raises(ServingError, match="queue to which this task was submitted is full") as err:
        batched.run("", rows(5))
    assert err.value.status is Code.UNAVAILABLE
    model.gate.set()
    assert [call.result()["sum"].tolist() for call in calls] == [[1, 2], [3, 4]]
    assert batched.run("", rows(5))["sum"].tolist() == [5]


def test_batches_are_filled_up_to_an_allowed_size(model, callers):
    """With rows that nobody gets to see."""
    batched = blocked(model, callers, max_batch_size=8, capacity=8, allowed_batch_sizes=(2, 4, 8))
    calls = queued(batched, callers, rows(1, 2), rows(3))
    model.gate.set()
    assert [call.result()["sum"].tolist() for call in calls] == [[1, 2], [3]]
    assert model.batches == [(2, 1), (4, 1)]


def test_one_bad_call_in_a_batch_is_its_own_callers_error(model, callers):
    """The others are answered."""
    batched = blocked(model, callers, max_batch_size=8, capacity=8)
    good, bad, also_good = queued(batched, callers, rows(1, 2), rows(np.nan), rows(3))
    model.gate.set()
    assert good.result()["sum"].tolist() == [1, 2]
    assert also_good.result()["sum"].tolist() == [3]
    with pytest.raises(ServingError, match="not a number"):
        bad.result()


@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_different_shapes_never_fail_each_other(model, callers, padded):
    """They are run apart, or, where the parameters say so, filled up with zeros."""
    batched = blocked(model, callers, max_batch_size=8, capacity=8, pad_variable_length_inputs=padded)
    calls = queued(batched, callers, rows([1, 2]), rows([3, 4, 5]), rows([6, 7]))
    model.gate.set()
    assert [call.result()["sum"].tolist() for call in calls] == [[3], [12], [13]]
    assert model.batches[1:] == ([(3, 3)] if padded else [(2, 2), (1, 3)])


def test_a_large_call_is_refused_or_split(model, callers):
    """By the parameters."""
    refusing = BatchedModel(model, Batcher(Batching(max_batch_size=4, capacity=4)))
    with pytest.raises(ServingError, match="Task size 5 is larger than maximum input batch size 4"):
        refusing.run("", rows(1, 2, 3, 4, 5))
    splitting = BatchedModel(model, Batcher(Batching(max_batch_size=8, capacity=2)))
    assert splitting.run("", rows(1, 2, 3, 4, 5))["sum"].tolist() == [1, 2, 3, 4, 5]
    assert all(shape[0] <= 2 for shape in model.batches)


def test_signatures_whose_rows_cannot_be_joined_run_alone(model):
    """A scalar input, a fixed number of rows, no rows at all."""
    batched = BatchedModel(model, Batcher(Batching(batch_timeout_s=3600)))
    assert batched.run("scalar", {"x": np.float32(3)})["sum"] == 3
    assert batched.run("fixed", rows(1, 2))["sum"].tolist() == [1, 2]
    assert batched.run("", {"x": np.zeros((0, 1), np.float32)})["sum"].tolist() == []


def test_a_request_that_does_not_fit_the_signature_never_reaches_a_batch(model):
    """It would fail the batch of others."""
    batched = BatchedModel(model, Batcher(Batching(batch_timeout_s=3600)))
    with pytest.raises(ServingError, match="float but double is provided"):
        batched.run("", {"x": np.zeros((1, 1))})
    assert model.batches == []
