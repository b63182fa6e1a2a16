"""REST: what is read, every error row, bodies that are bad or slow, ids, documents, the page."""

import asyncio
import http.client
import re
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from digits.image import read_digit
from serving.gateway.schema import ROUTES, ClassifyAnswer, ErrorAnswer, Readiness
from tests.serving.gateway.conftest import Here, eventually, random_images
from tests.serving.gateway.pictures import animated_gif, bomb_png, encode, png, stroke, truncated_png
from tests.serving.gateway.upstream_server import expected_probabilities


def check_digit(answer: httpx.Response, image_u8: np.ndarray) -> None:
    assert answer.status_code == 200, answer.text
    found = ClassifyAnswer.model_validate_json(answer.content, strict=True)
    expected = expected_probabilities(image_u8.reshape(1, 784))[0]
    assert found.digit == int(image_u8.ravel()[0]) % 10
    np.testing.assert_array_equal(np.float32(found.probabilities), expected)
    assert np.float32(found.confidence) == expected.max()
    assert found.model_version == "3"
    assert found.request_id == answer.headers["x-request-id"]


def check_error(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    error = ErrorAnswer.model_validate_json(answer.content, strict=True).error
    assert error.code == code
    assert error.request_id == answer.headers["x-request-id"]
    assert "Traceback" not in error.message
    return error.message


def test_raw_bytes_are_read_as_they_are(here: Here) -> None:
    """784 bytes of application/octet-stream are a canonical image: nothing is done to them."""
    for image in random_images(20):
        check_digit(here.classify(image.tobytes()), image)


def test_a_picture_is_read_whether_its_type_is_declared_or_not(here: Here) -> None:
    """image/*, none, octet-stream, and what curl says when told nothing: the bytes decide."""
    image = stroke()
    for kind in ("image/png", "IMAGE/PNG; q=1", None, "application/octet-stream", "application/x-www-form-urlencoded"):
        check_digit(here.classify(png(image), kind), image)


def test_large_pictures_come_through_the_same_reading_as_small_ones(here: Here) -> None:
    """A photograph-sized JPEG is decoded in a thread; what reaches the model is what digits.image makes of it."""
    grey = 255 - stroke(900)
    photo = encode(Image.fromarray(np.repeat(grey[..., None], 3, axis=2)), "JPEG")
    check_digit(here.classify(photo, "image/jpeg"), read_digit(photo))


def test_a_multipart_field_is_read(here: Here) -> None:
    """As browsers and `curl -F image=@…` send it, other fields beside it."""
    image = stroke()
    answer = here.http.post("/classify", files={"image": ("one.png", png(image), "image/png"), "note": ("", b"hello")})
    check_digit(answer, image)


def test_a_body_that_comes_in_pieces_is_put_together(here: Here) -> None:
    """Chunked, and with pauses."""
    image = random_images(1)[0]

    def pieces() -> Iterator[bytes]:
        for at in range(0, 784, 100):
            time.sleep(0.01)
            yield image[at : at + 100].tobytes()

    answer = here.http.post("/classify", content=pieces(), headers={"content-type": "application/octet-stream"})
    check_digit(answer, image)


BLANK = png(np.full((100, 100), 255, np.uint8))


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        pytest.param(b"", "image/png", 400, "bad_image", id="empty"),
        pytest.param(b"", None, 400, "bad_image", id="empty, undeclared"),
        pytest.param(b"hello", "image/png", 400, "bad_image", id="text called a picture"),
        pytest.param(b"hello", "text/plain", 415, "unsupported_media_type", id="text"),
        pytest.param(b"{}", "application/json", 415, "unsupported_media_type", id="JSON"),
        pytest.param(b"x" * 783, "application/octet-stream", 400, "bad_image", id="a byte too few"),
        pytest.param(b"x" * 785, "application/octet-stream", 400, "bad_image", id="a byte too many"),
        pytest.param(truncated_png(), "image/png", 400, "bad_image", id="truncated PNG"),
        pytest.param(animated_gif(), "image/gif", 400, "bad_image", id="animated GIF"),
        pytest.param(bomb_png(), "image/png", 413, "too_large", id="20,000 x 20,000 bomb"),
        pytest.param(BLANK, "image/png", 400, "bad_image", id="blank canvas"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(776), "application/octet-stream", 400, "bad_image", id="784 of PNG"),
    ],
)
def test_a_bad_body_is_refused_before_the_model_is_called(
    here: Here, body: bytes, kind: str | None, status: int, code: str
) -> None:
    """Each gets its own status and code, and the model server sees nothing of it."""
    message = check_error(here.classify(body, kind), status, code)
    assert len(message) > 10
    assert here.behaviour.batches == []
    check_digit(here.classify(bytes(784)), np.zeros(784, np.uint8))


