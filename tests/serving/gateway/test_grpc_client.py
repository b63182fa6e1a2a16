"""The gateway's own gRPC client before grpcio's servers, before ``h2`` as a strict peer, before what is no server."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.gateway.grpc_client import CallFailed, Channel
from serving.gateway.settings import split_target
from serving.transport import http2
from serving.transport.http2 import frame, header
from tests.serving.gateway.conftest import LoopThread

PATH = "/test.Echo/Say"
MAX_BYTES = 8 * 1024 * 1024
HANG_S = 20.0
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4) + message


class Peer(asyncio.Protocol):
    """One connection of a client to ``H2Server``; h2 raises at whatever the protocol forbids."""

    def __init__(self, server: "H2Server") -> None:
        self.server = server
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self.headers: dict[int, dict[str, str]] = {}
        self.bodies: dict[int, bytes] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.server.peers.append(self)
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=self.server.settings)
        self.h2.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        try:
            events = self.h2.receive_data(data)
        except Exception as err:
            self.server.broken.append(err)
            raise
        for event in events:
            self.on(event)
        self.flush()

    def on(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self.headers[event.stream_id], self.bodies[event.stream_id] = dict(event.headers), b""
            self.server.most = max(self.server.most, len(self.headers))
        elif isinstance(event, h2.events.DataReceived):
            self.bodies[event.stream_id] += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self.server.resets.append(event.error_code)
            self.headers.pop(event.stream_id, None)
        elif isinstance(event, h2.events.StreamEnded):
            self.server.asked.append(self.headers[event.stream_id])
            self.server.behave(self, event.stream_id)

    def answer(self, sid: int, message: bytes) -> None:
        del self.headers[sid]
        self.h2.send_headers(sid, ((":status", "200"), ("content-type", "application/grpc")))
        self.h2.send_data(sid, message)
        self.h2.send_headers(sid, (("grpc-status", "0"),), end_stream=True)
        self.flush()

    def echo(self, sid: int) -> None:
        self.answer(sid, self.bodies[sid])

    def flush(self) -> None:
        self.transport.write(self.h2.data_to_send())


class H2Server:
    """A server that does with each request as ``behave`` says."""

    def __init__(self, behave: Callable[[Peer, int], object] = Peer.echo, **settings: int) -> None:
        self.behave = behave
        self.settings = {h2.settings.SettingCodes[name]: value for name, value in settings.items()}
        self.peers: list[Peer] = []
        self.asked: list[dict[str, str]] = []
        self.resets: list[int] = []
        self.broken: list[Exception] = []
        self.most = 0

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Channel]:
        async with serving(lambda: Peer(self)) as target, opened(target) as channel:
            yield channel
        assert self.broken == []


@asynccontextmanager
async def serving(protocol: Callable[[], asyncio.Protocol]) -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@asynccontextmanager
async def opened(target: str) -> AsyncIterator[Channel]:
    channel = Channel(target, MAX_BYTES)
    try:
        yield channel
    finally:
        await channel.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(HANG_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is the other side's
            await asyncio.sleep(0.005)


async def failure(call: Awaitable[bytes]) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await call
    return caught.value


@pytest.fixture
def run(thread: LoopThread) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return thread.run


Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_messages_of_any_size_go_to_grpcios_server_and_back(run: Run, unix: bool, tmp_path: Path) -> None:
    """All at once, on one connection, beyond every window, each with its own answer and metadata."""

    async def say(request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("some", "thing"),))
        return dict(context.invocation_metadata())["x-size"].encode() + request

    async def talk() -> None:
        server = grpc.aio.server(options=(("grpc.max_receive_message_length", -1),))
        handler = grpc.unary_unary_rpc_method_handler(say)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Say": handler}),))
        target = f"unix:{tmp_path}/socket" if unix else "127.0.0.1:0"
        port = server.add_insecure_port(target)
        await server.start()
        messages = [bytes([at]) * size for at, size in enumerate([0, 1, 16_379, 16_380, 70_000, 1_000_000, 5_000_000])]
        async with opened(target if unix else f"127.0.0.1:{port}") as channel:
            calls = [channel.call(PATH, one, HANG_S, (("x-size", str(len(one))),)) for one in messages]
            answers = await asyncio.gather(*calls)
            assert len(channel.connections) == 1
        assert answers == [str(len(one)).encode() + one for one in messages]
        await server.stop(None)

    run(talk())


def test_small_windows_are_kept_to_and_given_back(run: Run) -> None:
    """A server that takes 100 bytes at a time gets all of many calls; it has a window again after each answer."""

    async def talk() -> None:
        server = H2Server(INITIAL_WINDOW_SIZE=100)
        async with server.channel() as channel:
            for _ in range(3):
                calls = [channel.call(PATH, bytes([at]) * 9_000, HANG_S) for at in range(20)]
                assert await asyncio.gather(*calls) == [framed(bytes([at]) * 9_000)[5:] for at in range(20)]

    run(talk())


def test_no_more_calls_at_once_than_the_server_allows(run: Run) -> None:
    """The others wait for their turn; one whose time ends meanwhile is late and never sent."""

    async def talk() -> None:
        held: list[tuple[Peer, int]] = []
        server = H2Server(lambda peer, sid: held.append((peer, sid)), MAX_CONCURRENT_STREAMS=2)
        async with server.channel() as channel:
            await asyncio.gather(failure(channel.call(PATH, b"first", 0.05)))
            held.clear()
            calls = [asyncio.ensure_future(channel.call(PATH, b"%d" % at, HANG_S)) for at in range(6)]
            await until(lambda: len(held) == 2)
            late = await failure(channel.call(PATH, b"late", 0.05))
            assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
            for _ in range(3):
                await until(lambda: len(held) == 2)
                while held:
                    peer, sid = held.pop()
                    peer.echo(sid)
            assert await asyncio.gather(*calls) == [b"%d" % at for at in range(6)]
        assert server.most == 2

    run(talk())


def test_a_goaway_finishes_what_was_begun_and_sends_the_rest_elsewhere(run: Run) -> None:
    """Calls beyond the last that the server has begun are sent again on a new connection; nobody fails."""

    async def talk() -> None:
        held: list[tuple[Peer, int]] = []

        def behave(peer: Peer, sid: int) -> None:
            if len(server.peers) > 1:
                peer.echo(sid)
                return
            held.append((peer, sid))
            if len(held) == 3:
                peer.h2.close_connection(last_stream_id=1)
                peer.transport.write(peer.h2.data_to_send())

        server = H2Server(behave)
        async with server.channel() as channel:
            calls = [asyncio.ensure_future(channel.call(PATH, b"%d" % at, HANG_S)) for at in range(3)]
            await asyncio.wait(calls[1:])
            assert not calls[0].done()
            peer, sid = held[0]
            block = b"\x88" + header(b"content-type", b"application/grpc")
            peer.transport.write(http2.header_frame(sid, block, end=False) + frame(http2.DATA, 0, sid, framed(b"0")))
            peer.transport.write(http2.header_frame(sid, header(b"grpc-status", b"0"), end=True))
            assert await asyncio.gather(*calls) == [b"0", b"1", b"2"]
            assert len(server.peers) == 2
            await until(lambda: len(channel.connections) == 1)

    run(talk())


def test_a_refused_stream_is_sent_again_but_not_for_ever(run: Run) -> None:
    """The server has not begun it, so nobody need know; after three times it is UNAVAILABLE."""

    async def talk() -> None:
        refusals = [0]

        def behave(peer: Peer, sid: int) -> None:
            if refusals[0]:
                refusals[0] -= 1
                peer.headers.pop(sid)
                peer.h2.reset_stream(sid, h2.errors.ErrorCodes.REFUSED_STREAM)
            else:
                peer.echo(sid)

        server = H2Server(behave)
        async with server.channel() as channel:
            refusals[0] = 2
            assert await channel.call(PATH, b"again", HANG_S) == b"again"
            refusals[0] = 3
            assert (await failure(channel.call(PATH, b"no", HANG_S))).code is UNAVAILABLE
            assert await channel.call(PATH, b"fine", HANG_S) == b"fine"
            assert len(server.peers) == 1

    run(talk())


def _headers(*fields: tuple[str, str], then: bytes | None = None) -> Callable[[Peer, int], None]:
    def behave(peer: Peer, sid: int) -> None:
        peer.headers.pop(sid)
        peer.h2.send_headers(sid, fields, end_stream=then is None)
        if then is not None:
            peer.h2.send_data(sid, then, end_stream=True)

    return behave


def _message(body: bytes) -> Callable[[Peer, int], None]:
    return lambda peer, sid: peer.answer(sid, body)


def _reset(code: int) -> Callable[[Peer, int], None]:
    return lambda peer, sid: (peer.headers.pop(sid), peer.h2.reset_stream(sid, code))


@pytest.mark.parametrize(
    ("behave", "code", "words"),
    [
        (_headers((":status", "200"), ("grpc-status", "3"), ("grpc-message", "no%21")), "INVALID_ARGUMENT", "no!"),
        (_headers((":status", "200"), ("grpc-status", "99")), "UNKNOWN", ""),
        (_headers((":status", "200")), "UNKNOWN", "without a status"),
        (_headers((":status", "200"), then=framed(b"x")), "UNKNOWN", "without a status"),
        (_headers((":status", "503"), ("content-type", "text/html"), then=b"<h1>"), "UNAVAILABLE", "503"),
        (_headers((":status", "404")), "UNIMPLEMENTED", "404"),
        (_headers((":status", "302")), "UNKNOWN", "302"),
        (_reset(http2.INTERNAL_ERROR), "INTERNAL", "error 2"),
        (_reset(http2.CANCEL), "CANCELLED", "error 8"),
        (_reset(http2.ENHANCE_YOUR_CALM), "RESOURCE_EXHAUSTED", "error 11"),
        (_message(b""), "INTERNAL", "one message"),
        (_message(framed(b"a") + framed(b"b")), "INTERNAL", "one message"),
        (_message(b"\1" + framed(b"packed")[1:]), "INTERNAL", "one message"),
        (lambda peer, _: peer.transport.abort(), "UNAVAILABLE", "lost"),
    ],
    ids=[
        "status", "unknown status", "none", "data at the end", "503", "404", "302", "internal", "cancel", "calm",
        "no message", "two", "packed", "connection lost",
    ],
)  # fmt: skip
def test_each_bad_end_has_its_status(run: Run, behave: Callable[[Peer, int], None], code: str, words: str) -> None:
    """As gRPC's documents say; the next call goes all the same."""

    async def talk() -> None:
        server = H2Server(behave)
        async with server.channel() as channel:
            found = await failure(channel.call(PATH, b"x", HANG_S))
            assert (found.code.name, words in found.details) == (code, True)
            server.behave = Peer.echo
            assert await channel.call(PATH, b"fine", HANG_S) == b"fine"

    run(talk())


