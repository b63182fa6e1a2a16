"""A published client of the open inference protocol, `tritonclient`, asks a gateway and prints what it understood.

`.tools/bin/python tests/serving/gateway/published_client.py REST_ADDRESS GRPC_ADDRESS < IMAGES` (N * 784 bytes). It
needs an older protobuf than the gateway has, so it runs in an environment of its own.
"""

import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException


def ask(client: Any, tensor: Any, outputs: list[Any]) -> dict[str, Any]:
    """What the server says of itself, and of the images in ``tensor``."""
    result = client.infer("digits", [tensor], outputs=outputs, request_id="from-outside")
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("digits"),
        "probabilities": result.as_numpy("probabilities").tolist(),
        "digit": result.as_numpy("digit").tolist(),
    }


def refusal(client: Any, tensor: Any) -> list[str]:
    """Status and message of what a model that is not there brings."""
    try:
        client.infer("letters", [tensor])
    except InferenceServerException as err:
        return [str(err.status()), err.message()]
    return []


def tensor_of(module: Any, images: np.ndarray, **more: Any) -> Any:
    tensor = module.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, **more)
    return tensor


def main(rest: str, rpc: str) -> None:
    """Over REST with binary tensors and with JSON, and over gRPC."""
    images = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(-1, 28, 28)
    http, grpc = tritonclient.http, tritonclient.grpc
    said: dict[str, Any] = {}
    with http.InferenceServerClient(rest) as client:
        said["rest_metadata"] = client.get_model_metadata("digits")
        for name, binary in (("rest_binary", True), ("rest_json", False)):
            tensor = tensor_of(http, images, binary_data=binary)
            wanted = [http.InferRequestedOutput(one, binary_data=binary) for one in ("probabilities", "digit")]
            said[name] = ask(client, tensor, wanted)
        said["rest_refusal"] = refusal(client, tensor)
    with grpc.InferenceServerClient(rpc) as client:
        tensor = tensor_of(grpc, images)
        said["grpc_metadata"] = client.get_model_metadata("digits", as_json=True)
        said["grpc"] = ask(client, tensor, [grpc.InferRequestedOutput(one) for one in ("probabilities", "digit")])
        said["grpc_refusal"] = refusal(client, tensor)
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
