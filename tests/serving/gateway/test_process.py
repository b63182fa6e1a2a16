"""`python -m serving.gateway` as a process: start, settings, ports, SIGTERM."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from serving.gateway.settings import BadSettings, read_settings
from serving.protos import digits_pb2 as pb
from serving.protos import digits_pb2_grpc
from tests.ports import free_port
from tests.serving.gateway.conftest import HANG_S, Here, LoopThread, eventually
from tests.serving.gateway.upstream_server import TestUpstream

ROOT = Path(__file__).resolve().parents[3]


def run(**settings: str) -> subprocess.CompletedProcess[str]:
    """The gateway, for cases in which it ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "serving.gateway"],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip


def _adopt_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Process:
    def __init__(
        self, upstream: str, *, new_session: bool = False, terminal: int | None = None, **settings: str
    ) -> None:
        environment = {
            **os.environ, "DIGITS_REST_PORT": "0", "DIGITS_GRPC_PORT": "0", "DIGITS_UPSTREAM": upstream, **settings,
        }  # fmt: skip
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "serving.gateway"],
            cwd=ROOT, env=environment, stdin=terminal, stdout=subprocess.PIPE, text=True, start_new_session=new_session,
            preexec_fn=_adopt_terminal if terminal is not None else None,
        )  # fmt: skip
        assert self.popen.stdout is not None
        self.first: dict[str, Any] = json.loads(self.popen.stdout.readline())
        self.url: str = self.first["rest"]
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(json.loads(line))

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]

    def wait_ready(self) -> None:
        eventually(lambda: httpx.get(self.url + "/readyz").status_code == 200)

    def end(self) -> int:
        code = self.popen.wait(HANG_S)
        self._reader.join(HANG_S)
        return code


@pytest.fixture
def upstream(thread: LoopThread) -> Iterator[TestUpstream]:
    server = TestUpstream()
    thread.run(server.start())
    yield server
    thread.run(server.stop())


@pytest.fixture
def process(upstream: TestUpstream) -> Iterator[Process]:
    started = Process(upstream.target, DIGITS_STATUS_POLL_S="0.05")
    try:
        started.wait_ready()
        yield started
    finally:
        if started.popen.poll() is None:
            started.popen.kill()
        started.end()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DIGITS_REST_PORT", "eighty", "integer"),
        ("DIGITS_GRPC_PORT", "70000", "65535"),
        ("DIGITS_UPSTREAM", "nowhere", "host:port"),
        ("DIGITS_UPSTREAM", "models:70000", "host:port"),
        ("DIGITS_UPSTREAM", "models..example:8500", "host:port"),
        ("DIGITS_TIMEOUT_S", "-1", "greater than 0"),
        ("DIGITS_LOG_FORMAT", "xml", "json"),
    ],
)
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    """The message names the variable, what it holds and what is expected."""
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings) as caught:
        read_settings()
    assert f"{name}='{value}'" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_settings_are_one_line_and_status_2() -> None:
    """Two at once are told at once."""
    ended = run(DIGITS_REST_PORT="eighty", DIGITS_TIMEOUT_S="0")
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert "DIGITS_REST_PORT" in line
    assert "DIGITS_TIMEOUT_S" in line


