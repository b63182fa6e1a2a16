"""The model server as the gateway sees it: arrays out, arrays back, availability, and one table of its errors.

Speaks TensorFlow Serving's gRPC API through the slim messages of ``serving/protos/upstream.proto``, so that nothing
here imports TensorFlow.
"""

import asyncio
import functools
import random
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from digits import contract
from digits.errors import BadImage, BadRequest, DigitsError, ModelUnavailable, NotFound, Overloaded, UpstreamTimeout
from serving.gateway.breaker import Breaker, State
from serving.gateway.grpc_client import CallFailed, Channel
from serving.gateway.metrics import Metrics
from serving.gateway.tracing import METADATA
from serving.protos import upstream_pb2 as pb

PREDICT: Final = "/tensorflow.serving.PredictionService/Predict"
GET_MODEL_METADATA: Final = "/tensorflow.serving.PredictionService/GetModelMetadata"
GET_MODEL_STATUS: Final = "/tensorflow.serving.ModelService/GetModelStatus"

MESSAGE_LIMIT: Final = 64 * 1024 * 1024
"""Bytes of one upstream message: 65,536 images and their answers fit."""

ATTEMPTS: Final = 3
"""A Predict changes nothing at the server, so a call that found no server may be sent again."""

HUNG_S: Final = 1.0
"""A call that got no answer in this time or more counts against the server, a shorter one against its caller."""

MOST_CLASSES: Final = 65_536
"""An answer of more is taken for damaged."""

STATUS_S: Final = 2.0
"""How long the model's status is waited for."""


class Version(NamedTuple):
    """Which version of the model is asked: a number, or what a label names; without either the latest."""

    number: int | None = None
    label: str = ""


LATEST: Final = Version()

_LABEL_UNKNOWN: Final = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION}
)
"""What a server answers to a label that it does not know, or whose version is not loaded."""

_PASSES: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
    }
)
"""What a server answers that may answer otherwise soon."""


class Predictions(NamedTuple):
    """What the model said about N images."""

    probabilities: NDArray[np.float32]  # (N, C), finite
    model_version: str
    names: tuple[str, ...] = ()
    """What the C classes are called; empty where that is their number, as with digits, or not known."""
    abstain_below: float = 0.0
    """The certainty below which the model says its answers had better not be used; 0 where it says nothing of it."""


@dataclass(frozen=True)
class Classes:
    """The classes of one version of the model."""

    count: int = -1
    """-1: not known."""
    names: tuple[str, ...] = ()
    """As in ``Predictions``."""
    abstain_below: float = 0.0
    """As in ``Predictions``."""


@dataclass(frozen=True)
class Availability:
    """Whether the model server has a version to serve, and if not why. ``versions`` are the AVAILABLE ones."""

    ready: bool
    reason: str
    versions: tuple[str, ...] = ()


class PassedOn(DigitsError):
    """The model server refused a request that was passed on to it. ``status`` is its code; its words stay here."""

    code = "upstream"

    def __init__(self, status: grpc.StatusCode, path: str, version: Version) -> None:
        super().__init__(_passed_on_text(status, path, version))
        self.status = status


_UNAVAILABLE: Final = "no model is being served at the moment; try again shortly"

_PASSED_ON_TEXTS: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: "the model server does not accept this request",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "the model server has more work than it can do in time; try again shortly",
    grpc.StatusCode.UNAVAILABLE: _UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: "the model server did not answer before the deadline",
    grpc.StatusCode.UNIMPLEMENTED: "the model server does not offer this",
}


class BadAnswer(Exception):
    """The model server answered something that is not an answer. A defect there, so "internal error" to the client."""


