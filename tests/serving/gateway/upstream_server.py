"""A model server with a model one can check by hand: a real gRPC server on a real socket, TensorFlow Serving's paths.

Its digit is ``pixel[0] % 10`` and its confidence ``(pixel[1] + 1) / 512 + 0.5``, so that every answer says which image
it belongs to. Run it alone for measurements: ``python -m tests.serving.gateway.upstream_server PORT``.
"""

import asyncio
import sys
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from serving.protos import upstream_pb2 as pb
from tests.ports import free_port


def expected_probabilities(images_u8: np.ndarray, classes: int = 10) -> np.ndarray:
    """uint8 (N, 784) → float32 (N, classes)."""
    confidence = (images_u8[:, 1].astype(np.float32) + 1) / 512 + 0.5
    rows = np.repeat(((1 - confidence) / (classes - 1))[:, None], classes, axis=1).astype(np.float32)
    rows[np.arange(len(rows)), images_u8[:, 0] % classes] = confidence
    return rows


@dataclass
class Behaviour:
    """What a test may turn while the server runs, and what it may read."""

    delay_s: float = 0.0
    delay_per_image_s: float = 0.0
    version: int = 3
    state: int = pb.ModelVersionStatus.AVAILABLE
    abort: tuple[grpc.StatusCode, str] | None = None
    as_content: bool = False
    labels: dict[str, int] = field(default_factory=lambda: {"stable": 3})  # what else is asked by label is unknown
    newest: int = 0  # a second version, which answers requests that name none
    broken_version: int = 0  # the status tells of one more, which failed to load
    classes: tuple[str, ...] = tuple("0123456789")
    tells_classes: bool = True  # in the metadata
    abstain_below: float | bytes | None = None  # bytes: what stands in the place of floats
    spoil: Any = None  # (PredictResponse) -> bytes
    hold: asyncio.Event | None = None  # calls wait for it
    batches: list[int] = field(default_factory=list)
    first_pixels: list[int] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0


