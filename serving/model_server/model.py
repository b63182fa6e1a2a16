"""One loaded version, whatever its format: signatures by name, and calls of them on numpy arrays."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorflow.core.protobuf import meta_graph_pb2

from serving.model_server import tensors
from serving.model_server.errors import Code, ServingError, invalid_argument

DEFAULT_SIGNATURE = "serving_default"
MAX_MESSAGE_CHARS = 2000
"""TensorFlow's messages may name half the graph; gRPC sends them in a header."""

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


class Call(ABC):
    """A signature with a set of its outputs, prepared. Thread-safe."""

    def __init__(self, signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str] = ()) -> None:
        """Prepare the outputs of ``output_filter``; none means all.

        Raises:
            ServingError: an output that the signature does not have, or an input of a type that cannot be fed.
        """
        self.inputs = [_input(alias, signature.inputs[alias]) for alias in sorted(signature.inputs)]
        self.outputs = _wanted(signature, output_filter)
        #: Whether rows of several calls may be joined: the first dimension of every input and output is free.
        self.batchable = bool(self.inputs) and all(
            _has_free_rows(info) for info in [*signature.inputs.values(), *signature.outputs.values()]
        )

    def __call__(self, inputs: Arrays) -> dict[str, Array]:
        """The outputs by name; ``inputs`` by name, exactly those of the signature.

        Raises:
            ServingError: see ``feeds`` and ``compute``.
        """
        return self.compute(self.feeds(inputs))

    def feeds(self, inputs: Arrays) -> list[Array]:
        """The arrays in the order of ``self.inputs``.

        Raises:
            ServingError: INVALID_ARGUMENT, they are not the signature's in name, type or shape.
        """
        if len(inputs) != len(self.inputs):
            raise self._other_inputs(inputs)
        feeds = []
        for index, entry in enumerate(self.inputs):
            array = inputs.get(entry.alias)
            if array is None:
                raise self._other_inputs(inputs)
            if array.dtype != entry.dtype:
                given = tensors.type_of(array)
                raise invalid_argument(
                    f"Expects arg[{index}] to be {tensors.type_name(entry.kind)} but {given} is provided"
                )
            if entry.shape is not None and not _fits(array.shape, entry.shape):
                raise invalid_argument(
                    f"input {entry.alias} has shape {list(array.shape)}, the signature expects "
                    f"{['?' if size < 0 else size for size in entry.shape]}".replace("'", "")
                )
            feeds.append(array)
        return feeds

    @abstractmethod
    def compute(self, feeds: Sequence[Array]) -> dict[str, Array]:
        """The outputs by name.

        Raises:
            ServingError: whatever the model itself reports.
        """

    def _other_inputs(self, inputs: Arrays) -> ServingError:
        expected = {entry.alias for entry in self.inputs}
        extra, missing = sorted(set(inputs) - expected), sorted(expected - set(inputs))
        if len(inputs) == len(expected):
            return invalid_argument(
                f"input tensor alias not found in signature: {','.join(extra)}. "
                f"Inputs expected to be in the set {{{','.join(sorted(expected))}}}."
            )
        return invalid_argument(
            f"input size does not match signature: {len(inputs)}!={len(expected)} "
            f"len({{{','.join(sorted(inputs))}}}) != len({{{','.join(sorted(expected))}}}). "
            f"Sent extra: {{{','.join(extra)}}}. Missing but required: {{{','.join(missing)}}}."
        )


