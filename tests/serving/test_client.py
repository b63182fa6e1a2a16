"""The Python client and its command line, before a real gateway."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import numpy as np
import pytest

from digits.errors import BadImage, ModelUnavailable, Overloaded, TooLarge
from serving.client import LONGEST_PAUSE_S, GatewayError, GatewayUnreachable, GrpcClient, RestClient
from serving.gateway.auth import key_line, make_key
from tests.serving.gateway.conftest import Here, LoopThread, eventually, random_images, start_gateway, stop_gateway
from tests.serving.gateway.pictures import bomb_png, png, stroke
from tests.serving.gateway.upstream_server import expected_probabilities

ROOT = Path(__file__).resolve().parents[2]

Client = RestClient | GrpcClient


@pytest.fixture(scope="module")
def here() -> Here:
    started = start_gateway(LoopThread())
    yield started
    stop_gateway(started)


KEY, SLOW_KEY = make_key(), make_key()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Here:
    """A gateway that asks for keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{key_line('quick', KEY)}\n{key_line('slow', SLOW_KEY, '2/day')}\n")
    started = start_gateway(LoopThread(), api_keys_file=keys)
    yield started
    stop_gateway(started)


@pytest.fixture(params=["REST", "gRPC"])
def connect(request: pytest.FixtureRequest, here: Here) -> Callable[..., Client]:
    def make(**options: object) -> Client:
        return RestClient(here.url, **options) if request.param == "REST" else GrpcClient(here.grpc_address, **options)

    return make


def test_both_clients_read_digits(connect: Callable[..., Client]) -> None:
    """Raw images and pictures; the same facts over both protocols."""
    with connect() as client:
        for image in random_images(5):
            found = client.classify(image.tobytes())
            assert found.digit == image[0] % 10
            np.testing.assert_array_equal(np.float32(found.probabilities), expected_probabilities(image[None])[0])
            assert found.model_version == "3"
            assert found.request_id
        assert client.classify(png(stroke())).digit == 0


@pytest.mark.parametrize(
    ("body", "kind"), [(b"hello", BadImage), (bomb_png(), TooLarge), (bytes(11_000_000), TooLarge)]
)
def test_errors_are_the_gateways_own_classes(
    connect: Callable[..., Client], body: bytes, kind: type[Exception]
) -> None:
    """What the gateway refused is refused at once: no retry."""
    with connect() as client, pytest.raises(kind):
        client.classify(body)


def test_what_may_pass_is_tried_again(connect: Callable[..., Client], here: Here) -> None:
    """A model server that comes back within the attempts is not noticed."""
    here.behaviour.abort = (grpc.StatusCode.UNAVAILABLE, "")

    def mend() -> None:
        here.behaviour.abort = None

    timer = threading.Timer(0.3, mend)
    timer.start()
    with connect(attempts=10) as client:
        assert client.classify(bytes(784)).digit == 0
    timer.join()


def test_after_the_last_attempt_the_error_is_told(connect: Callable[..., Client], here: Here) -> None:
    """And not before the given number of attempts."""
    here.behaviour.abort = (grpc.StatusCode.UNAVAILABLE, "")
    with connect(attempts=1) as client, pytest.raises(ModelUnavailable):
        client.classify(bytes(784))
    here.behaviour.abort = None


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: RestClient("http://127.0.0.1:9", attempts=1), id="REST"),
        pytest.param(lambda: GrpcClient("127.0.0.1:9", attempts=1), id="gRPC"),
    ],
)
def test_no_gateway_is_said_plainly(make: Callable[[], Client]) -> None:
    """With the address that was tried."""
    with make() as client, pytest.raises(GatewayUnreachable, match=r"127\.0\.0\.1:9"):
        client.classify(bytes(784))


