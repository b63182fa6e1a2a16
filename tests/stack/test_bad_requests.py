"""Bad requests get their error, and nothing falls over: after each, the stack still reads a seven."""

import io
import struct
import zlib
from collections.abc import Callable

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from serving.protos import digits_pb2, digits_pb2_grpc
from tests.conftest import HTTP
from tests.stack.conftest import Stack


def drawn_seven(mode: str = "L", size: int = 280) -> Image.Image:
    """A seven in thick dark strokes on light paper."""
    image = Image.new("L", (size, size), 255)
    points = [(70, 60), (200, 60), (120, 230)]
    ImageDraw.Draw(image).line([(x * size // 280, y * size // 280) for x, y in points], fill=0, width=size // 12)
    return image.convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def animated_gif() -> bytes:
    frames = [drawn_seven().rotate(angle, fillcolor=255).convert("P") for angle in (0, 5, 10)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


def bomb(side: int = 20_000) -> bytes:
    """A valid PNG header that declares side x side pixels, in a few hundred kilobytes of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def blank_canvas() -> bytes:
    return encode(Image.new("RGBA", (280, 280), (255, 255, 255, 255)))


BAD: dict[str, tuple[Callable[[], bytes], set[tuple[int, str]]]] = {
    "empty body": (lambda: b"", {(400, "bad_image")}),
    "text": (lambda: b"this is not a picture", {(400, "bad_image")}),
    "truncated PNG": (lambda: encode(drawn_seven())[:200], {(400, "bad_image")}),
    "animated GIF": (animated_gif, {(400, "bad_image")}),
    "20,000 x 20,000 bomb": (bomb, {(413, "too_large")}),
    "50 MB": (lambda: bytes(50_000_000), {(413, "too_large")}),
    "blank canvas": (blank_canvas, {(400, "bad_image")}),
}


def assert_still_reads(stack: Stack) -> None:
    answer = HTTP.post(stack.rest_url + "/classify", content=encode(drawn_seven()))
    assert (answer.status_code, answer.json()["digit"]) == (200, 7)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_refused_over_rest_and_nothing_falls_over(stack: Stack, what: str) -> None:
    """The right status, the stable code, a message for people, the request id; never a traceback."""
    make, expected = BAD[what]
    try:
        answer = HTTP.post(
            stack.rest_url + "/classify", content=make(), headers={"Content-Type": "image/png"}, timeout=30
        )
    except httpx.WriteError:
        assert what == "50 MB"  # a server may refuse early and close while the client still sends
    else:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) in expected
        assert len(error["message"]) > 10
        assert "Traceback" not in answer.text
        assert error["request_id"] == answer.headers["x-request-id"]
    assert_still_reads(stack)


@pytest.mark.parametrize("what", [what for what in BAD if what != "50 MB"])
def test_a_bad_request_is_refused_over_grpc_and_nothing_falls_over(stack: Stack, what: str) -> None:
    """INVALID_ARGUMENT with a message for people; never a traceback."""
    make, _ = BAD[what]
    with grpc.insecure_channel(stack.grpc_address) as channel:
        stub = digits_pb2_grpc.DigitsStub(channel)
        with pytest.raises(grpc.RpcError) as refusal:
            stub.Classify(digits_pb2.ClassifyRequest(image=make()), timeout=30)
        assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "Traceback" not in refusal.value.details()
        still = stub.Classify(digits_pb2.ClassifyRequest(image=encode(drawn_seven())), timeout=30)
    assert still.digit == 7


def sixteen_bit() -> bytes:
    return encode(Image.fromarray(np.asarray(drawn_seven(), np.uint16) * 257))


def alpha() -> bytes:
    ink = Image.new("RGBA", (280, 280), (0, 0, 0, 0))
    ink.putalpha(drawn_seven().point(lambda grey: 255 - grey))
    return encode(ink)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: encode(drawn_seven("CMYK"), "JPEG"), id="CMYK JPEG"),
        pytest.param(sixteen_bit, id="16-bit PNG"),
        pytest.param(alpha, id="ink on transparency"),
    ],
)
def test_unusual_pictures_are_read_not_refused(stack: Stack, make: Callable[[], bytes]) -> None:
    """CMYK, 16-bit and alpha pictures hold a digit like any other."""
    answer = HTTP.post(stack.rest_url + "/classify", content=make())
    assert (answer.status_code, answer.json().get("digit")) == (200, 7)
