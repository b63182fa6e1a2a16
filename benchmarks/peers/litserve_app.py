"""LitServe: `python litserve_app.py PORT BATCH WORKERS`."""

import base64
import sys

import litserve
import numpy as np
from model import Model, answer_of, image_of


class Api(litserve.LitAPI):
    """JSON with an image's bytes in base64: LitServe takes no other bodies but forms."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        self.model = Model()

    def decode_request(self, request: dict) -> np.ndarray:
        return image_of(base64.b64decode(request["image"]))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model.probabilities(x if x.ndim == 3 else x[None])

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict:
        return answer_of(output if output.ndim == 1 else output[0])


if __name__ == "__main__":
    port, batch, workers = map(int, sys.argv[1:])
    api = Api(max_batch_size=batch, batch_timeout=0.002, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error", num_api_servers=1)
