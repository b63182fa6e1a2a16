"""BentoML: `bentoml serve bentoml_app:Digits`; /classify takes bytes one at a time, /batched JSON in batches."""

import os

import bentoml
import numpy as np
from model import Model, answer_of, image_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def classify(request: Request) -> JSONResponse:
    """BentoML's way for bodies of any kind is an ASGI application beside the service."""
    service = bentoml.get_current_service()
    return JSONResponse(answer_of(service.model.probabilities(image_of(await request.body())[None])[0]))


@bentoml.service(
    workers=int(os.environ.get("PEER_WORKERS", "1")),
    traffic={"timeout": 30, "max_concurrency": 4096},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(Starlette(routes=[Route("/classify", classify, methods=["POST"])]))
class Digits:
    """The model, and a method that BentoML batches."""

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=10_000, route="/batched")
    def batched(self, images: np.ndarray) -> np.ndarray:
        return self.model.probabilities(images.astype(np.uint8).reshape(-1, 28, 28))
