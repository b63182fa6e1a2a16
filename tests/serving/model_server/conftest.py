"""Tiny SavedModels with the contract's signatures, and real server processes that serve them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.ports import free_ports

REPOSITORY = Path(__file__).parents[3]


def export_tiny(path: Path, version: int) -> None:
    """Write a model whose ``digit`` is always its version, whose probabilities depend on image and version."""
    import tensorflow as tf

    class Tiny(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            rng = np.random.default_rng(version)
            self.weights = tf.Variable(rng.normal(0, 0.01, (784, 10)).astype(np.float32))
            self.bias = tf.Variable(np.eye(10, dtype=np.float32)[version % 10] * 3)

        @tf.function(input_signature=[tf.TensorSpec([None, 28, 28], tf.uint8, name="images")])
        def serving_default(self, images: Any) -> Any:
            flat = tf.reshape(tf.cast(images, tf.float32) / 255.0, [-1, 784])
            probabilities = tf.nn.softmax(flat @ self.weights + self.bias)
            return {"probabilities": probabilities, "digit": tf.argmax(probabilities, -1)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
        def encoded(self, image_bytes: Any) -> Any:
            def decode(encoded: Any) -> Any:
                return tf.ensure_shape(tf.io.decode_png(encoded, channels=1)[..., 0], [28, 28])

            return self.serving_default(tf.map_fn(decode, image_bytes, fn_output_signature=tf.uint8))

        @tf.function(
            input_signature=[
                tf.TensorSpec([None], kind, name=name)
                for name, kind in {
                    "f16": tf.float16, "f32": tf.float32, "f64": tf.float64, "i8": tf.int8, "i32": tf.int32,
                    "i64": tf.int64, "u8": tf.uint8, "u32": tf.uint32, "flag": tf.bool, "text": tf.string,
                }.items()
            ]
        )  # fmt: skip
        def echo(self, f16, f32, f64, i8, i32, i64, u8, u32, flag, text) -> Any:
            values = {
                "f16": f16, "f32": f32, "f64": f64, "i8": i8, "i32": i32, "i64": i64, "u8": u8, "u32": u32,
                "flag": flag, "text": text, "text_bytes": text,
            }  # fmt: skip
            return {f"{name}": tf.identity(value) for name, value in values.items()}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, name="steps")])
        def slow(self, steps: Any) -> Any:
            square = tf.eye(64)
            for _ in tf.range(steps):
                square = square @ square
            return {"sum": tf.reduce_sum(square), "steps": steps}

    module = Tiny()
    signatures = {name: getattr(module, name) for name in ("serving_default", "encoded", "echo", "slow")}
    tf.saved_model.save(module, str(path), signatures=signatures)


def export_classic(path: Path, tags: list[str]) -> None:
    """Write a TensorFlow 1 SavedModel over examples with ``x`` (two floats) and, if given, ``bias`` (one float).

    It labels by the sign of ``x[0] + x[1] + bias``; its score for ``plus`` is their sigmoid, its value their sum.
    """
    import tensorflow as tf

    v1 = tf.compat.v1
    methods = v1.saved_model.signature_constants
    with tf.Graph().as_default(), v1.Session() as session:
        serialized = v1.placeholder(tf.string, [None], name="examples")
        features = v1.parse_example(
            serialized,
            {
                "x": v1.FixedLenFeature([2], tf.float32),
                "bias": v1.FixedLenFeature([], tf.float32, default_value=0.0),
            },
        )
        weight = v1.get_variable("weight", initializer=[1.0, 1.0])
        total = tf.reduce_sum(features["x"] * weight, axis=1) + features["bias"]
        scores = tf.stack([tf.sigmoid(-total), tf.sigmoid(total)], axis=1)
        classes = tf.tile([["minus", "plus"]], [tf.shape(total)[0], 1])
        plain = v1.placeholder(tf.float32, [None, 2], name="plain")

        def signature(method: str, inputs: Any, **outputs: Any) -> Any:
            info = v1.saved_model.build_tensor_info
            return v1.saved_model.build_signature_def(
                {"inputs": info(inputs)}, {name: info(tensor) for name, tensor in outputs.items()}, method
            )

        signatures = {
            "serving_default": signature(methods.CLASSIFY_METHOD_NAME, serialized, classes=classes, scores=scores),
            "only_classes": signature(methods.CLASSIFY_METHOD_NAME, serialized, classes=classes),
            "only_scores": signature(methods.CLASSIFY_METHOD_NAME, serialized, scores=scores),
            "regress": signature(methods.REGRESS_METHOD_NAME, serialized, outputs=total),
            "regress_column": signature(methods.PREDICT_METHOD_NAME, serialized, outputs=total[:, None]),
            "regress_pair": signature(methods.REGRESS_METHOD_NAME, serialized, outputs=scores),
            "flat_scores": signature(methods.CLASSIFY_METHOD_NAME, serialized, scores=total),
            "plain": signature(methods.PREDICT_METHOD_NAME, plain, outputs=tf.reduce_sum(plain * weight, axis=1)),
        }
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.builder.SavedModelBuilder(str(path))
        builder.add_meta_graph_and_variables(session, tags, signature_def_map=signatures)
        builder.save()


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Version number → an exported SavedModel that answers with that digit. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("exports")
    paths = {version: folder / f"export-{version}" for version in (1, 2, 3)}
    for version, path in paths.items():
        export_tiny(path, version)
    return paths


@pytest.fixture(scope="session")
def publish(exports: dict[int, Path]) -> Callable[..., Path]:
    """``publish(base_path, version, change=…)``: copy, optionally change, then rename into place as a release does."""

    def publish(base_path: Path, version: int, change: Callable[[Path], object] = lambda _: None) -> Path:
        base_path.mkdir(parents=True, exist_ok=True)
        staging = base_path / f"tmp-{version}"
        shutil.copytree(exports[version], staging)
        change(staging)
        return staging.rename(base_path / str(version))

    return publish


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "serving.model_server", *map(str, arguments)]


class ServerProcess:
    """``python -m serving.model_server`` on free ports. Its log is kept as parsed JSON lines."""

    def __init__(self, log_path: Path, *arguments: object, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.port, self.rest_port = free_ports(2)
        self.log_path = log_path
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command(f"--port={self.port}", "--rest_api_port", self.rest_port, *arguments),
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        self.channel = self.open_channel(credentials)
        self.url = f"http://127.0.0.1:{self.rest_port}"

    def open_channel(self, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
        options = [("grpc.max_receive_message_length", -1)]
        if credentials:
            return grpc.secure_channel(f"localhost:{self.port}", credentials, options)
        return grpc.insecure_channel(f"127.0.0.1:{self.port}", options)

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def wait_for(self, event: str, timeout_s: float = 60, **fields: object) -> dict[str, Any]:
        """The first log line of that event with those fields."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in self.log():
                if line["event"] == event and all(line.get(key) == value for key, value in fields.items()):
                    return line
            assert self.process.poll() is None, self.log_path.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no {event} {fields} in:\n{self.log_path.read_text()}")

    def rest(self, path: str, body: object = None) -> tuple[int, Any]:
        """GET, or POST when there is a body (bytes as they are, else as JSON): status and parsed answer."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as err:
            return err.code, json.loads(err.read())

    def stop(self) -> int:
        self.channel.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                return self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


def request_for(name: str, signature: str = "", label: str = "", **inputs: Any) -> Any:
    """A PredictRequest, of one blank image unless other inputs are given."""
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    if label:
        request.model_spec.version_label = label
    for alias, value in (inputs or {"images": np.zeros((1, 28, 28), np.uint8)}).items():
        request.inputs[alias].CopyFrom(tf.make_tensor_proto(value))
    return request


class Load:
    """Threads that ask for one image after the other until told to stop; every answer and failure is kept."""

    def __init__(
        self, server: ServerProcess, name: str, threads: int = 4, label: str = "", pause_s: float = 0.0
    ) -> None:
        self.digits: list[int] = []
        self.failures: list[grpc.RpcError] = []
        self.stopped = threading.Event()
        self._request, self._pause_s = request_for(name, label=label), pause_s
        self._threads = [threading.Thread(target=self._ask, args=(server,)) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _ask(self, server: ServerProcess) -> None:
        from tensorflow_serving.apis import prediction_service_pb2_grpc

        stub = prediction_service_pb2_grpc.PredictionServiceStub(server.channel)
        while not self.stopped.wait(self._pause_s):
            try:
                response = stub.Predict(self._request, timeout=20)
                assert response.outputs["digit"].int64_val[0] == response.model_spec.version.value
                self.digits.append(response.model_spec.version.value)
            except grpc.RpcError as err:
                self.failures.append(err)

    def answered(self, version: int) -> None:
        """Wait until this version answers."""
        deadline = time.monotonic() + 30
        while version not in self.digits[-20:]:
            assert time.monotonic() < deadline, self.failures
            time.sleep(0.02)

    def stop(self) -> None:
        self.stopped.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """``start_server("--flag=value", …)``; whatever still runs at the end of the file is stopped."""
    servers: list[ServerProcess] = []

    def start(*arguments: object, credentials: grpc.ChannelCredentials | None = None) -> ServerProcess:
        log_path = tmp_path_factory.mktemp("server") / "log"
        servers.append(ServerProcess(log_path, *arguments, credentials=credentials))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line to its end, for the cases in which it ends by itself."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "COLUMNS": "100"},
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def served(publish: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of ``digits`` with version 1, for tests that only ask."""
    base_path = tmp_path_factory.mktemp("models") / "digits"
    publish(base_path, 1)
    log_path = tmp_path_factory.mktemp("server") / "log"
    server = ServerProcess(
        log_path, "--model_name=digits", f"--model_base_path={base_path}", "--rest_api_max_body_bytes=2000000"
    )
    try:
        server.wait_for("version_available", model="digits", version=1)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Seven images of noise, uint8 [7, 28, 28]."""
    return np.random.default_rng(7).integers(0, 256, (7, 28, 28), dtype=np.uint8)
