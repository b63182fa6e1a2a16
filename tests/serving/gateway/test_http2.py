"""The gRPC server's own HTTP/2: what a hostile, slow, strict or odd peer gets, by raw sockets and h2."""

import socket
import struct
import threading
import time
from collections.abc import Callable

import grpc
import h2.config
import h2.connection
import h2.events
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.protos import digits_pb2 as pb
from serving.protos import upstream_pb2
from serving.transport import http2
from serving.transport.http2 import PREFACE, frame, header
from tests.serving.gateway.conftest import Here, eventually, random_images
from tests.serving.gateway.upstream_server import expected_probabilities

CALL = (
    (":method", "POST"), (":scheme", "http"), (":path", "/digits.v1.Digits/Classify"), (":authority", "x"),
    ("te", "trailers"), ("content-type", "application/grpc"),
)  # fmt: skip
BLOCK = b"".join([header(name.encode(), value.encode()) for name, value in CALL])
GREETING = PREFACE + frame(http2.SETTINGS, 0, 0, b"")


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4) + message


def message(image: bytes = bytes(784)) -> bytes:
    return framed(pb.ClassifyRequest(image=image).SerializeToString())


def connect(here: Here) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(here.grpc_address.rpartition(":")[2])), timeout=30)


def frames_until_closed(client: socket.socket) -> list[tuple[int, int, int, bytes]]:
    """(kind, flags, stream, payload) of everything that comes until the server closes."""
    data = b""
    try:
        while piece := client.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return split(data)