def test_an_answer_over_the_limit_is_refused(run: Run) -> None:
    """It is not gathered to its end."""

    async def talk() -> None:
        async def say(_: bytes, __: Any) -> bytes:
            return bytes(MAX_BYTES + 1)

        server = grpc.aio.server(options=(("grpc.max_send_message_length", -1),))
        handler = grpc.unary_unary_rpc_method_handler(say)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Say": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with opened(f"127.0.0.1:{port}") as channel:
            found = await failure(channel.call(PATH, b"", HANG_S))
            assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        await server.stop(None)

    run(talk())


def test_a_deadline_and_a_caller_that_leaves_are_told_to_the_server(run: Run) -> None:
    """The time that is left goes with the call; at its end, or when nobody waits any more, the stream is reset."""

    async def talk() -> None:
        server = H2Server(lambda peer, sid: None)  # noqa: ARG005 - it never answers
        async with server.channel() as channel:
            found = await failure(channel.call(PATH, b"", 0.05))
            assert found.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert server.asked[0]["grpc-timeout"] == "50m"
            await until(lambda: server.resets == [http2.CANCEL])
            call = asyncio.ensure_future(channel.call(PATH, b"", HANG_S))
            await until(lambda: len(server.asked) == 2)
            call.cancel()
            await until(lambda: server.resets == [http2.CANCEL] * 2)
            assert call.cancelled()
            server.behave = Peer.echo
            assert await channel.call(PATH, b"fine", HANG_S) == b"fine"
            assert len(server.peers) == 1

    run(talk())