def _multipart(*parts: tuple[str, bytes], end: bytes = b"--xx--\r\n") -> bytes:
    body = b""
    for name, data in parts:
        body += b'--xx\r\nContent-Disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + data + b"\r\n"
    return body + end


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (_multipart(("image", png(stroke()))), "multipart/form-data"),
        (_multipart(("picture", png(stroke()))), "multipart/form-data; boundary=xx"),
        (_multipart(("image", b"a"), ("image", b"b")), "multipart/form-data; boundary=xx"),
        (_multipart(("image", png(stroke())), end=b""), "multipart/form-data; boundary=xx"),
        (b"no multipart at all", "multipart/form-data; boundary=xx"),
        (b"", "multipart/form-data; boundary=xx"),
        (b"--xx\r\n" + b"h" * 100_000, "multipart/form-data; boundary=xx"),
        (_multipart(("image", b"a")), "multipart/form-data; boundary=" + "x" * 2000),
    ],
    ids=["no boundary", "other field", "two images", "cut off", "text", "empty", "endless header", "endless boundary"],
)
def test_malformed_multipart_is_a_bad_request(here: Here, body: bytes, kind: str) -> None:
    """It says what was wrong with the form rather than with a picture."""
    check_error(here.classify(body, kind), 400, "bad_request")


def test_a_body_over_the_limit_is_refused_unread(here: Here) -> None:
    """50 MB declared: 413 before they have come."""
    connection = http.client.HTTPConnection("127.0.0.1", here.rest_port, timeout=30)
    connection.putrequest("POST", "/classify")
    connection.putheader("content-length", "50000000")
    connection.endheaders(b"first bytes")
    answer = connection.getresponse()
    assert answer.status == 413
    assert b"too_large" in answer.read()
    connection.close()


