"""Clients that hold connections: idle, half closed, dripping, too many. Others are answered all the while."""

import contextlib
import resource
import socket
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.serving.gateway.conftest import Here, LoopThread, eventually
from tests.serving.gateway.test_process import Process
from tests.serving.gateway.upstream_server import TestUpstream

IDLE = 2000
HEAD = b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 784\r\n\r\n"


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    """Sockets that the test holds, and descriptors enough for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384) if hard > 0 else 16384, hard))
    with contextlib.ExitStack() as stack:
        yield stack
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(held: contextlib.ExitStack, port: int, send: bytes = b"") -> socket.socket:
    raw = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
    if send:
        raw.sendall(send)
    return raw


def closed(raw: socket.socket) -> bool:
    """Whether the other side has hung up, after whatever it said first."""
    raw.settimeout(20)
    try:
        while raw.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def test_thousands_of_idle_connections_cost_little_and_nobody_else_notices(
    held: contextlib.ExitStack, thread: LoopThread
) -> None:
    """2,000 to each port of a gateway process: requests are answered, and memory stays below 60 MB more."""
    upstream = TestUpstream()
    thread.run(upstream.start())
    patient = {"DIGITS_KEEP_ALIVE_S": "600", "DIGITS_HEADER_TIMEOUT_S": "600", "DIGITS_DRAIN_TIMEOUT_S": "1"}
    process = Process(upstream.target, **patient)
    try:
        process.wait_ready()
        import httpx

        before = psutil.Process(process.popen.pid).memory_info().rss
        ports = [int(address.rpartition(":")[2]) for address in (process.url, process.first["grpc"])]
        used = [connect(held, ports[0], HEAD + bytes(784)) for _ in range(IDLE // 2)]
        for raw in used:
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")
        for port in ports:
            for _ in range(IDLE // 2 if port == ports[0] else IDLE):
                connect(held, port)
        for _ in range(20):
            assert httpx.post(process.url + "/classify", content=bytes(784), timeout=20).status_code == 200
        assert psutil.Process(process.popen.pid).memory_info().rss - before < 60e6
        used[0].sendall(HEAD + bytes(784))
        assert used[0].recv(4096).startswith(b"HTTP/1.1 200 ")
    finally:
        process.popen.terminate()
        assert process.end() == 0
        thread.run(upstream.stop())


def test_idle_connections_are_closed_in_time(start: Callable[..., Here], held: contextlib.ExitStack) -> None:
    """Those that never said anything, and those that were used."""
    here = start(header_timeout_s=0.3, keep_alive_s=0.5)
    silent = connect(held, here.rest_port)
    used = connect(held, here.rest_port, HEAD + bytes(784))
    assert used.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert closed(silent)
    assert closed(used)


def test_connections_beyond_the_limit_are_closed_and_places_come_back(
    start: Callable[..., Here], held: contextlib.ExitStack
) -> None:
    """Those inside the limit go on; the refusals are counted."""
    here = start(max_connections=8)
    here.http.close()
    raws = [connect(held, here.rest_port) for _ in range(8)]
    eventually(lambda: len(here.running._rest.server_state.connections) == 8)
    assert closed(connect(held, here.rest_port))
    eventually(lambda: here.metric("digits_shed_total", reason="connections_full") >= 1)
    raws[0].sendall(HEAD + bytes(784))
    assert raws[0].recv(4096).startswith(b"HTTP/1.1 200 ")
    raws[1].close()

    def let_in() -> bool:
        raw = connect(held, here.rest_port, HEAD + bytes(784))
        with contextlib.suppress(ConnectionError):
            return raw.recv(4096).startswith(b"HTTP/1.1 200 ")
        return False

    eventually(let_in)


def test_the_limit_holds_for_grpc_too(start: Callable[..., Here], held: contextlib.ExitStack) -> None:
    """Calls on a connection that was there go on; a place that is left can be taken."""
    from serving.protos import digits_pb2 as pb

    here = start(max_connections=8)
    port = int(here.grpc_address.rpartition(":")[2])
    assert here.stub.Classify(pb.ClassifyRequest(image=bytes(784)), timeout=20).model_version == "3"
    connections = here.running._rpc._server.connections
    raws = [connect(held, port) for _ in range(8 - len(connections))]
    eventually(lambda: len(connections) == 8)
    assert closed(connect(held, port))
    assert here.metric("digits_shed_total", reason="connections_full") == 1
    assert here.stub.Classify(pb.ClassifyRequest(image=bytes(784)), timeout=20).model_version == "3"
    raws[0].close()
    eventually(lambda: len(connections) == 7)


def test_a_half_closed_client_gets_its_answer(here: Here, held: contextlib.ExitStack) -> None:
    """It has said all it will say, and still listens."""
    raw = connect(held, here.rest_port, HEAD + bytes(784))
    raw.shutdown(socket.SHUT_WR)
    assert raw.recv(4096).startswith((b"HTTP/1.1 200 ", b""))
    assert closed(raw)
    eventually(lambda: here.metric("digits_requests_in_flight", protocol="rest") == 0)


def test_half_closed_in_the_middle_of_a_request_leaves_nothing_behind(
    start: Callable[..., Here], held: contextlib.ExitStack
) -> None:
    """Cut off in its headers or its body, it is no request."""
    here = start()
    for sent in (HEAD[:30], HEAD + bytes(300)):
        raw = connect(held, here.rest_port, sent)
        raw.shutdown(socket.SHUT_WR)
        assert closed(raw)
    eventually(lambda: here.metric("digits_requests_in_flight", protocol="rest") == 0)
    assert here.behaviour.batches == []


def test_many_slow_senders_do_not_keep_others_waiting(start: Callable[..., Here], held: contextlib.ExitStack) -> None:
    """500 that drip a byte at a time into headers and bodies; all are cut off, and a quick client never sees them."""
    here = start(header_timeout_s=1.0, body_timeout_s=1.0)
    slow = [connect(held, here.rest_port, HEAD[: 20 + at % 10] if at % 2 else HEAD + b"x") for at in range(500)]
    dripping = list(slow)
    for _ in range(100):
        assert here.classify(bytes(784)).status_code == 200
        for raw in list(dripping):
            try:
                raw.send(b"x")
            except ConnectionError:
                dripping.remove(raw)
        if not dripping:
            break
    assert all(closed(raw) for raw in slow)
    eventually(lambda: here.metric("digits_requests_in_flight", protocol="rest") == 0)


def test_nonsense_and_silence_on_the_grpc_port_harm_nobody(
    start: Callable[..., Here], held: contextlib.ExitStack
) -> None:
    """Connections that speak no HTTP/2, or nothing, are closed in time; calls go on."""
    from serving.protos import digits_pb2 as pb

    here = start(header_timeout_s=0.5)
    port = int(here.grpc_address.rpartition(":")[2])
    raws = [connect(held, port, sent) for sent in (b"", HEAD, b"\0" * 5000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")]
    for _ in range(20):
        assert here.stub.Classify(pb.ClassifyRequest(image=bytes(784)), timeout=20).model_version == "3"
    assert all(closed(raw) for raw in raws)
