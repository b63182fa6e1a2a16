"""Versions come, go and fail, and the server stops, while real clients ask a real server process."""

import shutil
import signal
import struct
import threading
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

from tests.serving.model_server.conftest import Load, request_for

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(server, service):
    try:
        return health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest(service=service)).status
    except grpc.RpcError as err:
        return err.code()


MODELS = ("upgrade", "bad", "half", "loss", "warm", "cold", "late")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """One model a test, each with a folder of its own."""
    folder = tmp_path_factory.mktemp("lifecycle")
    config = model_server_config_pb2.ModelServerConfig()
    for name in MODELS:
        config.model_config_list.config.add(name=name, base_path=str(folder / name), model_platform="tensorflow")
    path = folder / "models.config"
    path.write_text(text_format.MessageToString(config))
    return path


@pytest.fixture(scope="module")
def server(start_server, config_file):
    """Started before any version exists."""
    server = start_server(f"--model_config_file={config_file}", "--file_system_poll_wait_seconds=0.1")
    server.wait_for("server_started")
    return server


def test_a_server_without_a_version_waits_for_one(server, config_file, publish):
    """It starts, says NOT_SERVING and NOT_FOUND, and serves once the first version is there."""
    stub = prediction_service_pb2_grpc.PredictionServiceStub(server.channel)
    assert health(server, "late") == NOT_SERVING
    assert health(server, "") == NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(request_for("late"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "Servable not found for request: Latest(late)"
    publish(config_file.parent / "late", 1)
    server.wait_for("version_available", model="late", version=1)
    assert stub.Predict(request_for("late")).outputs["digit"].int64_val[0] == 1
    assert health(server, "late") == SERVING


def test_a_new_version_takes_over_under_load_without_a_failed_call(server, config_file, publish):
    """The old one is dropped when its last request has ended, and not before."""
    folder = config_file.parent / "upgrade"
    publish(folder, 1)
    server.wait_for("version_available", model="upgrade", version=1)
    load = Load(server, "upgrade")
    for version in (2, 3):
        load.answered(version - 1)
        publish(folder, version)
        load.answered(version)
    server.wait_for("version_unloaded", model="upgrade", version=2)
    load.stop()
    assert load.failures == []
    assert set(load.digits) == {1, 2, 3}
    status, answer = server.rest("/v1/models/upgrade")
    assert status == 200
    assert [(entry["version"], entry["state"]) for entry in answer["model_version_status"]] == [
        ("3", "AVAILABLE"),
        ("2", "END"),
        ("1", "END"),
    ]
    assert server.rest("/v1/models/upgrade/versions/1:predict", {"instances": [[[0] * 28] * 28]})[0] == 404


@pytest.mark.parametrize("damage", ["graph", "variables", "signature-less"])
def test_a_bad_new_version_leaves_the_old_one_serving(server, config_file, publish, damage):
    """Its status tells END and why."""
    folder = config_file.parent / "bad"
    if not (folder / "1").exists():
        publish(folder, 1)
        server.wait_for("version_available", model="bad", version=1)
    number = {"graph": 2, "variables": 3, "signature-less": 4}[damage]

    def spoil(staging):
        if damage == "graph":
            (staging / "saved_model.pb").write_bytes(b"\x0a\xff nonsense")
        elif damage == "variables":
            shutil.rmtree(staging / "variables")
        else:
            (staging / "saved_model.pb").write_bytes(b"")

    staging = folder / "staging"
    shutil.copytree(folder / "1", staging)
    spoil(staging)
    staging.rename(folder / str(number))
    server.wait_for("version_failed", model="bad", version=number)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(server.channel)
    assert stub.Predict(request_for("bad")).model_spec.version.value == 1
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "bad"
    request.model_spec.version.value = number
    (failed,) = model_service_pb2_grpc.ModelServiceStub(server.channel).GetModelStatus(request).model_version_status
    assert failed.state == get_model_status_pb2.ModelVersionStatus.END
    assert failed.status.error_code != 0
    assert failed.status.error_message
    assert health(server, "bad") == SERVING


def test_a_half_written_version_is_never_loaded(server, config_file, exports, publish):
    """A name that is no number, or a number without a graph yet: both wait."""
    folder = config_file.parent / "half"
    publish(folder, 1)
    server.wait_for("version_available", model="half", version=1)
    shutil.copytree(exports[2], folder / "2.partial")
    (folder / "3" / "variables").mkdir(parents=True)
    publish(config_file.parent / "loss", 1)  # by the time this one is up, the others were looked at
    server.wait_for("version_available", model="loss", version=1)
    time.sleep(0.3)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(server.channel)
    assert stub.Predict(request_for("half")).model_spec.version.value == 1
    assert not any(line.get("model") == "half" and line.get("version") in (2, 3) for line in server.log())


def test_losing_the_storage_never_unloads_a_loaded_model(server, config_file, publish):
    """The folder vanishes, the model stays, and follows the folder again when that is back."""
    folder = config_file.parent / "loss"
    if not folder.exists():
        publish(folder, 1)
    server.wait_for("version_available", model="loss", version=1)
    aside = folder.rename(folder.with_name("loss-aside"))
    server.wait_for("no_versions_found", model="loss", kept=[1])
    stub = prediction_service_pb2_grpc.PredictionServiceStub(server.channel)
    assert stub.Predict(request_for("loss")).model_spec.version.value == 1
    aside.rename(folder)
    publish(folder, 2)
    server.wait_for("version_available", model="loss", version=2)


def write_records(path, *records):
    """A TFRecord file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record.SerializeToString())


def warm_up_record(request):
    return prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))


def test_warm_up_requests_are_run_before_a_version_serves(server, config_file, publish):
    """All of them."""
    record = warm_up_record(request_for("warm"))
    publish(
        config_file.parent / "warm", 1,
        change=lambda path: write_records(path / "assets.extra/tf_serving_warmup_requests", record, record, record),
    )  # fmt: skip
    assert server.wait_for("version_warmed", model="warm", version=1)["records"] == 3
    server.wait_for("version_available", model="warm", version=1)


@pytest.mark.parametrize("fault", ["wrong request", "damaged file"])
def test_a_version_whose_warm_up_fails_is_not_served(server, config_file, publish, fault):
    """What fails on its own sample requests would fail its clients."""

    def change(path):
        file = path / "assets.extra/tf_serving_warmup_requests"
        if fault == "wrong request":
            write_records(file, warm_up_record(request_for("cold", wrong_name=np.zeros(1, np.uint8))))
        else:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(struct.pack("<Q", 12) + b"no record at all")

    number = 1 if fault == "wrong request" else 2
    publish(config_file.parent / "cold", number, change=change)
    failed = server.wait_for("version_failed", model="cold", version=number)
    assert ("wrong_name" if number == 1 else "damaged") in failed["reason"]
    assert health(server, "cold") == NOT_SERVING


def test_a_reload_request_replaces_the_configuration(server, config_file, publish):
    """It answers when the new model is there. Runs last here: it removes the models of the tests above."""
    folder = config_file.parent / "pushed"
    publish(folder, 1)
    publish(folder, 2)
    request = model_management_pb2.ReloadConfigRequest()
    model = request.config.model_config_list.config.add(name="pushed", base_path=str(folder))
    model.model_version_policy.all.SetInParent()
    stub = model_service_pb2_grpc.ModelServiceStub(server.channel)
    assert stub.HandleReloadConfigRequest(request, timeout=30).status.error_code == 0
    model.version_labels["stable"] = 1
    model.version_labels["canary"] = 2
    assert stub.HandleReloadConfigRequest(request, timeout=30).status.error_code == 0
    body = {"instances": [[[0] * 28] * 28]}
    assert server.rest("/v1/models/pushed/labels/stable:predict", body)[1]["predictions"][0]["digit"] == 1
    assert server.rest("/v1/models/pushed/labels/canary:predict", body)[1]["predictions"][0]["digit"] == 2
    assert server.rest("/v1/models/upgrade:predict", body)[0] == 404
    assert health(server, "") == SERVING


@pytest.fixture
def stoppable(start_server, publish, tmp_path):
    """A server of its own for a test that stops it."""
    publish(tmp_path / "digits", 1)
    server = start_server("--model_name=digits", f"--model_base_path={tmp_path / 'digits'}", "--grace_seconds=30")
    server.wait_for("version_available", model="digits", version=1)
    return server


def seconds_of_steps(stub, seconds):
    """How many steps of the slow signature take about that long here and now."""
    started = time.monotonic()
    stub.Predict(request_for("digits", "slow", steps=np.int32(20_000)))
    return max(1000, int(20_000 * seconds / (time.monotonic() - started)))


def test_sigterm_under_load_drains_without_a_failed_call(stoppable):
    """Clients that follow health lose nothing, calls under way end well over gRPC and REST, the exit status is 0."""
    stub = prediction_service_pb2_grpc.PredictionServiceStub(stoppable.channel)
    steps = seconds_of_steps(stub, 2)
    load = Load(stoppable, "digits")
    seen = []

    def follow_health():
        for change in health_pb2_grpc.HealthStub(stoppable.channel).Watch(health_pb2.HealthCheckRequest(service="")):
            seen.append(change.status)
            if change.status == NOT_SERVING:
                load.stopped.set()

    watcher = threading.Thread(target=follow_health)
    watcher.start()
    load.answered(1)
    while len(load.digits) <= 10:
        time.sleep(0.02)
    slow = stub.Predict.future(request_for("digits", "slow", steps=np.int32(steps)), timeout=60)
    rest_answer = []
    body = {"signature_name": "slow", "inputs": {"steps": steps}}
    rest_call = threading.Thread(target=lambda: rest_answer.append(stoppable.rest("/v1/models/digits:predict", body)))
    rest_call.start()
    time.sleep(0.5)
    stoppable.process.send_signal(signal.SIGTERM)
    assert slow.result().outputs["sum"].float_val[0] == 64
    rest_call.join()
    assert rest_answer == [(200, {"outputs": {"steps": steps, "sum": 64.0}})]
    watcher.join()
    load.stop()
    assert stoppable.process.wait(30) == 0
    assert seen == [SERVING, NOT_SERVING]
    assert load.failures == []
    assert stoppable.log()[-1]["event"] == "server_stopped"


def test_a_second_signal_ends_the_process_at_once(stoppable):
    """Whoever asks twice does not want to wait for the calls under way."""
    stub = prediction_service_pb2_grpc.PredictionServiceStub(stoppable.channel)
    call = stub.Predict.future(request_for("digits", "slow", steps=np.int32(100_000_000)), timeout=600)
    time.sleep(0.5)
    stoppable.process.send_signal(signal.SIGTERM)
    stoppable.wait_for("server_stopping")
    stoppable.process.send_signal(signal.SIGTERM)
    assert stoppable.process.wait(10) == 128 + signal.SIGTERM
    assert call.exception() is not None


def test_sigterm_while_it_starts_ends_it_at_once(start_server, tmp_path):
    """Loading TensorFlow takes seconds; nobody is served yet, so nobody is waited for."""
    server = start_server(f"--model_base_path={tmp_path}")
    server.wait_for("server_starting")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert not any(line["event"] == "tensorflow_loaded" for line in server.log())