def test_a_client_that_sends_50_mb_all_the_same_can_read_its_refusal(here: Here) -> None:
    """What comes after the refusal is read and dropped, so that the answer is not lost in a reset; chunked too."""
    check_error(here.classify(bytes(50_000_000), "image/png"), 413, "too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield bytes(1_000_000)

    check_error(here.http.post("/classify", content=chunks(), headers={"content-type": "image/png"}), 413, "too_large")
    check_digit(here.classify(bytes(784)), np.zeros(784, np.uint8))


def test_a_slow_body_is_cut_off(start: Callable[..., Here]) -> None:
    """A client that drips its body gets 408, then loses its connection if it goes on."""
    here = start(body_timeout_s=0.3)
    with socket.create_connection(("127.0.0.1", here.rest_port), timeout=30) as client:
        client.sendall(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 784\r\n\r\n")
        answer = b""
        while b"request_timeout" not in answer:
            client.sendall(b"x")
            client.settimeout(0.1)
            try:
                answer += client.recv(65536)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")
        with pytest.raises(OSError):  # noqa: PT012 - some write or read after the cut
            for _ in range(600):
                client.sendall(b"x")
                time.sleep(0.05)
    assert here.metric("digits_requests_in_flight", protocol="rest") == 0


@pytest.mark.parametrize("sent", [b"", b"POST /classify HT", b"POST /classify HTTP/1.1\r\nhost: x\r\nx-a:"])
def test_slow_headers_are_cut_off(start: Callable[..., Here], sent: bytes) -> None:
    """A connection that never finishes its headers, or never begins, is closed."""
    here = start(header_timeout_s=0.3)
    with socket.create_connection(("127.0.0.1", here.rest_port), timeout=30) as client:
        client.sendall(sent)
        assert client.recv(1) == b""


def test_keep_alive_serves_many_requests_on_one_connection(here: Here) -> None:
    """Time limits of one request do not leak into the next."""
    connection = http.client.HTTPConnection("127.0.0.1", here.rest_port, timeout=30)
    for image in random_images(50):
        connection.request("POST", "/classify", image.tobytes(), {"content-type": "application/octet-stream"})
        assert connection.getresponse().read().startswith(b'{"digit":%d' % (image[0] % 10))
    connection.close()


def test_pipelined_requests_are_answered_in_order(here: Here) -> None:
    """Two requests in one write: two answers, the first first."""
    head = (
        b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\ncontent-length: 784\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", here.rest_port), timeout=30) as client:
        client.sendall(head + bytes([4]) * 784 + head + bytes([5]) * 784)
        answer = b""
        while answer.count(b'"digit"') < 2:
            answer += client.recv(65536)
    assert re.findall(rb'"digit":(\d)', answer) == [b"4", b"5"]


def test_overload_is_refused_with_429_and_when_to_come_back(start: Callable[..., Here]) -> None:
    """With one call held and the queue full, the next request is refused at once; nothing waits without end."""
    here = start(max_upstream_calls=1, max_queue_images=1)

    async def flood() -> list[httpx.Response]:
        here.behaviour.hold = asyncio.Event()
        async with httpx.AsyncClient(base_url=here.url, timeout=30) as client:
            post = client.post
            headers = {"content-type": "application/octet-stream"}
            held = [asyncio.create_task(post("/classify", content=bytes(784), headers=headers))]
            while not here.behaviour.under_way:  # noqa: ASYNC110 - the server knows no events
                await asyncio.sleep(0.001)
            held.append(asyncio.create_task(post("/classify", content=bytes(784), headers=headers)))
            while not here.gateway.predictor.queued_images:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            more = (post("/classify", content=bytes(784), headers=headers) for _ in range(5))
            refused = await asyncio.gather(*more)
            here.behaviour.hold.set()
            return [*refused, *await asyncio.gather(*held)]

    *refused, first, second = here.thread.run(flood())
    assert (first.status_code, second.status_code) == (200, 200)
    for answer in refused:
        check_error(answer, 429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    assert here.metric("digits_shed_total", reason="queue_full") == 5


def test_a_model_that_does_not_answer_in_time_is_504(start: Callable[..., Here]) -> None:
    """The wait is bounded by the gateway's own time limit."""
    here = start(timeout_s=0.1)
    here.behaviour.delay_s = 10
    check_error(here.classify(bytes(784)), 504, "deadline_exceeded")


def test_a_client_that_hangs_up_frees_its_place(start: Callable[..., Here]) -> None:
    """It is not sent upstream and is not counted as waiting."""
    here = start(max_upstream_calls=1)

    async def hold() -> None:
        here.behaviour.hold = asyncio.Event()

    here.thread.run(hold())
    request = b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 784\r\n\r\n" + bytes(784)
    clients = [socket.create_connection(("127.0.0.1", here.rest_port)) for _ in range(3)]
    for client in clients:
        client.sendall(request)
    eventually(lambda: here.gateway.predictor.queued_images == 2 or len(here.behaviour.batches) == 1)
    eventually(lambda: here.metric("digits_requests_in_flight", protocol="rest") == 3)
    for client in clients:
        client.close()
    eventually(lambda: here.metric("digits_requests_in_flight", protocol="rest") == 0)
    assert here.gateway.predictor.queued_images == 0
    eventually(lambda: [line["code"] for line in here.log_lines() if line["route"] == "/classify"] == ["499"] * 3)


def test_too_many_pictures_to_decode_are_refused(start: Callable[..., Here]) -> None:
    """Decoding has a bounded queue of its own."""
    here = start(max_waiting_decodes=1, decode_threads=1)
    photo = png(np.random.default_rng(3).integers(0, 256, (900, 900), np.uint8))

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=here.url, timeout=30) as client:
            return await asyncio.gather(*(client.post("/classify", content=photo) for _ in range(8)))

    codes = [answer.status_code for answer in here.thread.run(flood())]
    assert 429 in codes
    assert here.metric("digits_shed_total", reason="decodes_full") == codes.count(429)
    eventually(lambda: here.metric("digits_decodes_in_flight") == 0)


def test_unknown_routes_and_wrong_methods(here: Here) -> None:
    """404, 405 with Allow."""
    check_error(here.http.get("/nothing"), 404, "not_found")
    answer = here.http.get("/classify")
    check_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert here.http.delete("/healthz").headers["allow"] == "GET, HEAD"


def test_a_defect_is_an_internal_error_and_its_text_is_for_the_log(start: Callable[..., Here]) -> None:
    """Nothing of the exception reaches the client; the traceback is logged under the request's id."""
    here = start()

    def broken(_: bytes) -> bytes:
        raise RuntimeError("secret inner workings")

    here.gateway.pictures.read_at_once = broken  # type: ignore[method-assign]
    answer = here.classify(bytes(784), **{"x-request-id": "find-me"})
    assert check_error(answer, 500, "internal") == "internal error"
    [line] = here.log_lines("defect")
    assert line["request_id"] == "find-me"
    assert "secret inner workings" in line["exception"]


@pytest.mark.parametrize("sent", ["abc", "0af7651916cd43dd8448eb211c80319c", "a/b:c@d=e+f.g_h-i", "x" * 128])
def test_a_sane_request_id_is_kept(here: Here, sent: str) -> None:
    """It comes back in the header and the body, and in the log."""
    answer = here.classify(bytes(784), **{"x-request-id": sent})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == sent
    eventually(lambda: sent in here.log_text())


@pytest.mark.parametrize("sent", ["", "x" * 129, "two words", 'quote"', "<script>", "é", "-dash"])
def test_an_unsound_request_id_is_replaced(here: Here, sent: str) -> None:
    """No client writes what it likes into headers and logs."""
    answer = here.classify(bytes(784), **{"x-request-id": sent.encode()})
    assert re.fullmatch("[0-9a-f]{20}", answer.headers["x-request-id"])


def test_ids_differ(here: Here) -> None:
    """A request without an id gets one of its own."""
    assert len({here.http.get("/healthz").headers["x-request-id"] for _ in range(50)}) == 50


def test_head_answers_as_get_without_a_body(here: Here) -> None:
    """Balancers ask so."""
    answer = here.http.head("/healthz")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(here.http.get("/healthz").content))


def test_the_openapi_document_holds_what_the_routes_are(here: Here) -> None:
    """Every listed route is in it and nothing else; every model that it refers to is there; the answers match it."""
    document = here.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(route.method, route.path) for route in ROUTES if route.listed}
    text = here.http.get("/openapi.json").text
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in document["components"]["schemas"]
    for route in ROUTES:
        if "{" not in route.path and route.path != "/":
            answer = here.http.request(route.method, route.path, content=bytes(784))
            assert answer.status_code in {200, *route.errors}, route.path
    Readiness.model_validate_json(here.http.get("/readyz").content, strict=True)


def test_the_docs_page_needs_nothing_from_elsewhere(here: Here) -> None:
    """It names every route, and no address but its own."""
    page = here.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/classify" in page.text
    assert "/readyz" in page.text
    for address in re.findall(r'(?:src|href)="?([^"> ]+)', page.text):
        assert address.startswith(("/", "#"))
        if address.startswith("/"):
            assert here.http.get(address).status_code == 200


def test_pages_carry_a_strict_content_policy(here: Here) -> None:
    """Scripts and styles come from the gateway alone; no framing, no sniffing, no referrer."""
    headers = here.http.get("/docs").headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"


def test_static_files_never_leave_their_folder(here: Here) -> None:
    """Paths are looked up, not opened."""
    for path in ("/static/../rest.py", "/static/%2e%2e/rest.py", "/static//etc/passwd", "/static/", "/static/nothing"):
        with socket.create_connection(("127.0.0.1", here.rest_port), timeout=30) as client:
            client.sendall(b"GET " + path.encode() + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 404")


def test_the_page_is_served_with_an_entity_tag(here: Here) -> None:
    """A browser that has it already is told so."""
    first = here.http.get("/")
    assert first.status_code == 200
    assert first.headers["content-type"].startswith("text/html")
    again = here.http.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_nonsense_instead_of_http_is_400(here: Here) -> None:
    """The parser refuses; the server lives."""
    with socket.create_connection(("127.0.0.1", here.rest_port), timeout=30) as client:
        client.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 400")
    assert here.http.get("/healthz").status_code == 200
