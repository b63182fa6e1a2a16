"""Which calls the event loop computes, and what others notice of it: real servers, on one processor and on all."""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import prediction_service_pb2_grpc

from serving.transport.grpc_server import GrpcServer
from tests.serving.model_server.conftest import ServerProcess, request_for

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module", params=["one processor", "all processors"])
def server(
    request: pytest.FixtureRequest, start_server: Any, publish: Any, tmp_path_factory: pytest.TempPathFactory
) -> ServerProcess:
    folder = tmp_path_factory.mktemp("workers") / "digits"
    publish(folder, 1)
    all_processors = os.sched_getaffinity(0)
    try:
        if request.param == "one processor":  # which the server inherits
            os.sched_setaffinity(0, {min(all_processors)})
        server = start_server("--model_name=digits", f"--model_base_path={folder}")
    finally:
        os.sched_setaffinity(0, all_processors)
    server.wait_for("version_available", model="digits", version=1)
    return cast(ServerProcess, server)


def stub_of(server: ServerProcess) -> Any:
    return prediction_service_pb2_grpc.PredictionServiceStub(server.channel)


def slow(steps: int) -> Any:
    return request_for("digits", "slow", steps=np.int32(steps))


def is_healthy_within(server: ServerProcess, seconds: float) -> bool:
    try:
        answer = health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
    except grpc.RpcError:
        return False
    return answer.status == SERVING


def test_a_kind_of_call_that_was_short_holds_nobody_up_once_it_is_long(server: ServerProcess) -> None:
    """The same signature and size of message, now with a thousand times the work: health answers meanwhile."""
    stub = stub_of(server)
    for _ in range(30):  # short so far, so it goes to the loop
        stub.Predict(slow(100))
    started = time.monotonic()
    stub.Predict(slow(30_000))
    steps = int(30_000 * 1.5 / (time.monotonic() - started))  # about one and a half seconds alone
    long = [stub.Predict.future(slow(steps), timeout=60) for _ in range(3)]
    time.sleep(0.2)
    assert is_healthy_within(server, 2)
    assert not any(call.done() for call in long)
    assert [call.result().outputs["steps"].int_val[0] for call in long] == [steps] * 3


def test_answers_are_those_of_their_calls_whatever_computes_them(server: ServerProcess) -> None:
    """Many at once, of several sizes, so that the loop and threads both have some."""
    stub = stub_of(server)
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) for count in (1, 3, 400) * 20]
    alone = {id(batch): stub.Predict(request_for("digits", images=batch)) for batch in batches}
    for _ in range(3):
        together = [(batch, stub.Predict.future(request_for("digits", images=batch))) for batch in batches]
        for batch, call in together:
            np.testing.assert_allclose(
                call.result().outputs["probabilities"].float_val,
                alone[id(batch)].outputs["probabilities"].float_val,
                rtol=1e-5, atol=1e-7,
            )  # fmt: skip


def test_errors_come_from_the_loop_as_from_threads(server: ServerProcess) -> None:
    """A kind of call is known by its names and size, not by what is wrong with it."""
    stub = stub_of(server)
    for _ in range(5):
        stub.Predict(request_for("digits", images=np.zeros((4, 28, 28), np.uint8)))
    for _ in range(5):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predict(request_for("digits", images=np.zeros((4, 56, 14), np.uint8)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "has shape [4, 56, 14]" in caught.value.details()


def test_a_call_that_nobody_waits_for_any_more_is_not_computed(server: ServerProcess) -> None:
    """Its client left, or its deadline passed, while others had their turn: what comes after is not behind it."""
    stub = stub_of(server)
    started = time.monotonic()
    stub.Predict(slow(30_000))
    steps = int(30_000 / 2 / (time.monotonic() - started))  # about half a second each
    left = [stub.Predict.future(slow(steps), timeout=0.3) for _ in range(300)]
    assert {call.code() for call in left} <= {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert stub.Predict(request_for("digits"), timeout=40).outputs


def test_a_socket_that_a_process_left_behind_gives_way_and_one_in_use_does_not(
    run_command: Callable[..., Any], server: ServerProcess, start_server: Any, tmp_path: Any
) -> None:
    """A server that was killed cannot remove its own."""
    path = tmp_path / "grpc.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    other = start_server(f"--model_base_path={tmp_path}", f"--grpc_socket_path={path}")
    other.wait_for("server_started")
    with grpc.insecure_channel(f"unix:{path}") as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        second = run_command(f"--model_base_path={tmp_path}", "--port=0", f"--grpc_socket_path={path}")
        assert (second.returncode, second.stderr.count("\n")) == (2, 1)
        assert f"cannot listen on {path} (--grpc_socket_path): Address already in use" in second.stderr
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)


def test_a_client_that_called_too_early_is_answered_once_services_are_there() -> None:
    """The same connection, the same header block: what was known of it is forgotten."""

    async def ask_before_and_after() -> tuple[Any, bytes]:
        server = GrpcServer(1000, 10, 10, print)
        server.answer_missing(grpc.StatusCode.UNAVAILABLE, "starting")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await server.start(listener)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{listener.getsockname()[1]}") as channel:
                call = channel.unary_unary("/echo.Echo/Echo")
                early = []
                for _ in range(3):
                    try:
                        await call(b"early")
                    except grpc.aio.AioRpcError as err:
                        early.append((err.code(), err.details()))
                server.add_direct("/echo.Echo/Echo", lambda call, content: call.answer(content))
                answer = await call(b"late", metadata=(("anything", "at all"),))
                await server.stop(1)
        return early, answer

    early, answer = asyncio.run(ask_before_and_after())
    assert early == [(grpc.StatusCode.UNAVAILABLE, "starting")] * 3
    assert answer == b"late"


def test_a_channel_argument_that_is_no_number_is_refused(run_command: Callable[..., Any], tmp_path: Any) -> None:
    """In one line that names it."""
    argument = "--grpc_channel_arguments=grpc.max_receive_message_length=many"
    result = run_command(f"--model_base_path={tmp_path}", "--port=1", argument)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "grpc.max_receive_message_length: a number of bytes was expected, 'many' came" in result.stderr