@pytest.mark.parametrize("name", ["DIGITS_REST_PORT", "DIGITS_GRPC_PORT"])
def test_a_port_in_use_is_one_line_and_status_1(name: str) -> None:
    """The line names the port and the setting that moves it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run(**{"DIGITS_REST_PORT": "0", "DIGITS_GRPC_PORT": "0", name: port})
    assert ended.returncode == 1
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("gateway: ")]
    assert port in line
    assert name in line
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("target", ["127.0.0.1:9", "dns:///no-such-host.invalid:8500", "unix:/no/such.sock"])
def test_a_model_server_out_of_reach_is_one_line_and_status_1_where_that_is_wished(target: str, workers: str) -> None:
    """The line names address, reason and setting. Without ``DIGITS_UPSTREAM_WAIT_S`` the gateway starts and waits."""
    ended = run(DIGITS_UPSTREAM=target, DIGITS_UPSTREAM_WAIT_S="0.3", DIGITS_REST_PORT="0", DIGITS_WORKERS=workers)
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"gateway: DIGITS_UPSTREAM='{target}': expected a model server there within 0.3 s (")
    assert ended.stdout == ""


def test_a_model_server_that_comes_in_time_lets_the_gateway_start(upstream: TestUpstream) -> None:
    """And the log says when there is one."""
    process = Process(upstream.target, DIGITS_UPSTREAM_WAIT_S="30", DIGITS_STATUS_POLL_S="0.05")
    try:
        process.wait_ready()
        eventually(lambda: "model_server_ready" in process.events())
    finally:
        process.popen.terminate()
        process.end()


def test_the_log_says_when_there_is_no_model_server() -> None:
    """Once, with the reason; the gateway goes on waiting."""
    process = Process("127.0.0.1:9", DIGITS_STATUS_POLL_S="0.05")
    try:
        eventually(lambda: "model_server_away" in process.events())
        [line] = [line for line in process.lines if line["event"] == "model_server_away"]
        assert "127.0.0.1:9" in line["reason"]
        assert httpx.get(process.url + "/healthz").status_code == 200
    finally:
        process.popen.terminate()
        process.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_idle_gateway_ends_with_status_0(process: Process, number: int) -> None:
    """Both signals drain; the last line says so."""
    process.popen.send_signal(number)
    assert process.end() == 0
    assert process.events()[-2:] == ["draining", "stopped"]


def test_a_hangup_ends_nothing_but_what_a_terminal_started(upstream: TestUpstream) -> None:
    """Without a terminal SIGHUP is ignored, with a word in the log; a terminal that closes drains."""
    process = Process(upstream.target, new_session=True)
    try:
        process.wait_ready()
        process.popen.send_signal(signal.SIGHUP)
        eventually(lambda: "hangup_ignored" in process.events())
        assert httpx.post(process.url + "/classify", content=bytes(784)).status_code == 200
    finally:
        process.popen.terminate()
        assert process.end() == 0
    ours, theirs = os.openpty()
    in_terminal = Process(upstream.target, new_session=True, terminal=theirs)
    os.close(theirs)
    try:
        in_terminal.wait_ready()
        os.close(ours)
        assert in_terminal.end() == 0
        assert in_terminal.events()[-2:] == ["draining", "stopped"]
    finally:
        in_terminal.popen.kill()


def test_sigterm_finishes_what_is_under_way_and_refuses_what_is_new(process: Process, upstream: TestUpstream) -> None:
    """Requests in flight over REST and gRPC when the signal comes get their answers; then the ports are closed."""
    upstream.behaviour.delay_s = 0.7
    answers: list[object] = []

    def rest() -> None:
        answers.append(httpx.post(process.url + "/classify", content=bytes(784), timeout=HANG_S).status_code)

    def rpc() -> None:
        with grpc.insecure_channel(process.first["grpc"]) as channel:
            stub = digits_pb2_grpc.DigitsStub(channel)
            answers.append(stub.Classify(pb.ClassifyRequest(image=bytes(784)), timeout=HANG_S).digit)

    workers = [threading.Thread(target=work) for work in [rest, rpc] * 5]
    for worker in workers:
        worker.start()
    eventually(lambda: upstream.behaviour.under_way)
    eventually(lambda: httpx.get(process.url + "/metrics").text.count('in_flight{protocol="rest"} 6.0'))
    process.popen.terminate()
    for worker in workers:
        worker.join()
    assert sorted(answers) == [0] * 5 + [200] * 5
    assert process.end() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(process.url + "/healthz")


def test_readiness_goes_off_before_the_doors_close(upstream: TestUpstream) -> None:
    """In the pause before the end, requests are answered still, /readyz says no, and connections are asked to leave."""
    process = Process(upstream.target, DIGITS_DRAIN_DELAY_S="1.0", DIGITS_STATUS_POLL_S="0.05")
    try:
        process.wait_ready()
        process.popen.terminate()
        eventually(lambda: httpx.get(process.url + "/readyz").status_code == 503)
        assert "shutting down" in httpx.get(process.url + "/readyz").json()["reason"]
        answer = httpx.post(process.url + "/classify", content=bytes(784))
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert process.end() == 0
    finally:
        process.popen.kill()


def test_a_drain_under_load_loses_no_accepted_request(process: Process, upstream: TestUpstream) -> None:
    """Clients that hammer on through SIGTERM see good answers, then a refused connection: never a cut one."""
    upstream.behaviour.delay_s = 0.005
    good, bad = [0], []
    stop = threading.Event()

    def hammer() -> None:
        is_new = True
        with httpx.Client(base_url=process.url, timeout=HANG_S) as client:
            while not stop.is_set():
                try:
                    answer = client.post("/classify", content=bytes(784))
                except httpx.ConnectError:
                    return
                except httpx.TransportError as err:
                    # A new connection may come to the listening socket's queue in the moment in which it closes: such
                    # a request was never accepted. httpx calls that a reset or, if sending met it first, a disconnect.
                    if not is_new:
                        bad.append(repr(err))
                    return
                is_new = answer.headers.get("connection") == "close"
                if answer.status_code == 200:
                    good[0] += 1
                else:
                    bad.append(answer.text)
                    return

    workers = [threading.Thread(target=hammer) for _ in range(4)]
    for worker in workers:
        worker.start()
    eventually(lambda: good[0] > 100)
    process.popen.terminate()
    for worker in workers:
        worker.join(HANG_S)
    stop.set()
    assert process.end() == 0
    assert bad == []
    # Nor is there one that it took and did not answer. (Asked too: whether it is ready.)
    taken = [line for line in process.lines if line["event"] == "request" and line["route"] == "/classify"]
    assert len(taken) == good[0]


WHOLE_REQUEST = b"POST /classify HTTP/1.1\r\nHost: digits\r\nContent-Length: 784\r\n\r\n" + bytes(784)


@pytest.mark.parametrize("sent", [0, len(WHOLE_REQUEST)], ids=["nothing", "whole"])
def test_a_drain_answers_connections_that_nobody_has_accepted_yet(start: Callable[..., Here], sent: int) -> None:
    """What waits in the listening socket's queue when the doors close has been connected: it gets its answers."""
    here = start()

    async def leave_with_five_in_the_queue() -> list[socket.socket]:
        clients = [socket.create_connection(("127.0.0.1", here.rest_port), timeout=HANG_S) for _ in range(5)]
        for client in clients:
            client.sendall(WHOLE_REQUEST[:sent])
        leaving.append(asyncio.create_task(here.running.retire()))
        await asyncio.sleep(0)
        return clients

    leaving: list[asyncio.Task[None]] = []
    for client in here.thread.run(leave_with_five_in_the_queue()):
        with client:
            client.sendall(WHOLE_REQUEST[sent:])
            answer = _all_of(client)
        assert answer.startswith(b"HTTP/1.1 200 ")
    here.thread.run(asyncio.wait_for(leaving[0], HANG_S))