class TestUpstream:
    """Starts and stops; the port stays the same between starts."""

    __test__ = False

    def __init__(self) -> None:
        self.behaviour = Behaviour()
        self.port = free_port()
        self.last_request = pb.PredictRequest()
        self.last_metadata: dict[str, Any] = {}
        self.credentials: Any = None
        self._server: Any = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, port: int | None = None) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)))
        predict = grpc.unary_unary_rpc_method_handler(
            self._predict, pb.PredictRequest.FromString, lambda answer: answer
        )
        metadata = grpc.unary_unary_rpc_method_handler(
            self._metadata, pb.GetModelMetadataRequest.FromString, pb.GetModelMetadataResponse.SerializeToString
        )
        status = grpc.unary_unary_rpc_method_handler(
            self._status, pb.GetModelStatusRequest.FromString, pb.GetModelStatusResponse.SerializeToString
        )
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "tensorflow.serving.PredictionService", {"Predict": predict, "GetModelMetadata": metadata}
                ),
                grpc.method_handlers_generic_handler("tensorflow.serving.ModelService", {"GetModelStatus": status}),
            )
        )
        address = f"127.0.0.1:{self.port if port is None else port}"
        self.port = (
            self._server.add_secure_port(address, self.credentials)
            if self.credentials
            else self._server.add_insecure_port(address)
        )
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    async def wait(self) -> None:
        await self._server.wait_for_termination()

    async def _predict(self, request: pb.PredictRequest, context: Any) -> bytes:
        behaviour = self.behaviour
        if request.model_spec.signature_name == "classes":
            return await self._classes(request, context)
        tensor = request.inputs["images"]
        shape = [dim.size for dim in tensor.tensor_shape.dim]
        assert tensor.dtype == pb.DT_UINT8
        assert shape[1:] == [28, 28]
        self.last_request = request
        self.last_metadata = dict(context.invocation_metadata() or ())
        images_u8 = np.frombuffer(tensor.tensor_content, np.uint8).reshape(shape[0], 784)
        await self._check_version(request.model_spec, context)
        behaviour.batches.append(shape[0])
        behaviour.first_pixels += images_u8[:, 0].tolist()
        behaviour.under_way += 1
        behaviour.most_under_way = max(behaviour.most_under_way, behaviour.under_way)
        try:
            if behaviour.hold is not None:
                await behaviour.hold.wait()
            if delay_s := behaviour.delay_s + behaviour.delay_per_image_s * shape[0]:
                await asyncio.sleep(delay_s)
        finally:
            behaviour.under_way -= 1
        if behaviour.abort:
            await context.abort(*behaviour.abort)
        answer = pb.PredictResponse()
        answer.model_spec.name = request.model_spec.name
        answer.model_spec.version.value = self._answering(request.model_spec)
        outputs = answer.outputs["probabilities"]
        outputs.dtype = pb.DT_FLOAT
        outputs.tensor_shape.dim.add(size=shape[0])
        outputs.tensor_shape.dim.add(size=len(behaviour.classes))
        values = expected_probabilities(images_u8, len(behaviour.classes)).tobytes()
        if behaviour.as_content:
            outputs.tensor_content = values
        else:
            outputs.float_val = values
        return behaviour.spoil(answer) if behaviour.spoil else answer.SerializeToString()

    async def _classes(self, request: pb.PredictRequest, context: Any) -> bytes:
        await self._check_version(request.model_spec, context)
        asked = np.frombuffer(request.inputs["digit"].tensor_content, "<i8")
        names = [self.behaviour.classes[digit].encode() for digit in asked]
        answer = pb.PredictResponseOfStrings(outputs={"name": pb.TensorProtoOfStrings(string_val=names)})
        if self.behaviour.abstain_below is None:
            return answer.SerializeToString()
        more = pb.PredictResponse()
        more.outputs["abstain_below"].dtype = pb.DT_FLOAT
        told = self.behaviour.abstain_below
        more.outputs["abstain_below"].float_val = (
            told if isinstance(told, bytes) else np.full(len(asked), told, "<f4").tobytes()
        )
        return answer.SerializeToString() + more.SerializeToString()

    async def _status(self, request: pb.GetModelStatusRequest, context: Any) -> pb.GetModelStatusResponse:
        if request.model_spec.name != "digits":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        await self._check_version(request.model_spec, context)
        answer = pb.GetModelStatusResponse()
        for version in filter(None, (self.behaviour.version, self.behaviour.newest)):
            answer.model_version_status.add(version=version, state=self.behaviour.state)
        if self.behaviour.broken_version:
            broken = answer.model_version_status.add(version=self.behaviour.broken_version, state=50)
            broken.status.error_code = 13
            broken.status.error_message = "/secret/path is damaged"
        return answer

    async def _metadata(self, request: pb.GetModelMetadataRequest, context: Any) -> pb.GetModelMetadataResponse:
        await self._check_version(request.model_spec, context)
        answer = pb.GetModelMetadataResponse()
        answer.model_spec.name = "digits"
        answer.model_spec.version.value = self._answering(request.model_spec)
        signatures = pb.SignatureDefMap()
        signature = signatures.signature_def["serving_default"]
        signature.method_name = "tensorflow/serving/predict"
        images = signature.inputs["images"]
        images.name, images.dtype = "serving_default_images:0", pb.DT_UINT8
        for size in (-1, 28, 28):
            images.tensor_shape.dim.add(size=size)
        if self.behaviour.tells_classes:
            probabilities = signature.outputs["probabilities"]
            probabilities.name, probabilities.dtype = "StatefulPartitionedCall:1", pb.DT_FLOAT
            for size in (-1, len(self.behaviour.classes)):
                probabilities.tensor_shape.dim.add(size=size)
            signatures.signature_def["classes"].method_name = "tensorflow/serving/predict"
        answer.metadata["signature_def"].type_url = "type.googleapis.com/tensorflow.serving.SignatureDefMap"
        answer.metadata["signature_def"].value = signatures.SerializeToString()
        return answer

    async def _check_version(self, spec: pb.ModelSpec, context: Any) -> None:
        if spec.HasField("version") and spec.version.value != self.behaviour.version:
            await context.abort(grpc.StatusCode.NOT_FOUND, "secret: no such version")
        if spec.version_label and spec.version_label not in self.behaviour.labels:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "secret: no such label")

    def _answering(self, spec: pb.ModelSpec) -> int:
        named = self.behaviour.labels.get(spec.version_label) or spec.version.value
        return named or self.behaviour.newest or self.behaviour.version


async def _main(port: int, delay_s: float) -> None:
    upstream = TestUpstream()
    upstream.behaviour.delay_s = delay_s
    upstream.behaviour.first_pixels = _Forgets()
    upstream.behaviour.batches = batches = []
    await upstream.start(port)
    print(upstream.port, flush=True)
    while True:
        await asyncio.sleep(5)
        if batches:
            print(len(batches), "calls, mean batch", sum(batches) / len(batches), flush=True)
            batches.clear()


class _Forgets(list):
    def __iadd__(self, other: object) -> "_Forgets":  # type: ignore[override]
        return self


if __name__ == "__main__":
    import uvloop

    uvloop.run(_main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0))