def split(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    while len(data) >= 9:
        length = int.from_bytes(data[:3])
        found.append((data[3], data[4], int.from_bytes(data[5:9]), data[9 : 9 + length]))
        data = data[9 + length :]
    return found


def error_of(client: socket.socket) -> int:
    """The error code that the connection was ended with."""
    [goaway] = [one for one in frames_until_closed(client) if one[0] == http2.GOAWAY]
    return int.from_bytes(goaway[3][4:8])


class H2Client:
    """h2, an implementation of the protocol by others, on a socket."""

    def __init__(self, here: Here, **settings: int) -> None:
        self.socket = connect(here)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        if settings:
            self.h2.update_settings({h2.settings.SettingCodes[name]: value for name, value in settings.items()})
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def call(self, headers: tuple[tuple[str, str], ...], body: bytes) -> int:
        sid = self.h2.get_next_available_stream_id()
        self.h2.send_headers(sid, headers)
        while body:
            size = min(len(body), self.h2.local_flow_control_window(sid), self.h2.max_outbound_frame_size)
            if not size:
                self.flush()
                self.h2.receive_data(self.socket.recv(65536))
                continue
            self.h2.send_data(sid, body[:size])
            body = body[size:]
        self.h2.end_stream(sid)
        self.flush()
        return sid

    def answer(self, sid: int, *, acknowledge: bool = True) -> tuple[dict[str, str], bytes]:
        """Headers and trailers together, and the body; windows are given back as the body comes."""
        fields: dict[str, str] = {}
        body = b""
        while True:
            for event in self.h2.receive_data(self.socket.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    fields |= dict(event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data
                    if acknowledge:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded) and event.stream_id == sid:
                    self.flush()
                    return fields, body
            self.flush()


def check_classify(fields: dict[str, str], body: bytes, image: np.ndarray) -> None:
    assert (fields[":status"], fields["grpc-status"]) == ("200", "0")
    answer = pb.ClassifyResponse.FromString(body[5:])
    np.testing.assert_array_equal(np.float32(answer.probabilities), expected_probabilities(image[None])[0])


def test_another_implementation_understands_it(here: Here) -> None:
    """Many calls on one connection, each with its own answer; h2 checks every frame."""
    client = H2Client(here)
    images = random_images(40)
    sids = [
        client.call((*CALL, ("x-request-id", f"n{at}")), message(image.tobytes())) for at, image in enumerate(images)
    ]
    got: dict[int, tuple[dict[str, str], bytes]] = {}
    fields: dict[int, dict[str, str]] = {sid: {} for sid in sids}
    bodies = dict.fromkeys(sids, b"")
    while len(got) < len(sids):
        for event in client.h2.receive_data(client.socket.recv(65536)):
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                fields[event.stream_id] |= dict(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                bodies[event.stream_id] += event.data
            elif isinstance(event, h2.events.StreamEnded):
                got[event.stream_id] = fields[event.stream_id], bodies[event.stream_id]
    for at, (sid, image) in enumerate(zip(sids, images, strict=True)):
        check_classify(*got[sid], image)
        assert got[sid][0]["x-request-id"] == f"n{at}"
    client.socket.close()


def test_small_windows_are_kept_to(here: Here) -> None:
    """A client that takes 100 bytes at a time gets a whole answer of many times that; h2 refuses a byte too many."""
    client = H2Client(here, INITIAL_WINDOW_SIZE=100)
    count = 300
    request = upstream_pb2.PredictRequest()
    request.model_spec.name = "digits"
    tensor = request.inputs["images"]
    tensor.dtype = upstream_pb2.DT_UINT8
    for size in (count, 28, 28):
        tensor.tensor_shape.dim.add(size=size)
    images = random_images(count)
    tensor.tensor_content = images.tobytes()
    path = (":path", "/tensorflow.serving.PredictionService/Predict")
    headers = tuple(path if name == ":path" else (name, value) for name, value in CALL)
    fields, body = client.answer(client.call(headers, framed(request.SerializeToString())))
    assert fields["grpc-status"] == "0"
    answer = upstream_pb2.PredictResponse.FromString(body[5:]).outputs["probabilities"]
    values = np.frombuffer(answer.float_val or answer.tensor_content, np.float32).reshape(count, 10)
    np.testing.assert_array_equal(values, expected_probabilities(images))
    client.socket.close()


def test_a_call_in_single_bytes_is_put_together(here: Here) -> None:
    """Whatever pieces TCP makes of it."""
    image = random_images(1)[0]
    data = GREETING + frame(http2.HEADERS, http2.END_HEADERS, 1, BLOCK)
    data += frame(http2.DATA, http2.END_STREAM, 1, message(image.tobytes()))
    with connect(here) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(data)):
            client.sendall(data[at : at + 1])
        got = b""
        while b"grpc-status" not in got:
            got += client.recv(65536)
    [body] = [payload for kind, _, _, payload in split(got) if kind == http2.DATA]
    assert pb.ClassifyResponse.FromString(body[5:]).digit == image[0] % 10


def test_padding_priorities_and_continuations_are_understood(here: Here) -> None:
    """What no gRPC client sends, and HTTP/2 allows."""
    head = b"\x03" + bytes(5) + BLOCK[:20] + bytes(3)
    data = GREETING + frame(http2.HEADERS, http2.PADDED | http2.HAS_PRIORITY, 1, head)
    data += frame(http2.CONTINUATION, 0, 1, BLOCK[20:50]) + frame(http2.CONTINUATION, http2.END_HEADERS, 1, BLOCK[50:])
    data += frame(http2.PRIORITY, 0, 1, bytes(5)) + frame(0x77, 0, 0, b"unknown")
    data += frame(http2.DATA, http2.PADDED, 1, b"\x02" + message()[:100] + bytes(2))
    data += frame(http2.DATA, http2.END_STREAM, 1, message()[100:])
    with connect(here) as client:
        client.sendall(data)
        got = b""
        while b"grpc-status" not in got:
            got += client.recv(65536)
    assert [int.from_bytes(one[3][:2]) for one in split(got) if one[0] == http2.GOAWAY] == []
    [body] = [payload for kind, _, _, payload in split(got) if kind == http2.DATA]
    assert pb.ClassifyResponse.FromString(body[5:]).model_version == "3"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", http2.PROTOCOL_ERROR, id="HTTP/1"),
        pytest.param(PREFACE + b"\xff" * 20, http2.FRAME_SIZE_ERROR, id="huge frame"),
        pytest.param(GREETING + frame(http2.HEADERS, 4, 2, BLOCK), http2.PROTOCOL_ERROR, id="even stream"),
        pytest.param(GREETING + frame(http2.DATA, 0, 1, b"x"), http2.PROTOCOL_ERROR, id="data for no stream"),
        pytest.param(GREETING + frame(http2.HEADERS, 4, 1, b"\xff\xff\xff"), http2.COMPRESSION_ERROR, id="bad block"),
        pytest.param(GREETING + frame(http2.PUSH_PROMISE, 0, 1, b"1234"), http2.PROTOCOL_ERROR, id="push"),
        pytest.param(GREETING + frame(http2.PING, 0, 0, b"short"), http2.FRAME_SIZE_ERROR, id="short ping"),
        pytest.param(GREETING + frame(http2.CONTINUATION, 4, 1, b""), http2.PROTOCOL_ERROR, id="stray continuation"),
        pytest.param(
            GREETING + frame(http2.HEADERS, 0, 1, BLOCK) + frame(http2.PING, 0, 0, bytes(8)),
            http2.PROTOCOL_ERROR,
            id="ping amid headers",
        ),
        pytest.param(
            GREETING + frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31)),
            http2.FLOW_CONTROL_ERROR,
            id="window too large",
        ),
        pytest.param(
            GREETING + frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)),
            http2.FLOW_CONTROL_ERROR,
            id="window overflow",
        ),
        pytest.param(
            GREETING + frame(http2.HEADERS, 5, 1, BLOCK) + frame(http2.HEADERS, 5, 1, BLOCK),
            http2.PROTOCOL_ERROR,
            id="stream used twice",
        ),
        pytest.param(
            GREETING + frame(http2.HEADERS, 0, 1, b"") + frame(http2.CONTINUATION, 0, 1, bytes(16384)) * 5,
            http2.ENHANCE_YOUR_CALM,
            id="continuation flood",
        ),
        pytest.param(
            GREETING + frame(http2.HEADERS, 4, 1, b"\x40" + header(b"a", b"b" * 4000)[1:] + b"\xbe" * 12_000),
            http2.COMPRESSION_ERROR,
            id="header bomb",
        ),
        pytest.param(GREETING + frame(http2.PING, 0, 0, bytes(8)) * 3000, http2.ENHANCE_YOUR_CALM, id="ping flood"),
        pytest.param(GREETING + frame(http2.SETTINGS, 0, 0, b"") * 3000, http2.ENHANCE_YOUR_CALM, id="settings flood"),
        pytest.param(
            GREETING
            + b"".join(
                frame(http2.HEADERS, 4, sid, BLOCK) + frame(http2.RST_STREAM, 0, sid, bytes(4))
                for sid in range(1, 6001, 2)
            ),
            http2.ENHANCE_YOUR_CALM,
            id="rapid reset",
        ),
    ],
)
def test_what_breaks_the_protocol_or_a_limit_ends_its_connection(here: Here, sent: bytes, code: int) -> None:
    """With the code that says what it was; other connections notice nothing."""
    with connect(here) as client:
        sender = threading.Thread(target=_send_all, args=(client, sent))
        sender.start()
        assert error_of(client) == code
        sender.join()
    assert here.stub.Classify(pb.ClassifyRequest(image=bytes(784))).model_version == "3"
    eventually(lambda: here.metric("digits_requests_in_flight", protocol="grpc") == 0)


