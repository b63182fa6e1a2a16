"""API keys and rates: who is let in, over which protocol, what is told, what is never told."""

import time
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.gateway.auth import key_line, make_key, read_keys
from serving.gateway.schema import ROUTES
from serving.gateway.settings import BadSettings, Settings
from serving.protos import digits_pb2 as pb
from tests.serving.gateway.conftest import Here
from tests.serving.gateway.test_process import run

ALICE, BOB = make_key(), make_key()
IMAGE = bytes(784)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# who\n\n{key_line('alice', ALICE)}\n{key_line('bob', BOB, '3/hour')}\n")
    return file


@pytest.fixture
def here(start: Callable[..., Here], keys_file: Path) -> Here:
    return start(api_keys_file=keys_file)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def classify(here: Here, **headers: str) -> httpx.Response:
    return here.http.post("/classify", content=IMAGE, headers=headers)


def rpc_error(here: Here, metadata: tuple[tuple[str, str], ...] = ()) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        here.stub.Classify(pb.ClassifyRequest(image=IMAGE), metadata=metadata)
    return caught.value


def test_a_known_key_is_let_in_in_every_spelling(here: Here) -> None:
    """Authorization or x-api-key, over REST and gRPC; the log names its owner and never the key."""
    assert classify(here, **bearer(ALICE)).status_code == 200
    assert classify(here, authorization=f"bearer  {ALICE}").status_code == 200
    assert classify(here, **{"x-api-key": ALICE}).status_code == 200
    for metadata in ((("authorization", f"Bearer {ALICE}"),), (("x-api-key", ALICE),)):
        assert here.stub.Classify(pb.ClassifyRequest(image=IMAGE), metadata=metadata).model_version == "3"
    requests = [pb.ClassifyRequest(image=IMAGE)] * 3
    answers = list(here.stub.ClassifyStream(iter(requests), metadata=(("x-api-key", ALICE),)))
    assert [one.answer.model_version for one in answers] == ["3"] * 3
    lines = [line for line in here.log_lines() if line["route"] in ("/classify", "Classify", "ClassifyStream")]
    assert [line["caller"] for line in lines] == ["alice"] * 6
    assert ALICE not in here.log_text()


@pytest.mark.parametrize(
    "headers",
    [
        {}, bearer("wrong"), {"authorization": "Bearer"}, {"authorization": ALICE}, {"authorization": f"Basic {ALICE}"},
        {"x-api-key": "wrong"}, {"x-api-key": ""}, bearer(ALICE[:-1]), bearer(ALICE + "x"), bearer("\xe4\xff"),
    ],
)  # fmt: skip
def test_without_a_known_key_there_is_no_answer_and_no_work(here: Here, headers: dict[str, str]) -> None:
    """401 with a challenge and UNAUTHENTICATED, in words that do not repeat what was sent; the model sees nothing."""
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = here.http.post("/classify", content=IMAGE, headers=raw)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert "wrong" not in answer.text
    if all(value.isascii() for value in headers.values()):
        err = rpc_error(here, tuple(headers.items()))
        assert err.code() is grpc.StatusCode.UNAUTHENTICATED
        assert dict(err.trailing_metadata())["x-error-code"] == "unauthenticated"
    assert here.behaviour.batches == []
    assert "wrong" not in here.log_text()


