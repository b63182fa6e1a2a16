"""A TF Lite model, ``model.tflite`` in the version's folder, on a pool of interpreters.

An interpreter does one call at a time, and outside the interpreter lock, so a model has as many as calls may run.
"""

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from tensorflow.core.protobuf import meta_graph_pb2

from serving.model_server import logs, runtime
from serving.model_server.errors import Code, ServingError, invalid_argument
from serving.model_server.model import DEFAULT_SIGNATURE, MAX_MESSAGE_CHARS, Array, Arrays, Call, Model

FILE: Final = "model.tflite"


class TfLiteModel(Model):
    """One loaded TF Lite model. One without signatures gets ``serving_default``, of its tensors' own names."""

    def __init__(self, path: Path, interpreters: int) -> None:
        """Load it into ``interpreters`` interpreters.

        Raises:
            ServingError: the file is no TF Lite model, or uses operations that are not there.
        """
        with logs.libraries_silenced():  # they greet in plain text
            pool = _interpreters(path, interpreters)
        self._pool: queue.LifoQueue[runtime.TfLiteInterpreter] = queue.LifoQueue()
        for interpreter in pool:
            self._pool.put(interpreter)
        super().__init__(path, _signatures(pool[0]))

    def close(self) -> None:
        """Free the interpreters."""
        self._calls.clear()
        while not self._pool.empty():
            self._pool.get()

    @contextmanager
    def interpreter(self) -> Iterator[runtime.TfLiteInterpreter]:
        """One for a call; waits for one to be free."""
        interpreter = self._pool.get()
        try:
            yield interpreter
        finally:
            self._pool.put(interpreter)

    def run_together(self, wanted: Mapping[str, Sequence[str]], inputs: Arrays) -> dict[str, dict[str, Array]]:
        """One after the other: an interpreter runs one signature."""
        return {name: self.run(name, inputs, outputs) for name, outputs in wanted.items()}

    def _make_call(self, name: str, signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str]) -> Call:
        return _LiteCall(self, name, signature, output_filter)


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
        with self._model.interpreter() as interpreter:
            try:
                results = _invoke(interpreter, self._name, inputs)
            except (ValueError, RuntimeError) as err:
                raise invalid_argument(str(err)[:MAX_MESSAGE_CHARS]) from err
        return {alias: np.asarray(results[alias]) for alias in self.outputs}


def _interpreters(path: Path, count: int) -> list[runtime.TfLiteInterpreter]:
    try:
        content = (path / FILE).read_bytes()
        pool = [runtime.TfLiteInterpreter(model_content=content, num_threads=1) for _ in range(count)]
        for interpreter in pool:
            interpreter.allocate_tensors()
    except (OSError, ValueError, RuntimeError) as err:
        raise ServingError(Code.INVALID_ARGUMENT, f"{FILE} cannot be loaded: {err}"[:MAX_MESSAGE_CHARS]) from err
    return pool


def _invoke(interpreter: runtime.TfLiteInterpreter, name: str, inputs: Mapping[str, Array]) -> dict[str, Any]:
    if interpreter.get_signature_list():
        return interpreter.get_signature_runner(name)(**inputs)
    places = {detail["name"]: detail["index"] for detail in interpreter.get_input_details()}
    for alias, array in inputs.items():
        interpreter.resize_tensor_input(places[alias], array.shape)
    interpreter.allocate_tensors()
    for alias, array in inputs.items():
        interpreter.set_tensor(places[alias], array)
    interpreter.invoke()
    return {detail["name"]: interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()}


def _signatures(interpreter: runtime.TfLiteInterpreter) -> dict[str, meta_graph_pb2.SignatureDef]:
    names = interpreter.get_signature_list()
    if not names:
        inputs = {detail["name"]: detail for detail in interpreter.get_input_details()}
        outputs = {detail["name"]: detail for detail in interpreter.get_output_details()}
        return {DEFAULT_SIGNATURE: _signature(inputs, outputs)}
    runners = {name: interpreter.get_signature_runner(name) for name in names}
    return {
        name: _signature(runner.get_input_details(), runner.get_output_details()) for name, runner in runners.items()
    }


def _signature(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> meta_graph_pb2.SignatureDef:
    signature = meta_graph_pb2.SignatureDef(method_name="tensorflow/serving/predict")
    for infos, details in ((signature.inputs, inputs), (signature.outputs, outputs)):
        for alias, detail in details.items():
            infos[alias].name = detail["name"]
            infos[alias].dtype = runtime.as_dtype(detail["dtype"]).as_datatype_enum
            for size in detail["shape_signature"]:
                infos[alias].tensor_shape.dim.add(size=int(size))
    return signature
