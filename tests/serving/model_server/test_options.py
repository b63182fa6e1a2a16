"""What flags switch on: TLS on the gRPC port, server-side batching, TF Lite models, metrics, limits of connections."""

import contextlib
import datetime
import ipaddress
import re
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tensorflow as tf
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from prometheus_client.parser import text_string_to_metric_families
from tensorflow_serving.apis import prediction_service_pb2_grpc

from tests.serving.model_server.conftest import request_for

IMAGES = np.random.default_rng(5).integers(0, 256, (40, 28, 28), dtype=np.uint8)


class Authority:
    """Issues certificates for localhost."""

    def __init__(self):
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        self.pem = self._sign(self._name, self._key.public_key(), authority=True)

    def issue(self):
        """Key and certificate, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return private, self._sign(name, key.public_key(), authority=False)

    def _sign(self, name, public_key, authority):
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def authority():
    return Authority()


def text_file(path, message):
    path.write_text(message)
    return path


@pytest.fixture(scope="module")
def server(start_server, publish, exports, authority, tmp_path_factory):
    """``digits`` with everything switched on; its version 2 has a TF Lite model, and ``lite`` nothing else."""
    folder = tmp_path_factory.mktemp("options")
    digits = folder / "digits"
    converter = tf.lite.TFLiteConverter.from_saved_model(str(exports[2]), signature_keys=["serving_default"])
    publish(digits, 1)
    publish(digits, 2, change=lambda path: (path / "model.tflite").write_bytes(converter.convert()))

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def double(x):
        return {"y": x * 2}

    nameless = tf.lite.TFLiteConverter.from_concrete_functions([double.get_concrete_function()]).convert()
    (folder / "lite" / "1").mkdir(parents=True)
    (folder / "lite" / "1" / "model.tflite").write_bytes(nameless)
    models = "".join(
        f'config {{ name: "{name}" base_path: "{folder / name}" model_version_policy {{ all {{}} }} }} '
        for name in ("digits", "lite")
    )
    key, certificate = (pem.decode() for pem in authority.issue())
    tls = f"server_key: {key!r} server_cert: {certificate!r} custom_ca: {authority.pem.decode()!r} client_verify: true"
    batching = "max_batch_size { value: 64 } batch_timeout_micros { value: 100000 } num_batch_threads { value: 1 } "
    client_key, client_certificate = authority.issue()
    server = start_server(
        "--model_config_file", text_file(folder / "models.config", f"model_config_list {{ {models} }}"),
        "--ssl_config_file", text_file(folder / "tls", tls),
        "--enable_batching", "--batching_parameters_file", text_file(folder / "batching", batching),
        "--monitoring_config_file", text_file(folder / "monitoring", "prometheus_config { enable: true }"),
        "--prefer_tflite_model=true", "--num_tflite_pools=1", "--num_tflite_interpreters_per_pool=2",
        "--rest_api_enable_cors_support", "--rest_api_timeout_in_ms=3000",
        "--rest_api_header_timeout_in_ms=700", "--rest_api_idle_timeout_in_ms=500",
        "--grpc_channel_arguments=grpc.max_receive_message_length=1000000",
        credentials=grpc.ssl_channel_credentials(authority.pem, client_key, client_certificate),
    )  # fmt: skip
    for name, version in (("digits", 1), ("digits", 2), ("lite", 1)):
        server.wait_for("version_available", model=name, version=version)
    return server


def predict(server, request):
    stub = prediction_service_pb2_grpc.PredictionServiceStub(server.channel)
    return {alias: tf.make_ndarray(proto) for alias, proto in stub.Predict(request, timeout=30).outputs.items()}


def metrics(server):
    """Every sample as it is written: (name, labels) → value."""
    with urllib.request.urlopen(f"{server.url}/monitoring/prometheus/metrics", timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = response.read().decode()
    assert list(text_string_to_metric_families(text)), "Prometheus' own client can read it"
    lines = re.findall(r"^([\w:]+)(?:{(.*)})? (\S+)$", text, re.MULTILINE)
    return {(name, frozenset(re.findall(r'(\w+)="(.*?)"', labels))): float(value) for name, labels, value in lines}


def sample(server, name, **labels):
    return metrics(server).get((f":tensorflow:serving:{name}", frozenset(labels.items())), 0)


@pytest.mark.parametrize("client", ["plain", "without a certificate", "of another authority"])
def test_clients_without_a_certificate_of_the_authority_are_turned_away(server, authority, client):
    """Mutual TLS, by the same file as in the original; the call never reaches a model."""
    if client == "plain":
        credentials = None
    elif client == "without a certificate":
        credentials = grpc.ssl_channel_credentials(authority.pem)
    else:
        credentials = grpc.ssl_channel_credentials(authority.pem, *Authority().issue())
    with server.open_channel(credentials) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predict(request_for("digits"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_calls_at_the_same_time_run_in_batches_and_get_their_own_answers(server, exports):
    """Fewer runs of the graph than calls, and each caller's rows are what the model says alone."""
    alone = tf.saved_model.load(str(exports[1])).signatures["serving_default"](images=tf.constant(IMAGES))
    before = sample(server, "batching_session:processed_batch_size_count")
    requests = [request_for("digits", images=IMAGES[i : i + 1]) for i in range(len(IMAGES))]
    for request in requests:
        request.model_spec.version.value = 1
    stub = prediction_service_pb2_grpc.PredictionServiceStub(server.channel)
    calls = [stub.Predict.future(request, timeout=30) for request in requests]
    answers = [tf.make_ndarray(call.result().outputs["probabilities"]) for call in calls]
    np.testing.assert_allclose(np.concatenate(answers), alone["probabilities"], rtol=1e-4)
    batches = sample(server, "batching_session:processed_batch_size_count") - before
    assert 1 <= batches < len(IMAGES)