class Model(ABC):
    """One loaded version. Thread-safe; ``run`` may be called from many threads at once."""

    def __init__(self, path: Path, signatures: Mapping[str, meta_graph_pb2.SignatureDef]) -> None:
        self.path = path
        self.signatures = signatures
        self._lock = threading.Lock()
        self._calls: dict[Hashable, Call] = {}

    def signature(self, name: str) -> meta_graph_pb2.SignatureDef:
        """The signature, ``serving_default`` for an empty name.

        Raises:
            ServingError: FAILED_PRECONDITION, there is none of that name.
        """
        try:
            return self.signatures[name or DEFAULT_SIGNATURE]
        except KeyError:
            raise ServingError(
                Code.FAILED_PRECONDITION, f'Serving signature key "{name or DEFAULT_SIGNATURE}" not found.'
            ) from None

    def run(self, signature_name: str, inputs: Arrays, output_filter: Sequence[str] = ()) -> dict[str, Array]:
        """Run a signature.

        Args:
            signature_name: ``""`` means ``serving_default``.
            inputs: arrays by input name, exactly those of the signature.
            output_filter: names of the outputs to compute; none means all.

        Raises:
            ServingError: unknown signature; inputs or outputs that are not the signature's, in name, type or shape;
                whatever the model itself reports.
        """
        return self.call(signature_name, output_filter)(inputs)

    def call(self, signature_name: str, output_filter: Sequence[str] = ()) -> Call:
        """What ``run`` runs.

        Raises:
            ServingError: unknown signature or output.
        """
        name = signature_name or DEFAULT_SIGNATURE
        key = (name, tuple(output_filter))
        return self._calls.get(key) or self._prepare(key, name, self.signature(name), output_filter)

    def run_together(self, wanted: Mapping[str, Sequence[str]], inputs: Arrays) -> dict[str, dict[str, Array]]:
        """Run several signatures that read the same tensors, once.

        Args:
            wanted: signature name → names of its outputs to compute.
            inputs: as for ``run``, for any of them.

        Returns:
            Signature name → output name → array.

        Raises:
            ServingError: as for ``run``.
        """
        key = tuple((name, *outputs) for name, outputs in wanted.items())
        call = self._calls.get(key)
        if call is None:
            first = next(iter(wanted))
            together = meta_graph_pb2.SignatureDef(inputs=self.signature(first).inputs)
            for name, aliases in wanted.items():
                for alias in aliases:
                    together.outputs[f"{name}/{alias}"].CopyFrom(self.signature(name).outputs[alias])
            call = self._prepare(key, first, together)
        arrays = call(inputs)
        return {name: {alias: arrays[f"{name}/{alias}"] for alias in aliases} for name, aliases in wanted.items()}

    @abstractmethod
    def close(self) -> None:
        """Free it; nobody uses it any more."""

    @abstractmethod
    def _make_call(self, name: str, signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str]) -> Call: ...

    def _prepare(
        self, key: Hashable, name: str, signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str] = ()
    ) -> Call:
        call = self._make_call(name, signature, output_filter)
        with self._lock:
            # The first of those made at the same time is everybody's: calls are batched by it.
            # Each order of a filter is its own entry; nobody needs more than a few.
            if len(self._calls) < 64:
                return self._calls.setdefault(key, call)
            return self._calls.get(key, call)


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a signature. ``shape``: -1 where any size fits; None where any rank does."""

    alias: str
    kind: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...] | None


def _wanted(signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str]) -> list[str]:
    for alias in output_filter:
        if alias not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {alias} "
                f"Outputs expected to be in the set {{{','.join(sorted(signature.outputs))}}}."
            )
    twice = [alias for alias in output_filter if list(output_filter).count(alias) > 1]
    if twice:
        raise invalid_argument(f"duplicate output tensor alias: {twice[0]}")
    return list(output_filter) or sorted(signature.outputs)


def _input(alias: str, info: meta_graph_pb2.TensorInfo) -> Input:
    dtype = tensors.numpy_dtype(info.dtype)
    if dtype is None:
        raise ServingError(Code.UNIMPLEMENTED, f"input {alias} has type {tensors.type_name(info.dtype)}")
    unknown = info.tensor_shape.unknown_rank
    return Input(alias, info.dtype, dtype, None if unknown else tuple(dim.size for dim in info.tensor_shape.dim))


def _fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all(e in (-1, s) for s, e in zip(shape, expected, strict=True))


def _has_free_rows(info: meta_graph_pb2.TensorInfo) -> bool:
    shape = info.tensor_shape
    return not shape.unknown_rank and bool(shape.dim) and shape.dim[0].size == -1