class Upstream:
    """A client of one model server address. Create it inside a running event loop; ``close`` it at the end.

    Args:
        target: gRPC target of the model server.
        metrics: Where calls, their times and their errors are counted.
        poll_s: Seconds between two looks at the model's status.
        label: Label of the version that answers requests which name none; empty for the newest.
        tls: For TLS; None for plain gRPC.
    """

    def __init__(
        self,
        target: str,
        metrics: Metrics,
        poll_s: float = 0.5,
        label: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.availability = self._seen = Availability(False, f"the model server at {target} has not been asked yet")
        self.breaker = Breaker(self._on_breaker)
        self._target = target
        self._metrics = metrics
        self._poll_s = poll_s
        self._label = label
        self._use_label = bool(label)
        # Appended to a request it adds the label to the model_spec there: protobuf merges a field that comes twice.
        self._label_field = pb.PredictRequest(model_spec=pb.ModelSpec(version_label=label)).SerializeToString()
        self._channel = Channel(target, MESSAGE_LIMIT, tls)
        self._default_answered = ""
        self._classes: dict[str, Classes] = {}
        self.looked = asyncio.Event()
        """Set once the status has been asked for the first time, whatever came of it."""
        self._listeners: list[Callable[[Availability], Any]] = []
        self._watcher: asyncio.Task[None] | None = None

    async def predict(self, images_u8: bytes, count: int, deadline: float, version: Version = LATEST) -> Predictions:
        """Ask the model about ``count`` images.

        Args:
            images_u8: ``count * 784`` bytes, canonical images one after another.
            count: How many.
            deadline: ``time.monotonic()`` seconds after which the answer is of no use.
            version: Which version is to answer.

        Raises:
            NotFound: The version that was asked for is not there.
            ModelUnavailable, UpstreamTimeout, Overloaded, BadImage: As the server said, or its breaker.
            BadAnswer: The answer is not N finite rows of probabilities.
        """
        request = _predict_request(images_u8, count, version)
        try:
            data = await self._ask(PREDICT, request, version, deadline)
        except CallFailed as err:
            raise _error(err, self._target, version) from err
        found = _predictions(data, count)
        if version == LATEST and found.model_version != self._default_answered:
            self._default_answered = found.model_version
            self._metrics.version_changed(found.model_version)
        classes = await self._learn_classes(found.model_version, deadline)
        names = classes.names if len(classes.names) == found.probabilities.shape[1] else ()
        return found._replace(names=names, abstain_below=classes.abstain_below)

    def classes(self, version: Version = LATEST) -> Classes:
        """The classes of that version, as far as known; if none is named, of the one that answers by default."""
        newest = self._seen.versions[-1] if self._seen.versions else ""
        number = self._default_answered or newest if version.number is None else str(version.number)
        return self._classes.get(number, Classes())

    async def pass_on(self, path: str, request: bytes, version: Version, deadline: float) -> bytes:
        """Send a serialised request as it is, plus the label if it names no version; return the serialised answer.

        Args:
            path: ``PREDICT``, ``GET_MODEL_METADATA`` or ``GET_MODEL_STATUS``.
            request: The message's bytes.
            version: What version they ask for, for the errors.
            deadline: ``time.monotonic()`` seconds.

        Raises:
            PassedOn: The server refused; it keeps the server's code.
            ModelUnavailable: The breaker is open.
            UpstreamTimeout: The deadline has passed already.
        """
        try:
            return await self._ask(path, request, version, deadline)
        except CallFailed as err:
            raise PassedOn(err.code, path, version) from err

    async def _ask(self, path: str, request: bytes, version: Version, deadline: float) -> bytes:
        """One call. Where it names no version the label does, as long as the server knows it."""
        if not self._use_label or version != LATEST or path == GET_MODEL_STATUS:
            return await self._call(path, request, deadline)
        try:
            return await self._call(path, request + self._label_field, deadline)
        except CallFailed as err:
            if err.code not in _LABEL_UNKNOWN:
                raise
        answer = await self._call(path, request, deadline)  # raises again if the fault was not the label's
        self._use_label = False
        return answer

    async def _call(self, path: str, request: bytes, deadline: float) -> bytes:
        """One call, sent again when no server was found. Nothing that is called here changes anything there."""
        for attempt in range(1, ATTEMPTS + 1):
            started = time.monotonic()
            if started >= deadline:
                break
            pause_s = random.uniform(0.01, 0.05) * attempt  # noqa: S311 - jitter, not a secret
            last = attempt == ATTEMPTS or started + pause_s >= deadline
            if self.breaker.admits():
                try:
                    data = await self._channel.call(path, request, deadline - started, METADATA.get())
                except CallFailed as err:
                    self._failed(err.code, time.monotonic() - started)
                    if err.code is not grpc.StatusCode.UNAVAILABLE or last:
                        raise
                except asyncio.CancelledError:
                    self.breaker.gave_up()
                    raise
                else:
                    self.breaker.succeeded()
                    self._metrics.upstream_call("OK", time.monotonic() - started)
                    return data
                self._metrics.upstream_retry()
            elif last or self.breaker.state is State.OPEN:
                self._metrics.breaker_refusal()
                raise ModelUnavailable(_UNAVAILABLE, self.breaker.retry_after_s())
            await asyncio.sleep(pause_s)
        raise UpstreamTimeout("the model did not answer before the deadline; try again, or allow more time")

    def _failed(self, code: grpc.StatusCode, duration_s: float) -> None:
        self._metrics.upstream_call(code.name, duration_s)
        if code is grpc.StatusCode.UNAVAILABLE:
            self.breaker.failed()
        elif code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            self.breaker.succeeded()  # it is there, and said so
        elif duration_s >= HUNG_S:
            self.breaker.failed()
        else:
            self.breaker.gave_up()

    def on_change(self, listener: Callable[[Availability], Any]) -> None:
        """Have ``listener`` called with each new availability."""
        self._listeners.append(listener)

    def watch(self) -> None:
        """Start following the model's status, until ``close``."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="model status")

    async def close(self) -> None:
        """Stop watching and close the channel."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._channel.close()

    async def _watch(self) -> None:
        late = 0
        while True:
            found = await self._look()
            # A busy server may answer one status call late: that alone is no reason to leave the balancer's list.
            late = late + 1 if found is None else 0
            if found is not None or late >= 3:
                self._seen = found or Availability(False, f"the model server at {self._target} does not answer in time")
                if self._seen.ready:
                    self.breaker.server_is_back()
                    for version in self._seen.versions:
                        await self._learn_classes(version, time.monotonic() + STATUS_S)
                    self._classes = {v: c for v, c in self._classes.items() if v in self._seen.versions}
                self._refresh()
            self.looked.set()
            if self._label and not self._use_label:
                self._use_label = await self._knows_label()
            await asyncio.sleep(self._poll_s)

    async def _learn_classes(self, version: str, deadline: float) -> Classes:
        """The classes of a version, asked once. A server that is away or late now is asked again another time."""
        found = self._classes.get(version)
        if found is not None:
            return found
        try:
            found = await self._ask_classes(int(version), min(deadline, time.monotonic() + STATUS_S))
        except CallFailed as err:
            if err.code in _PASSES:
                return Classes()
            found = Classes()
        self._classes[version] = found
        return found

    async def _ask_classes(self, version: int, deadline: float) -> Classes:
        """How many there are by the signature of the model; their names by one that models of ours have besides."""
        spec = pb.ModelSpec(name=contract.MODEL_NAME, version=pb.Version(value=version))
        request = pb.GetModelMetadataRequest(model_spec=spec, metadata_field=("signature_def",))
        answer = await self._channel.call(
            GET_MODEL_METADATA, request.SerializeToString(), max(0.001, deadline - time.monotonic())
        )
        signatures = _signatures(answer)
        shape = signatures[contract.SIGNATURE].outputs[contract.OUTPUT_PROBABILITIES].tensor_shape.dim
        count = shape[1].size if len(shape) == 2 else -1
        if contract.CLASSES_SIGNATURE not in signatures or not 1 <= count <= MOST_CLASSES:
            return Classes(count)
        asked = _classes_request(spec, count)
        answer = await self._channel.call(PREDICT, asked, max(0.001, deadline - time.monotonic()))
        return Classes(count, _names(answer, count), _abstain_below(answer))

    async def _knows_label(self) -> bool:
        request = pb.GetModelMetadataRequest(
            model_spec=pb.ModelSpec(name=contract.MODEL_NAME, version_label=self._label),
            metadata_field=("signature_def",),
        )
        try:
            await self._channel.call(GET_MODEL_METADATA, request.SerializeToString(), STATUS_S)
        except CallFailed:
            return False
        return True

    async def _look(self) -> Availability | None:
        request = pb.GetModelStatusRequest(model_spec=pb.ModelSpec(name=contract.MODEL_NAME))
        try:
            data = await self._channel.call(GET_MODEL_STATUS, request.SerializeToString(), STATUS_S)
        except CallFailed as err:
            if err.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            if err.code is grpc.StatusCode.NOT_FOUND:
                return Availability(False, f"the model server at {self._target} has no model {contract.MODEL_NAME!r}")
            return Availability(False, f"the model server at {self._target} cannot be reached")
        return _availability(pb.GetModelStatusResponse.FromString(data))

    def _on_breaker(self, state: State) -> None:
        self._metrics.breaker_state(state)
        self._refresh()

    def _refresh(self) -> None:
        """What the status says, unless calls fail all the same; and tell those who listen."""
        found = self._seen
        if found.ready and self.breaker.state is State.OPEN:
            reason = f"calls to the model server at {self._target} fail; the next one goes in a moment"
            found = Availability(False, reason, found.versions)
        if found == self.availability:
            return
        self.availability = found
        self._metrics.upstream_ready(found.ready)
        for listener in self._listeners:
            listener(found)


def _predict_request(images_u8: bytes, count: int, version: Version) -> bytes:
    before, after = _around_images(count, version)
    return b"".join((before, images_u8, after))


@functools.lru_cache(256)
def _around_images(count: int, version: Version) -> tuple[bytes, bytes]:
    """A serialised PredictRequest up to its images' bytes, and after them: of as many images the same every time."""
    request = pb.PredictRequest(output_filter=(contract.OUTPUT_PROBABILITIES,))
    request.model_spec.name = contract.MODEL_NAME
    request.model_spec.signature_name = contract.SIGNATURE
    if version.number is not None:
        request.model_spec.version.value = version.number
    elif version.label:
        request.model_spec.version_label = version.label
    tensor = request.inputs[contract.INPUT_IMAGES]
    tensor.dtype = pb.DT_UINT8
    for size in (count, contract.IMAGE_HEIGHT, contract.IMAGE_WIDTH):
        tensor.tensor_shape.dim.add(size=size)
    # Their length comes right before them, and the last byte of a length is below 0x80.
    tensor.tensor_content = b"\xff" * (count * contract.IMAGE_BYTES)
    before, _, after = request.SerializeToString().partition(tensor.tensor_content)
    return before, after


def _classes_request(spec: pb.ModelSpec, count: int) -> bytes:
    request = pb.PredictRequest(model_spec=spec)
    request.model_spec.signature_name = contract.CLASSES_SIGNATURE
    tensor = request.inputs[contract.OUTPUT_DIGIT]
    tensor.dtype = pb.DT_INT64
    tensor.tensor_shape.dim.add(size=count)
    tensor.tensor_content = np.arange(count, dtype="<i8").tobytes()
    return request.SerializeToString()


def _names(data: bytes, count: int) -> tuple[str, ...]:
    """The classes' names; none where they are what counting would call them, or damaged."""
    try:
        values = pb.PredictResponseOfStrings.FromString(data).outputs[contract.OUTPUT_NAME].string_val
        names = tuple(value.decode() for value in values)
    except (DecodeError, UnicodeDecodeError):
        return ()
    return names if len(names) == count and names != tuple(map(str, range(count))) else ()


def _abstain_below(data: bytes) -> float:
    """The model's threshold of certainty, one for all its classes; 0 where there is none, or it is damaged."""
    try:
        tensor = pb.PredictResponse.FromString(data).outputs[contract.OUTPUT_ABSTAIN_BELOW]
        values = np.frombuffer(tensor.tensor_content or tensor.float_val or b"", np.float32)
    except (DecodeError, ValueError):  # no message, or no whole floats
        return 0.0
    return float(values[0]) if values.size and 0 <= values[0] <= 1 else 0.0


def _signatures(data: bytes) -> Mapping[str, pb.SignatureDef]:
    """The signatures in a GetModelMetadataResponse; none where it is damaged."""
    try:
        content = pb.GetModelMetadataResponse.FromString(data).metadata["signature_def"].value
        signatures: Mapping[str, pb.SignatureDef] = pb.SignatureDefMap.FromString(content).signature_def
    except DecodeError:
        return pb.SignatureDefMap().signature_def
    return signatures


def _predictions(data: bytes, count: int) -> Predictions:
    answer = pb.PredictResponse.FromString(data)
    tensor = answer.outputs[contract.OUTPUT_PROBABILITIES]
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.dtype != pb.DT_FLOAT or len(shape) != 2 or shape[0] != count or not 1 <= shape[1] <= MOST_CLASSES:
        raise BadAnswer(
            f"expected {contract.OUTPUT_PROBABILITIES!r} float32 [{count}, classes] from the model server, came data "
            f"type {tensor.dtype} {shape}"
        )
    values = np.frombuffer(tensor.tensor_content or tensor.float_val or b"", np.float32)
    if values.size != count * shape[1]:
        values = _floats_the_long_way(data, count * shape[1])
    probabilities = values.reshape(shape)  # (N, C)
    if not np.isfinite(probabilities).all():
        raise BadAnswer("the model server's probabilities are not all finite")
    return Predictions(probabilities, str(answer.model_spec.version.value))


def _floats_the_long_way(data: bytes, size: int) -> NDArray[np.float32]:
    """Values sent unpacked or in pieces, and TensorFlow's shorthand: the last value stands for all that follow."""
    tensor = pb.PredictResponseOfFloats.FromString(data).outputs[contract.OUTPUT_PROBABILITIES]
    values = np.array(tensor.float_val, np.float32)
    if not 1 <= values.size <= size:
        raise BadAnswer(f"expected {size} probabilities from the model server, came {values.size}")
    return np.pad(values, (0, size - values.size), mode="edge")


def _availability(answer: pb.GetModelStatusResponse) -> Availability:
    statuses = answer.model_version_status
    state = pb.ModelVersionStatus
    versions = tuple(
        str(one.version) for one in sorted(statuses, key=lambda s: s.version) if one.state == state.AVAILABLE
    )
    if versions:
        return Availability(True, "", versions)
    states = ", ".join(f"{one.version} {state.State.Name(one.state)}" for one in statuses) or "none"
    return Availability(
        False, f"the model server has no version of {contract.MODEL_NAME!r} available (versions: {states})"
    )


def no_servable(name: str, version: Version, path: str = PREDICT) -> str:
    """What TensorFlow Serving says of a model or version that is not there: clients match on it."""
    if path == GET_MODEL_STATUS:
        missing = "any versions" if version.number is None else f"version {version.number}"
        return f"Could not find {missing} of model {name}"
    wanted = f"Latest({name})" if version.number is None else f"Specific({name}, {version.number})"
    return f"Servable not found for request: {wanted}"


def _no_label(label: str) -> str:
    return f"Unrecognized servable version label: {label[:64]}"


def _passed_on_text(status: grpc.StatusCode, path: str, version: Version) -> str:
    if status is grpc.StatusCode.NOT_FOUND:
        return no_servable(contract.MODEL_NAME, version, path)
    if status is grpc.StatusCode.INVALID_ARGUMENT and version.label:
        return _no_label(version.label)
    return _PASSED_ON_TEXTS.get(status, "the model server could not answer this request")


def _error(err: CallFailed, target: str, version: Version) -> Exception:
    """What an upstream failure means to a client. The upstream's own words stay in the chained cause."""
    code = err.code
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UpstreamTimeout("the model did not answer before the deadline; try again, or allow more time")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded("the model server has more work than it can do in time; try again shortly")
    if version.number is not None and code is grpc.StatusCode.NOT_FOUND:
        return NotFound(no_servable(contract.MODEL_NAME, version))
    if version.label and code is grpc.StatusCode.INVALID_ARGUMENT:
        return BadRequest(_no_label(version.label))
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return BadImage("the model does not accept these images")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION):
        return ModelUnavailable(_UNAVAILABLE)
    return BadAnswer(f"the model server at {target} answered {code.name}: {err.details}")