def _send_all(client: socket.socket, data: bytes) -> None:
    try:
        client.sendall(data)
    except OSError:
        return  # the server has closed already


def test_streams_over_the_limit_are_refused_and_the_rest_served(start: Callable[..., Here]) -> None:
    """REFUSED_STREAM tells a client that nothing was begun."""
    here = start()
    data = GREETING + b"".join(frame(http2.HEADERS, 4, sid, BLOCK) for sid in range(1, 2 * http2.MAX_STREAMS + 20, 2))
    data += frame(http2.DATA, http2.END_STREAM, 1, message())
    with connect(here) as client:
        client.sendall(data)
        got = b""
        while b"grpc-status" not in got:
            got += client.recv(65536)
    resets = [int.from_bytes(payload) for kind, _, _, payload in split(got) if kind == http2.RST_STREAM]
    assert resets == [http2.REFUSED_STREAM] * 10


@pytest.mark.parametrize("sent", [b"", PREFACE[:10], PREFACE, GREETING + frame(http2.HEADERS, 0, 1, BLOCK[:9])])
def test_a_slow_beginning_is_cut_off(start: Callable[..., Here], sent: bytes) -> None:
    """A connection that does not finish its preface, its settings or a header block."""
    here = start(header_timeout_s=0.2)
    with connect(here) as client:
        client.sendall(sent)
        assert error_of(client) == http2.PROTOCOL_ERROR