def test_a_server_that_says_nothing_holds_a_call_until_its_deadline_and_no_longer(run: Run) -> None:
    """A connection counts only once the server has spoken."""

    async def talk() -> None:
        async with serving(asyncio.Protocol) as target, opened(target) as channel:
            assert (await failure(channel.call(PATH, b"", 0.1))).code is grpc.StatusCode.DEADLINE_EXCEEDED

    run(talk())


def test_without_a_server_calls_fail_at_once_and_find_it_when_it_is_there(run: Run) -> None:
    """Nobody waits for a server that is not there, and nothing has to be started again when it is."""

    async def talk() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            async with opened(f"127.0.0.1:{port}") as channel:
                found = await failure(channel.call(PATH, b"", HANG_S))
                assert found.code is UNAVAILABLE
                assert "refused" in found.details.lower()
                taken.close()
                server = H2Server()
                listening = await asyncio.get_running_loop().create_server(lambda: Peer(server), "127.0.0.1", port)
                await until(lambda: server.peers)
                assert await channel.call(PATH, b"back", HANG_S) == b"back"
                listening.close()

    run(talk())


class Named(Channel):
    """A channel whose name has the addresses that a test says."""

    def __init__(self, targets: list[str]) -> None:
        super().__init__("dns:///models:8500", MAX_BYTES)
        self.targets = targets

    async def _look_up_name(self) -> list[tuple[str, int]]:
        return [split_target(target)[:2] for target in self.targets]