@pytest.mark.parametrize(
    "sent", [0, 18, len(WHOLE_REQUEST) - 784, len(WHOLE_REQUEST) - 1], ids=["nothing", "line", "headers", "body"]
)
def test_a_drain_waits_for_a_request_that_is_on_its_way(process: Process, sent: int) -> None:
    """A connection that was accepted in time is answered though its request comes after the doors have closed."""
    host, _, port = process.url.rpartition("/")[2].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=HANG_S) as client:
        client.sendall(WHOLE_REQUEST[:sent])
        httpx.get(process.url + "/healthz")  # it accepts in order
        process.popen.terminate()
        eventually(lambda: _refuses(host, int(port)))
        threading.Event().wait(1.0)  # longer than connections in use are given to leave by themselves
        client.sendall(WHOLE_REQUEST[sent:])
        answer = _all_of(client)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer
    assert process.end() == 0


def _all_of(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def _refuses(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=HANG_S).close()
    except ConnectionRefusedError:
        return True
    return False


def test_killed_and_started_again_it_takes_its_ports_back(upstream: TestUpstream) -> None:
    """A crash leaves nothing that stops the next start on the same ports."""
    ports = {"DIGITS_REST_PORT": str(free_port()), "DIGITS_GRPC_PORT": str(free_port())}
    first = Process(upstream.target, **ports)
    first.wait_ready()
    with contextlib.suppress(httpx.TransportError):
        httpx.post(first.url + "/classify", content=bytes(784))
    first.popen.kill()
    first.end()
    again = Process(upstream.target, **ports)
    try:
        again.wait_ready()
        assert again.url == first.url
    finally:
        again.popen.terminate()
        assert again.end() == 0


def test_starting_prints_nothing_but_log_lines(process: Process) -> None:
    """Each line is one JSON object with an event, a level and a time."""
    httpx.post(process.url + "/classify", content=bytes(784))
    eventually(lambda: "request" in process.events())
    assert all({"event", "level", "time"} <= set(line) for line in [process.first, *process.lines])