def test_one_bad_picture_in_a_batch_fails_its_own_caller_only(server):
    """The graph refuses the batch; the others are run without it."""
    good = tf.io.encode_png(IMAGES[0][..., None]).numpy()
    pictures = [np.array([content], object) for content in [good] * 5 + [b"no picture"] + [good] * 5]
    requests = [request_for("digits", "encoded", image_bytes=picture) for picture in pictures]
    for request in requests:
        request.model_spec.version.value = 1

    def ask(request):
        try:
            return predict(server, request)["digit"].tolist()
        except grpc.RpcError as err:
            return err.code()

    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(ask, requests))
    assert answers == [[1]] * 5 + [grpc.StatusCode.INVALID_ARGUMENT] + [[1]] * 5


def test_a_tf_lite_model_answers_like_the_saved_model_it_was_made_of(server, exports):
    """With the same signature."""
    expected = tf.saved_model.load(str(exports[2])).signatures["serving_default"](images=tf.constant(IMAGES[:7]))
    answer = predict(server, request_for("digits", images=IMAGES[:7]))
    np.testing.assert_allclose(answer["probabilities"], expected["probabilities"], rtol=1e-3, atol=1e-6)
    assert answer["digit"].tolist() == [2] * 7


def test_signatures_that_a_tf_lite_model_lacks_are_the_saved_model_s(server, exports):
    """A picture cannot be decoded in TF Lite; TensorFlow Serving would serve the version without."""
    status, metadata = server.rest("/v1/models/digits/metadata")
    assert status == 200
    assert set(metadata["metadata"]["signature_def"]["signature_def"]) >= {"serving_default", "encoded"}
    pictures = np.array([tf.io.encode_png(image[..., None]).numpy() for image in IMAGES[:3]], object)
    request = request_for("digits", image_bytes=pictures)
    request.model_spec.signature_name = "encoded"
    expected = tf.saved_model.load(str(exports[2])).signatures["encoded"](image_bytes=tf.constant(pictures))
    np.testing.assert_allclose(predict(server, request)["probabilities"], expected["probabilities"], rtol=1e-5)


@pytest.mark.parametrize("beside", [{}, {"serving_default": False}], ids=["lite", "saved"])
def test_a_signature_runs_where_it_should(exports, tmp_path, beside):
    """In TF Lite where that has it: told apart by a TF Lite model that answers otherwise."""
    from serving.model_server.saved_model import Options, SavedModel
    from serving.model_server.tflite import CompletedTfLiteModel, TfLiteModel

    @tf.function(input_signature=[tf.TensorSpec([None, 28, 28], tf.uint8, name="images")])
    def nines(images):
        rows = tf.shape(images)[:1]
        return {
            "digit": tf.fill(rows, tf.constant(9, tf.int64)),
            "probabilities": tf.zeros(tf.concat([rows, [10]], 0)),
        }

    module = tf.Module()
    module.nines = nines
    name = "serving_default" if not beside else "nines"
    tf.saved_model.save(module, str(tmp_path / "nines"), signatures={name: nines.get_concrete_function()})
    content = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "nines"), signature_keys=[name]).convert()
    (tmp_path / "model.tflite").write_bytes(content)
    model = CompletedTfLiteModel(TfLiteModel(tmp_path, 1), SavedModel(exports[2], Options()))
    digit = 9 if not beside else 2
    images = {"images": np.stack(IMAGES[:2])}
    assert model.run("", images)["digit"].tolist() == [digit] * 2
    together = model.run_together({"serving_default": ["digit"]}, images)
    assert together["serving_default"]["digit"].tolist() == [digit] * 2
    if beside:
        assert model.run("nines", images)["digit"].tolist() == [9] * 2
    model.close()


def test_more_calls_at_a_time_than_interpreters_get_their_own_answers(exports, tmp_path):
    """Interpreters are made as calls need them, up to the number given; whoever comes after waits."""
    from serving.model_server.tflite import TfLiteModel

    converter = tf.lite.TFLiteConverter.from_saved_model(str(exports[2]), signature_keys=["serving_default"])
    (tmp_path / "model.tflite").write_bytes(converter.convert())
    model = TfLiteModel(tmp_path, 3)
    batches = [np.random.default_rng(at).integers(0, 256, (1 + 300 * (at % 3), 28, 28), np.uint8) for at in range(40)]
    expected = [model.run("", {"images": batch})["probabilities"] for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda batch: model.run("", {"images": batch})["probabilities"], batches))
    for answer, alone in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer, alone)
    model.close()


