"""Ray Serve over HTTP and gRPC: `python ray_app.py HTTP_PORT GRPC_PORT BATCH REPLICAS`."""

import signal
import sys

import numpy as np
import ray
from model import Model, answer_of, image_of
from ray import serve
from starlette.requests import Request

from serving.protos import digits_pb2

BATCH, REPLICAS = int(sys.argv[3]), int(sys.argv[4])


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
class Digits:
    """One image a call, gathered into batches if BATCH is over 1."""

    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=max(BATCH, 1), batch_wait_timeout_s=0.002 if BATCH > 1 else 0.0)
    async def read(self, images: list[np.ndarray]) -> list[np.ndarray]:
        return list(self.model.probabilities(np.stack(images)))

    async def __call__(self, request: Request) -> dict:
        return answer_of(await self.read(image_of(await request.body())))

    async def Classify(self, request: digits_pb2.ClassifyRequest) -> digits_pb2.ClassifyResponse:  # noqa: N802
        return digits_pb2.ClassifyResponse(**answer_of(await self.read(image_of(request.image))))


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])},
        grpc_options={
            "port": int(sys.argv[2]),
            "grpc_servicer_functions": ["serving.protos.digits_pb2_grpc.add_DigitsServicer_to_server"],
        },
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    serve.run(Digits.bind(), route_prefix="/classify", name="digits")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