def test_a_stream_without_a_key_ends_at_once(here: Here) -> None:
    """Before its first request is read."""
    with pytest.raises(grpc.RpcError) as caught:
        list(here.stub.ClassifyStream(iter([pb.ClassifyRequest(image=IMAGE)])))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_all_that_reaches_the_model_is_guarded_and_the_rest_is_open(here: Here) -> None:
    """Every route of the table: health, metrics, documents and the page answer, all others ask for a key."""
    opened = set()
    for route in ROUTES:
        path = route.path.replace("{version}", "3").replace("{label}", "stable").replace("{rest}", "page.js")
        answer = here.http.request(route.method, path, content=IMAGE if route.method == "POST" else None)
        assert (answer.status_code == 401) == route.guarded, (route.method, path, answer.status_code)
        if not route.guarded:
            opened.add(route.path)
    assert opened == {
        "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs.css", "/", "/static/{rest}",
        "/v2/health/live", "/v2/health/ready",
    }  # fmt: skip
    assert here.behaviour.batches == []
    health_pb2_grpc.HealthStub(here.channel).Check(health_pb2.HealthCheckRequest())
    for method in ("/tensorflow.serving.PredictionService/Predict", "/inference.GRPCInferenceService/ModelInfer"):
        with pytest.raises(grpc.RpcError) as caught:
            here.channel.unary_unary(method)(b"")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_body_is_not_read_for_a_caller_without_a_key(here: Here) -> None:
    """The refusal comes though only the head of a large upload was sent."""
    import socket

    with socket.create_connection(("127.0.0.1", here.rest_port)) as raw:
        raw.sendall(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\r\n")
        raw.settimeout(10)
        assert raw.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_a_key_has_its_own_rate(here: Here) -> None:
    """The fourth in the hour is refused with the time to wait, over either protocol; others are not touched."""
    assert [classify(here, **bearer(BOB)).status_code for _ in range(3)] == [200] * 3
    answer = classify(here, **bearer(BOB))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert 1 <= int(answer.headers["retry-after"]) <= 3600
    err = rpc_error(here, (("x-api-key", BOB),))
    assert err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(err.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    assert classify(here, **bearer(ALICE)).status_code == 200
    assert here.metric("digits_shed_total", reason="rate_limited") == 2


def test_without_keys_a_rate_is_each_addresses(start: Callable[..., Here]) -> None:
    """Counted over both protocols together; probes and pages are free."""
    here = start(rate_limit="4/hour")
    assert [classify(here).status_code for _ in range(2)] == [200] * 2
    requests = iter([pb.ClassifyRequest(image=IMAGE)] * 4)
    kinds = [one.WhichOneof("result") for one in here.stub.ClassifyStream(requests)]
    assert kinds == ["answer"] * 2 + ["error"] * 2
    assert classify(here).status_code == 429
    assert [here.http.get(path).status_code for path in ("/readyz", "/metrics", "/")] == [200] * 3


def test_a_rate_recovers(start: Callable[..., Here]) -> None:
    """Its window slides."""
    here = start(rate_limit="2/second")
    assert [classify(here).status_code for _ in range(2)] == [200] * 2
    deadline = time.monotonic() + 20
    while classify(here).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("alice\n", "line 1"),
        (f"alice:{ALICE}\n", "line 1"),
        (f"\n#\nal ice:{'0' * 64}\n", "line 3"),
        (f"alice:{'0' * 64}\nalice:{'1' * 64}\n", "twice"),
        (f"alice:{'0' * 64}:often\n", "100/second"),
    ],
    # A key is drawn anew in each process, and pytest's workers have to agree on the tests' names.
    ids=["no hash", "a key instead of its hash", "a space in the name", "a name twice", "no rate"],
)
def test_a_damaged_file_of_keys_is_refused_and_its_lines_are_not_shown(tmp_path: Path, text: str, part: str) -> None:
    """Somebody may have put a key there."""
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(BadSettings, match=part) as caught:
        read_keys(file)
    assert ALICE not in str(caught.value)


def test_required_keys_that_are_missing_stop_the_start(tmp_path: Path) -> None:
    """One line and status 2: no file, or one without a key."""
    empty = tmp_path / "keys"
    empty.write_text("# none\n")
    for settings in ({}, {"DIGITS_API_KEYS_FILE": str(empty)}):
        ended = run(DIGITS_REQUIRE_KEYS="true", DIGITS_REST_PORT="0", DIGITS_GRPC_PORT="0", **settings)
        assert ended.returncode == 2
        [line] = ended.stderr.splitlines()
        assert "DIGITS_API_KEYS_FILE" in line


def test_open_to_all_is_said(start: Callable[..., Here], keys_file: Path) -> None:
    """A gateway that other machines reach without a key warns; with keys, or on this machine only, it does not."""
    assert start(host="0.0.0.0").log_lines("open_to_all")
    assert not start(host="0.0.0.0", api_keys_file=keys_file).log_lines("open_to_all")
    assert not start().log_lines("open_to_all")


def test_make_key_makes_a_line_that_lets_its_key_in(tmp_path: Path) -> None:
    """The key on standard error, once; the line, with no key in it, on standard output."""
    import subprocess
    import sys

    from tests.serving.gateway.test_process import ROOT

    command = [sys.executable, "-m", "serving.gateway", "make-key", "carol"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    key = made.stderr.split()[-1]
    assert key not in made.stdout
    assert made.stdout.strip() == key_line("carol", key)
    again = subprocess.run([*command, "--stdin"], cwd=ROOT, input=key, capture_output=True, text=True, timeout=60)
    assert again.stdout == made.stdout


@pytest.mark.parametrize("rate", ["often", "1/fortnight", "-1/second", "1/second;x"])
def test_a_rate_that_is_none_is_refused(rate: str) -> None:
    """With an example of one."""
    with pytest.raises(ValueError, match="100/second"):
        Settings(rate_limit=rate)