def test_a_tf_lite_model_without_signatures_has_those_of_its_tensors(server):
    """``serving_default``, with the names in the file."""
    body = {"inputs": [[1, 2], [3, 4], [5, 6]]}
    assert server.rest("/v1/models/lite:predict", body) == (200, {"outputs": [[2, 4], [6, 8], [10, 12]]})
    status, answer = server.rest("/v1/models/lite:predict", {"inputs": [[1, 2, 3]]})
    assert status == 400
    assert "shape [1, 3]" in answer["error"]


def test_a_damaged_tf_lite_model_is_not_served(server, tmp_path_factory, exports, start_server):
    """And neither is one without the flag that prefers it."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "1").mkdir()
    (folder / "1" / "model.tflite").write_bytes(b"TFL3 no model")
    other = start_server(f"--model_base_path={folder}", "--prefer_tflite_model")
    assert "model.tflite cannot be loaded" in other.wait_for("version_failed", version=1)["reason"]


def test_metrics_have_the_names_and_labels_of_tensorflow_serving(server):
    """So that its dashboards and alerts fit; what is asked of unknown models shares one label."""
    name = "request_latency_count"
    before = metrics(server)
    predict(server, request_for("digits"))
    assert server.rest("/v1/models/digits:predict", {"instances": [[[0] * 28] * 28]})[0] == 200
    assert server.rest("/v1/models/digits:predict", {"instances": []})[0] == 400
    for wrong in ("nobody", "somebody"):
        with pytest.raises(grpc.RpcError):
            predict(server, request_for(wrong))
    after = metrics(server)

    def grown(name, **labels):
        key = (f":tensorflow:serving:{name}", frozenset(labels.items()))
        return after.get(key, 0) - before.get(key, 0)

    assert grown("request_count", model_name="digits", status="OK") == 2
    assert grown("request_count", model_name="digits", status="INVALID_ARGUMENT") == 1
    assert grown("request_count", model_name="other", status="NOT_FOUND") == 2
    assert grown(name, model_name="digits", API="Predict", entrypoint="GRPC") == 1
    assert grown(name, model_name="digits", API="Predict", entrypoint="REST") == 1
    assert grown("runtime_latency_count", model_name="digits", API="Predict", runtime="TF1") == 2
    assert sample(server, "version_state", model_name="lite", version="1", state="AVAILABLE") == 1
    assert sample(server, "requests_in_progress", entrypoint="GRPC") == 0
    loads = {key[0]: value for key, value in after.items() if key[0].startswith(":tensorflow:cc:saved_model:load_a")}
    assert set(loads) == {":tensorflow:cc:saved_model:load_attempt_count"}
    assert not any("nobody" in str(key) for key in after)
    assert any(key[0] == "process_resident_memory_bytes" for key in after)


def test_a_message_over_the_limit_of_the_channel_arguments_is_refused(server):
    """They come after our own."""
    with pytest.raises(grpc.RpcError) as caught:
        predict(server, request_for("digits", images=np.zeros((1300, 28, 28), np.uint8)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_browsers_of_other_origins_may_ask_where_the_flag_says_so(server):
    """The preflight and the answer carry the headers, errors too."""
    url = f"{server.url}/v1/models/digits:predict"
    preflight = urllib.request.Request(url, method="OPTIONS", headers={"Origin": "http://elsewhere.example"})
    with urllib.request.urlopen(preflight, timeout=20) as response:
        assert response.status == 200
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        assert response.headers["Access-Control-Allow-Headers"] == "Content-Type"
    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(url, b"{}", timeout=20):
        pass
    assert caught.value.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"POST /v1/models/digits:predict HTTP/1.1\r\nHost: x\r\nX-Slow: ", b""),
        (b"GET /v1/models/lite HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"GET /v1/models/lite HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/", b"HTTP/1.1 200 OK"),
        (b"POST /v1/models/lite:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{", b"HTTP/1.1 504"),
    ],
)
def test_connections_that_keep_the_server_waiting_are_closed(server, sent, answered):
    """Silent ones, unfinished headers, unfinished bodies, and those that are done: none is held for ever."""
    with socket.create_connection(("127.0.0.1", server.rest_port), timeout=30) as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        assert received.startswith(answered)
        assert bool(received) == bool(answered)


def test_a_client_that_drips_its_header_is_closed(server):
    """Each byte is no new lease of time."""
    with socket.create_connection(("127.0.0.1", server.rest_port), timeout=30) as connection:
        connection.sendall(b"GET /v1/models/lite HTTP/1.1\r\nX: ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(600):
                connection.sendall(b"x")
                time.sleep(0.05)
            pytest.fail("the server listened for half a minute")