class _SomethingElse(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


def test_something_else_at_the_address_is_said_plainly() -> None:
    """An answer that is not a gateway's is not guessed at."""
    server = HTTPServer(("127.0.0.1", 0), _SomethingElse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with RestClient(url, attempts=1) as client, pytest.raises(GatewayError, match="is it one"):
        client.classify(bytes(784))
    server.shutdown()
    server.server_close()


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving.client", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def address(request: pytest.FixtureRequest, here: Here) -> list[str]:
    return ["--grpc", "--address", here.grpc_address] if request.param == "gRPC" else ["--url", here.url]


@pytest.mark.parametrize("address", ["REST", "gRPC"], indirect=True)
def test_the_command_line_reads_files_in_their_order(tmp_path: Path, address: list[str]) -> None:
    """One line a file: its name, its digit, how sure, which model."""
    files = []
    for at, image in enumerate(random_images(12)):
        image[0] = at % 10
        files.append(tmp_path / f"{at}.raw")
        files[-1].write_bytes(image.tobytes())
    ended = cli("classify", *map(str, files), *address)
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("\t") for line in ended.stdout.splitlines()]
    assert [(row[0], row[1]) for row in rows] == [(str(file), str(at % 10)) for at, file in enumerate(files)]
    assert all(row[3] == "model 3" for row in rows)


def test_an_answer_better_not_used_is_marked(tmp_path: Path) -> None:
    """By both clients and both outputs of the command line; one that may be used bears no mark."""
    images = random_images(2)
    images[:, 1] = [0, 255]  # read with 50 % and 100 %
    files = [tmp_path / "unsure.raw", tmp_path / "sure.raw"]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(image.tobytes())
    started = start_gateway(LoopThread(), unsure_below=0.9)
    try:
        for client in (RestClient(started.url), GrpcClient(started.grpc_address)):
            with client:
                assert [client.classify(image.tobytes()).unsure for image in images] == [True, False]
        lines = cli("classify", *map(str, files), "--url", started.url).stdout.splitlines()
        facts = cli("classify", *map(str, files), "--url", started.url, "--json").stdout.splitlines()
    finally:
        stop_gateway(started)
    assert [line.split("\t")[4:] for line in lines] == [["unsure"], []]
    assert [json.loads(line).get("unsure") for line in facts] == [True, None]


@pytest.mark.parametrize("address", ["REST", "gRPC"], indirect=True)
def test_the_command_line_speaks_json_and_tells_failures_by_file(tmp_path: Path, address: list[str]) -> None:
    """A bad file does not stop the others; the exit status is 1."""
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(png(stroke()))
    bad.write_bytes(b"hello")
    ended = cli("classify", str(good), str(bad), str(tmp_path / "none.png"), "--json", *address)
    assert ended.returncode == 1
    one, two, three = map(json.loads, ended.stdout.splitlines())
    assert (one["digit"], one["model_version"], len(one["probabilities"])) == (0, "3", 10)
    assert (two["file"], two["error"]["code"]) == (str(bad), "bad_image")
    assert "none.png" in three["file"]
    assert "error" in three
    assert "Traceback" not in ended.stderr


def test_the_command_line_without_a_gateway_says_so_in_one_line(tmp_path: Path) -> None:
    """The address is in it."""
    file = tmp_path / "one.raw"
    file.write_bytes(bytes(784))
    ended = cli("classify", str(file), "--url", "http://127.0.0.1:9", "--attempts", "1")
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert "127.0.0.1:9" in line


def test_the_gateway_is_not_hurt_by_its_clients_leaving(here: Here) -> None:
    """Nothing is under way at the end."""
    eventually(lambda: here.metric("digits_requests_in_flight", protocol="rest") == 0)


@pytest.mark.parametrize("address", ["REST", "gRPC"], indirect=True)
def test_a_folder_is_read_file_by_file_with_a_key(tmp_path: Path, address: list[str], guarded: Here) -> None:
    """Batch mode: the files right in it, in the order of their names; the key comes from the environment."""
    for at, image in enumerate(random_images(5)):
        image[0] = at
        (tmp_path / f"{at}.raw").write_bytes(image.tobytes())
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    to = ["--grpc", "--address", guarded.grpc_address] if "--grpc" in address else ["--url", guarded.url]
    ended = cli("classify", str(tmp_path), *to, DIGITS_API_KEY=KEY)
    assert ended.returncode == 0, ended.stderr
    assert [line.split("\t")[1] for line in ended.stdout.splitlines()] == ["0", "1", "2", "3", "4"]
    ended = cli("classify", str(tmp_path), *to)
    assert ended.returncode == 1
    assert ended.stderr.count("API key") == 5


def test_a_pause_that_is_too_long_is_not_waited_for(connect: Callable[..., Client], guarded: Here) -> None:
    """A rate that is used up for the hour is told at once."""
    client = (
        RestClient(guarded.url, api_key=SLOW_KEY)
        if isinstance(connect(), RestClient)
        else GrpcClient(guarded.grpc_address, api_key=SLOW_KEY)
    )
    with client:
        for _ in range(2):
            with contextlib.suppress(Overloaded):
                client.classify(bytes(784))
        with pytest.raises(Overloaded) as caught:
            client.classify(bytes(784))
    assert caught.value.retry_after_s > LONGEST_PAUSE_S