def test_a_slow_message_is_a_late_call(start: Callable[..., Here]) -> None:
    """The call ends, the connection stays."""
    here = start(body_timeout_s=0.2)
    client = H2Client(here)
    client.h2.send_headers(1, CALL)
    client.h2.send_data(1, message()[:100])
    client.flush()
    fields, _ = client.answer(1)
    assert fields["grpc-status"] == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    image = random_images(1)[0]
    check_classify(*client.answer(client.call(CALL, message(image.tobytes()))), image)
    client.socket.close()


def test_unfinished_messages_of_one_connection_are_bounded(start: Callable[..., Here]) -> None:
    """A client that begins ever more large messages is refused before they fill the memory."""
    here = start(max_body_bytes=1024 * 1024)
    client = H2Client(here)
    statuses: list[str] = []
    for _ in range(40):
        sid = client.h2.get_next_available_stream_id()
        client.h2.send_headers(sid, CALL)
        for _ in range(56):
            while client.h2.local_flow_control_window(sid) < 16_000:
                client.h2.receive_data(client.socket.recv(65536))
            client.h2.send_data(sid, b"\0" + (1_000_000).to_bytes(4) + bytes(15_995) if not _ else bytes(16_000))
        client.flush()
        client.socket.settimeout(0.02)
        try:
            events = client.h2.receive_data(client.socket.recv(65536))
            ends = [one for one in events if isinstance(one, h2.events.ResponseReceived | h2.events.TrailersReceived)]
            statuses += [dict(one.headers)["grpc-status"] for one in ends]
        except TimeoutError:
            continue
        finally:
            client.socket.settimeout(30)
        if statuses:
            break
    assert statuses[:1] == [str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])]
    client.socket.close()


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_packed_messages_are_unpacked(here: Here, compression: grpc.Compression) -> None:
    """What grpcio's clients send when told to compress."""
    image = np.zeros(784, np.uint8)
    image[:2] = 7, 9
    answer = here.stub.Classify(pb.ClassifyRequest(image=image.tobytes()), compression=compression)
    assert answer.digit == 7


def test_a_packed_bomb_is_refused(start: Callable[..., Here]) -> None:
    """It is unpacked no further than a message may be."""
    here = start(max_body_bytes=100_000)
    with pytest.raises(grpc.RpcError) as caught:
        here.stub.Classify(pb.ClassifyRequest(image=bytes(20_000_000)), compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("change", "status"),
    [({"content-type": "text/plain"}, "415"), ({":method": "GET"}, "405"), ({":path": "nothing"}, "405")],
)
def test_what_is_no_grpc_gets_an_http_status(here: Here, change: dict[str, str], status: str) -> None:
    """As the protocol asks of servers."""
    client = H2Client(here)
    fields, _ = client.answer(client.call(tuple({**dict(CALL), **change}.items()), b""))
    assert fields[":status"] == status
    client.socket.close()


