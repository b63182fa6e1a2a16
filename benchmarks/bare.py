"""Handlers that do nothing but answer: the ceiling that a framework and a protocol leave to any gateway.

`python -m benchmarks.bare grpc-aio|grpc-threads PORT`; the ASGI one is run by uvicorn as ``benchmarks.bare:app``.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ANSWER = (
    b'{"digit":7,"confidence":0.99,"probabilities":[0.001,0.001,0.001,0.001,0.001,0.001,0.001,0.99,0.001,0.001],'
    b'"model_version":"1","request_id":"0123456789abcdef"}'
)


async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[dict]], send: Callable[[dict], Awaitable]) -> None:
    """Reads the whole body, answers a constant of the gateway's size."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


def main(kind: str, port: str) -> None:
    import grpc

    from serving.protos import digits_pb2, digits_pb2_grpc

    answer = digits_pb2.ClassifyResponse(digit=7, confidence=0.99, probabilities=[0.1] * 10, model_version="1")

    if kind == "grpc-threads":

        class Threads(digits_pb2_grpc.DigitsServicer):
            def Classify(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - gRPC's names
                return answer

        server = grpc.server(ThreadPoolExecutor(16))
        digits_pb2_grpc.add_DigitsServicer_to_server(Threads(), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        server.wait_for_termination()
        return

    class Aio(digits_pb2_grpc.DigitsServicer):
        async def Classify(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - gRPC's names
            return answer

    async def serve() -> None:
        server = grpc.aio.server()
        digits_pb2_grpc.add_DigitsServicer_to_server(Aio(), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


if __name__ == "__main__":
    main(*sys.argv[1:])
