"""The main job on the real 70,000 images: from a fresh checkout to answers, over both protocols."""

import asyncio
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import aiohttp
import grpc
import numpy as np
import psutil
import pytest
from PIL import Image

from digits.contract import OUTPUT_DIGIT, OUTPUT_PROBABILITIES, SIGNATURE
from serving.protos import digits_pb2, digits_pb2_grpc
from tests.conftest import HANG_S, HTTP, running_below
from tests.stack.conftest import Stack, start_run, stop_run
from tests.stack.test_bad_requests import drawn_seven, encode

CONCURRENT = 32
FLOOR = 0.990


@pytest.fixture(scope="module")
def test_split(stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test images and labels, read from the raw files without our own reader."""
    images = np.frombuffer((stack.data_dir / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer((stack.data_dir / "t10k-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    return images.reshape(10_000, 28, 28), labels


@pytest.fixture(scope="module")
def model_answers(stack: Stack, test_split: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """What the published SavedModel itself says, loaded in this process without any of our code."""
    import tensorflow as tf

    (version,) = [p for p in stack.model_dir.iterdir() if p.name.isdecimal()]
    model = tf.saved_model.load(str(version))
    outputs = model.signatures[SIGNATURE](images=tf.constant(test_split[0]))
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def png(image: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


def test_rest_answers_all_10000_test_images_as_the_savedmodel_does(
    stack: Stack, test_split: tuple[np.ndarray, np.ndarray], model_answers: dict[str, np.ndarray]
) -> None:
    """Every test image, sent as a PNG: the label is the SavedModel's, probabilities are near, accuracy >= 99.0 %."""
    images, labels = test_split

    async def ask_all() -> list[dict]:
        gate = asyncio.Semaphore(CONCURRENT)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONCURRENT)) as session:

            async def ask(image: np.ndarray) -> dict:
                async with (
                    gate,
                    session.post(
                        stack.rest_url + "/classify", data=png(image), headers={"Content-Type": "image/png"}
                    ) as answer,
                ):
                    assert answer.status == 200, await answer.text()
                    return await answer.json()

            return await asyncio.gather(*map(ask, images))

    answers = asyncio.run(ask_all())
    digits = np.array([a["digit"] for a in answers])
    np.testing.assert_array_equal(digits, model_answers[OUTPUT_DIGIT])
    probabilities = np.array([a["probabilities"] for a in answers])
    np.testing.assert_allclose(probabilities, model_answers[OUTPUT_PROBABILITIES], atol=2e-3)
    assert {a["model_version"] for a in answers} == {"1"}
    assert (digits == labels).mean() >= FLOOR


def test_grpc_answers_all_10000_test_images_as_the_savedmodel_does(
    stack: Stack, test_split: tuple[np.ndarray, np.ndarray], model_answers: dict[str, np.ndarray]
) -> None:
    """Every test image as raw bytes over gRPC: the label is the SavedModel's, accuracy >= 99.0 %."""
    images, labels = test_split

    async def ask_all() -> list[digits_pb2.ClassifyResponse]:
        gate = asyncio.Semaphore(CONCURRENT)
        async with grpc.aio.insecure_channel(stack.grpc_address) as channel:
            stub = digits_pb2_grpc.DigitsStub(channel)

            async def ask(image: np.ndarray) -> digits_pb2.ClassifyResponse:
                async with gate:
                    return await stub.Classify(digits_pb2.ClassifyRequest(image=image.tobytes()), timeout=30)

            return await asyncio.gather(*map(ask, images))

    answers = asyncio.run(ask_all())
    digits = np.array([a.digit for a in answers])
    np.testing.assert_array_equal(digits, model_answers[OUTPUT_DIGIT])
    assert (digits == labels).mean() >= FLOOR


def test_tensorflow_serving_clients_can_ask_the_model_server_directly(
    stack: Stack, test_split: tuple[np.ndarray, np.ndarray], model_answers: dict[str, np.ndarray]
) -> None:
    """The served model answers TensorFlow Serving's own client library: a whole batch, the same probabilities."""
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name = "digits"
    request.inputs["images"].CopyFrom(tf.make_tensor_proto(test_split[0][:512]))
    with grpc.insecure_channel(stack.model_server_grpc) as channel:
        answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=30)
    probabilities = tf.make_ndarray(answer.outputs["probabilities"])
    np.testing.assert_allclose(probabilities, model_answers[OUTPUT_PROBABILITIES][:512], atol=2e-3)


def test_a_seven_by_curl_is_a_seven(stack: Stack, test_split: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """The README's command, with curl."""
    seven = tmp_path / "seven.png"
    seven.write_bytes(png(test_split[0][0]))
    answer = subprocess.run(
        ["curl", "-s", "--data-binary", f"@{seven}", "-H", "Content-Type: image/png", stack.rest_url + "/classify"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert json.loads(answer.stdout)["digit"] == 7


def test_the_published_version_says_where_it_came_from(stack: Stack) -> None:
    """Lineage names the commit, the data, the parameters, the metrics; warm-up requests lie beside it."""
    version = stack.model_dir / "1"
    lineage = json.loads((version / "assets.extra" / "lineage.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=stack.root, check=True, capture_output=True, text=True)
    assert commit.stdout.strip() in json.dumps(lineage)
    champion = json.loads((stack.root / "models" / "champion" / "champion.json").read_text())
    assert champion["version"] == 1
    assert lineage["model_sha256"] == champion["model_sha256"]
    assert (version / "assets.extra" / "tf_serving_warmup_requests").stat().st_size > 0


def test_after_a_release_dvc_has_nothing_to_do(stack: Stack) -> None:
    """The flow and `dvc repro` are interchangeable: what the flow built, DVC finds up to date."""
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json"], cwd=stack.root, env=stack.environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(status.stdout) == {}


def test_metrics_and_history_are_there_for_dvc(stack: Stack) -> None:
    """`dvc metrics show` reads the accuracy; the history has a row an epoch."""
    shown = subprocess.run(
        [sys.executable, "-m", "dvc", "metrics", "show", "--json"], cwd=stack.root, env=stack.environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "accuracy" in shown.stdout
    with (stack.root / "artifacts" / "train" / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2


def test_prometheus_sees_the_requests(stack: Stack) -> None:
    """After a request, the gateway's counters name its route and the model's version."""
    HTTP.post(stack.rest_url + "/classify", content=b"", headers={"Content-Type": "image/png"})
    text = HTTP.get(stack.rest_url + "/metrics").text
    assert "digits_request_duration_seconds_bucket" in text
    assert 'model_version="1"' in text


def test_ctrl_c_leaves_nothing_running_and_a_second_run_reuses_everything(stack: Stack) -> None:
    """Ctrl-C ends with 0 and no process left; started again, the stack serves version 1 without running a stage."""
    started = [process for process, _ in running_below(stack.process.pid)]
    assert started
    assert stop_run(stack.process) == 0
    _, left = psutil.wait_procs(started, timeout=HANG_S)
    assert left == []

    lines_before = len(stack.log.read_text().splitlines())
    stack.process = start_run(stack.root, stack.environment, stack.log)
    assert stack.wait_until_ready(limit_s=120)
    second_run = "\n".join(stack.log.read_text().splitlines()[lines_before:])
    assert "train" not in second_run
    answer = HTTP.post(stack.rest_url + "/classify", content=encode(drawn_seven())).json()
    assert (answer["digit"], answer["model_version"]) == (7, "1")