@pytest.mark.parametrize(
    ("more", "body", "code"),
    [
        ((("grpc-timeout", "soon"),), message(), grpc.StatusCode.INTERNAL),
        ((("grpc-encoding", "br"),), message(), grpc.StatusCode.UNIMPLEMENTED),
        ((("x-long", "y" * 17_000),), message(), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ((), b"", grpc.StatusCode.UNIMPLEMENTED),
        ((), message() * 2, grpc.StatusCode.UNIMPLEMENTED),
        ((), message()[:-1], grpc.StatusCode.UNIMPLEMENTED),
        ((), b"\1" + message()[1:], grpc.StatusCode.INTERNAL),
        ((), b"\7" + message()[1:], grpc.StatusCode.INTERNAL),
        ((("grpc-encoding", "gzip"),), b"\1" + message()[1:], grpc.StatusCode.INTERNAL),
        ((), b"\0\x7f\xff\xff\xff", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_a_malformed_call_has_a_status_and_its_connection_stays(
    here: Here, more: tuple[tuple[str, str], ...], body: bytes, code: grpc.StatusCode
) -> None:
    """One call's fault is that call's alone."""
    client = H2Client(here)
    fields, _ = client.answer(client.call((*CALL, *more), body))
    assert fields["grpc-status"] == str(code.value[0])
    image = random_images(1)[0]
    check_classify(*client.answer(client.call(CALL, message(image.tobytes()))), image)
    client.socket.close()


def test_metadata_that_no_feature_knows_goes_by_the_general_way_with_the_same_answer(here: Here) -> None:
    """The direct way and the general way cannot be told apart."""
    for image in random_images(10):
        request = pb.ClassifyRequest(image=image.tobytes())
        direct, general = (
            here.stub.Classify(request, metadata=(("x-request-id", "same"), *more))
            for more in ((), (("x-other", "1"),))
        )
        assert direct == general


def test_a_drain_finishes_calls_under_way_and_takes_no_more(start: Callable[..., Here]) -> None:
    """A client in a loop sees good answers, then UNAVAILABLE; never a call that was accepted and lost."""
    here = start(drain_delay_s=0.1)
    here.behaviour.delay_s = 0.02
    codes: list[grpc.StatusCode] = []

    def client() -> None:
        while True:
            try:
                here.stub.Classify(pb.ClassifyRequest(image=bytes(784)), timeout=20)
                codes.append(grpc.StatusCode.OK)
            except grpc.RpcError as err:
                codes.append(err.code())
                return

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(codes) > 20)
    here.thread.run(here.running.drain())
    for thread in threads:
        thread.join(30)
    assert [code for code in codes if code is not grpc.StatusCode.OK] == [grpc.StatusCode.UNAVAILABLE] * 8


FRAMES = st.lists(
    st.builds(
        frame,
        st.integers(0, 12),
        st.integers(0, 255),
        st.sampled_from([0, 1, 1, 3, 5, 2, 2**31 - 1]),
        st.one_of(
            st.binary(max_size=40),
            st.just(BLOCK),
            st.just(message()),
            st.sampled_from([BLOCK[:30], BLOCK[30:], bytes(4), bytes(6), bytes(8), b"\x00\x04\x00\x00\x00\x01"]),
        ),
    ),
    max_size=12,
)


def check_survives(here: Here, sent: bytes) -> None:
    with connect(here) as client:
        client.settimeout(0.01)
        _send_all(client, sent)
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(65536):
                pass
        except OSError:
            pass


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(frames=FRAMES, greeted=st.booleans(), noise=st.binary(max_size=30))
def test_any_bytes_leave_the_server_whole(here: Here, frames: list[bytes], greeted: bool, noise: bytes) -> None:
    """Frames in any order with any flags, and noise: no defect is logged, nothing stays taken."""
    check_survives(here, (GREETING if greeted else b"") + b"".join(frames) + noise)
    assert here.log_lines("defect") == []


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(frames=FRAMES, greeted=st.just(value=True), noise=st.binary(max_size=30))
def test_many_more_of_any_bytes_leave_the_server_whole(
    here: Here, frames: list[bytes], greeted: bool, noise: bytes
) -> None:
    """The same for longer."""
    check_survives(here, (GREETING if greeted else b"") + b"".join(frames) + noise)
    assert here.log_lines("defect") == []


def test_after_all_that_it_serves(here: Here) -> None:
    """The gateway shared by the tests above answers as new."""
    time.sleep(0)
    assert here.stub.Classify(pb.ClassifyRequest(image=bytes(784))).model_version == "3"
    eventually(lambda: here.metric("digits_requests_in_flight", protocol="grpc") == 0)
    assert here.gateway.predictor.queued_images == 0


def test_a_connection_that_brings_a_lot_takes_turns_with_others(here: Here) -> None:
    """Its calls come in one piece of ten turns, all are answered, and a call of another connection meanwhile, too."""
    count = 10 * http2.TURN_BYTES // len(message())
    calls = b"".join(
        frame(http2.HEADERS, http2.END_HEADERS, 2 * at + 1, BLOCK)
        + frame(http2.DATA, http2.END_STREAM, 2 * at + 1, message())
        for at in range(count)
    )
    with connect(here) as client:
        client.sendall(GREETING + calls)
        assert here.stub.Classify(pb.ClassifyRequest(image=bytes(784)), timeout=30).model_version
        ended: set[int] = set()
        data = b""
        while len(ended) < count:
            piece = client.recv(1 << 20)
            assert piece, "the server closed"
            data += piece
            found = split(data)
            data = data[sum(9 + len(payload) for *_, payload in found) :]
            ended |= {sid for kind, flags, sid, _ in found if kind == http2.HEADERS and flags & http2.END_STREAM}
    assert ended == {2 * at + 1 for at in range(count)}