def test_calls_take_turns_over_the_addresses_of_a_name(run: Run) -> None:
    """All that answer are used; one that goes is left out, one that the name gains is taken up, and no call fails."""

    async def talk() -> None:
        servers = [H2Server() for _ in range(3)]
        async with (
            serving(lambda: Peer(servers[0])) as one,
            serving(lambda: Peer(servers[1])) as two,
            serving(lambda: Peer(servers[2])) as three,
        ):
            channel = Named([one, two])

            async def used(times: int) -> list[int]:
                before = [len(server.asked) for server in servers]
                for _ in range(times):
                    assert await channel.call(PATH, b"x", HANG_S) == b"x"
                return [len(server.asked) - count for server, count in zip(servers, before, strict=True)]

            await used(1)
            await until(lambda: all(server.peers for server in servers[:2]))
            await asyncio.sleep(0.05)
            assert await used(10) == [5, 5, 0]
            channel.targets = [two, three]
            servers[0].peers[-1].transport.abort()
            await until(lambda: servers[2].peers)
            await asyncio.sleep(0.05)
            assert await used(10) == [0, 5, 5]
            await channel.close()
        assert servers[0].asked[0][":authority"] == "models:8500"

    run(talk())


def test_a_name_that_does_not_exist_is_unavailable(run: Run) -> None:
    """With the resolver's words."""

    async def talk() -> None:
        async with opened("nobody.invalid:1") as channel:
            found = await failure(channel.call(PATH, b"", HANG_S))
            assert found.code is UNAVAILABLE
            assert "cannot be resolved" in found.details

    run(talk())


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("models:8500", ("models", 8500, "")),
        ("dns:///models:8500", ("models", 8500, "")),
        ("[::1]:8500", ("::1", 8500, "")),
        ("unix:/run/m.sock", ("localhost", 0, "/run/m.sock")),
        ("unix:///run/m.sock", ("localhost", 0, "/run/m.sock")),
    ],
)
def test_targets_are_written_as_grpc_writes_them(target: str, parts: tuple[str, int, str]) -> None:
    """What is no target is refused where settings are read."""
    assert split_target(target) == parts


class Noise(asyncio.Protocol):
    """A server that says what it was given, and goes."""

    def __init__(self, said: bytes) -> None:
        self.said = said

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        transport.write(frame(http2.SETTINGS, 0, 0, b""))  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if PATH.encode() in data:
            self.transport.write(self.said)
            self.transport.close()


_FRAMES = st.builds(
    frame, st.integers(0, 12), st.integers(0, 255), st.sampled_from([0, 1, 1, 2, 3]), st.binary(max_size=40)
)


@settings(max_examples=150, deadline=None)
@given(frames=st.lists(_FRAMES, max_size=6), noise=st.binary(max_size=30))
def test_whatever_a_server_says_a_call_ends_with_a_status(
    thread: LoopThread, frames: list[bytes], noise: bytes
) -> None:
    """No frame, in or out of order, makes the client hang, or raise anything but a failed call."""

    async def talk() -> None:
        loop = asyncio.get_running_loop()
        surprises: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: surprises.append(context))
        try:
            async with serving(lambda: Noise(b"".join(frames) + noise)) as target, opened(target) as channel:
                [ended] = await asyncio.gather(channel.call(PATH, b"x", HANG_S), return_exceptions=True)
                assert isinstance(ended, bytes | CallFailed)
                assert getattr(ended, "code", None) is not grpc.StatusCode.DEADLINE_EXCEEDED
        finally:
            loop.set_exception_handler(None)
        assert surprises == []

    thread.run(talk())
