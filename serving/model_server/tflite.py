"""A TF Lite model, ``model.tflite`` in the version's folder, on a pool of interpreters.

An interpreter does one call at a time, and outside the interpreter lock, so a model has as many as calls run. Its
XNNPACK kernels pack the weights once, where TensorFlow's matrix multiplication packs them on every call.
"""

import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tensorflow.core.protobuf import meta_graph_pb2

from serving.model_server import logs, runtime
from serving.model_server.errors import Code, ServingError, invalid_argument
from serving.model_server.model import DEFAULT_SIGNATURE, MAX_MESSAGE_CHARS, Array, Arrays, Call, Model
from serving.model_server.storage import LITE_FILE


class TfLiteModel(Model):
    """One loaded TF Lite model. One without signatures gets ``serving_default``, of its tensors' own names."""

    def __init__(self, path: Path, interpreters: int) -> None:
        """Load it into an interpreter, and into more up to ``interpreters`` once so many calls run at a time.

        Raises:
            ServingError: the file is no TF Lite model, or uses operations that are not there.
        """
        try:
            self._content = (path / LITE_FILE).read_bytes()
            with logs.libraries_silenced():  # they greet in plain text
                first = _Interpreter(self._content)
        except (OSError, ValueError, RuntimeError) as err:
            raise ServingError(
                Code.INVALID_ARGUMENT, f"{LITE_FILE} cannot be loaded: {err}"[:MAX_MESSAGE_CHARS]
            ) from err
        self._pool: queue.LifoQueue[_Interpreter] = queue.LifoQueue()
        self._pool.put(first)
        self._may_be_made = interpreters - 1
        self._making = threading.Lock()
        super().__init__(path, first.signatures())

    def close(self) -> None:
        """Free the interpreters."""
        self._calls.clear()
        while not self._pool.empty():
            self._pool.get()

    def invoke(self, name: str, inputs: Arrays) -> dict[str, Any]:
        """All outputs of a signature; waits for an interpreter to be free.

        Raises:
            ValueError, RuntimeError: the model cannot take these inputs.
        """
        interpreter = self._take()
        try:
            return interpreter.invoke(name, inputs)
        finally:
            self._pool.put(interpreter)

    def _take(self) -> "_Interpreter":
        """The one used last, whose memory is warm; a new one, which packs the weights for itself, only if all work."""
        with suppress(queue.Empty):
            return self._pool.get_nowait()
        with self._making:
            make = self._may_be_made > 0
            self._may_be_made -= make
        return _Interpreter(self._content) if make else self._pool.get()

    def run_together(self, wanted: Mapping[str, Sequence[str]], inputs: Arrays) -> dict[str, dict[str, Array]]:
        """One after the other: an interpreter runs one signature."""
        return {name: self.run(name, inputs, outputs) for name, outputs in wanted.items()}

    def _make_call(self, name: str, signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str]) -> Call:
        return _LiteCall(self, name, signature, output_filter)


class CompletedTfLiteModel(Model):
    """A TF Lite model with the signatures that it lacks run by the SavedModel beside it.

    TF Lite has no pictures to decode and few operations on text, so what converts is often a model's main signature
    alone. The original serves nothing else of such a version then.
    """

    def __init__(self, lite: TfLiteModel, saved: Model) -> None:
        super().__init__(lite.path, {**saved.signatures, **lite.signatures})
        self._lite, self._saved = lite, saved

    def close(self) -> None:
        """Free both."""
        self._calls.clear()
        self._lite.close()
        self._saved.close()

    def run_together(self, wanted: Mapping[str, Sequence[str]], inputs: Arrays) -> dict[str, dict[str, Array]]:
        """By the one that has them all."""
        together = self._lite if wanted.keys() <= self._lite.signatures.keys() else self._saved
        return together.run_together(wanted, inputs)

    def _make_call(self, name: str, _signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str]) -> Call:
        return (self._lite if name in self._lite.signatures else self._saved).call(name, output_filter)


class _LiteCall(Call):
    def __init__(
        self, model: TfLiteModel, name: str, signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str]
    ) -> None:
        super().__init__(signature, output_filter)
        self._model = model
        self._name = name

    def compute(self, feeds: Sequence[Array]) -> dict[str, Array]:
        """Run an interpreter on the calling thread."""
        inputs = {entry.alias: array for entry, array in zip(self.inputs, feeds, strict=True)}
        try:
            results = self._model.invoke(self._name, inputs)
        except (ValueError, RuntimeError) as err:
            raise invalid_argument(str(err)[:MAX_MESSAGE_CHARS]) from err
        return {alias: np.asarray(results[alias]) for alias in self.outputs}


class _Interpreter:
    """One interpreter with its signatures prepared. One call at a time."""

    def __init__(self, content: bytes) -> None:
        self._lite = runtime.TfLiteInterpreter(model_content=content, num_threads=1)
        self._lite.allocate_tensors()
        self._runners = {name: self._lite.get_signature_runner(name) for name in self._lite.get_signature_list()}

    def signatures(self) -> dict[str, meta_graph_pb2.SignatureDef]:
        if self._runners:
            return {
                name: _signature(runner.get_input_details(), runner.get_output_details())
                for name, runner in self._runners.items()
            }
        inputs = {detail["name"]: detail for detail in self._lite.get_input_details()}
        outputs = {detail["name"]: detail for detail in self._lite.get_output_details()}
        return {DEFAULT_SIGNATURE: _signature(inputs, outputs)}

    def invoke(self, name: str, inputs: Arrays) -> dict[str, Any]:
        if self._runners:
            return self._runners[name](**inputs)
        lite = self._lite
        places = {detail["name"]: detail["index"] for detail in lite.get_input_details()}
        for alias, array in inputs.items():
            lite.resize_tensor_input(places[alias], array.shape)
        lite.allocate_tensors()
        for alias, array in inputs.items():
            lite.set_tensor(places[alias], array)
        lite.invoke()
        return {detail["name"]: lite.get_tensor(detail["index"]) for detail in lite.get_output_details()}


def _signature(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> meta_graph_pb2.SignatureDef:
    signature = meta_graph_pb2.SignatureDef(method_name="tensorflow/serving/predict")
    for infos, details in ((signature.inputs, inputs), (signature.outputs, outputs)):
        for alias, detail in details.items():
            infos[alias].name = detail["name"]
            infos[alias].dtype = runtime.as_dtype(detail["dtype"]).as_datatype_enum
            for size in detail["shape_signature"]:
                infos[alias].tensor_shape.dim.add(size=int(size))
    return signature
