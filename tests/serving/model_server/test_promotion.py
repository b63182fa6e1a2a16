"""Versions are promoted and rolled back by a ``models.config`` that is rewritten while clients ask."""

import contextlib
import signal
import time

import pytest

from tests.serving.gateway.conftest import LoopThread
from tests.serving.gateway.load import Load as GatewayLoad
from tests.serving.gateway.test_process import Process
from tests.serving.model_server.conftest import Load


class Promotions:
    """The one writer of ``models.config``, with the two steps of a promotion; and the folder of versions."""

    def __init__(self, folder, publish):
        self.base_path, self.file = folder / "digits", folder / "models.config"
        self._publish = publish

    def publish(self, version):
        self._publish(self.base_path, version)

    def write(self, versions, stable=None):
        policy = f"specific {{ {' '.join(f'versions: {v}' for v in versions)} }}" if versions else "latest { }"
        label = f'version_labels {{ key: "stable" value: {stable} }}' if stable else ""
        staging = self.file.with_suffix(".new")
        staging.write_text(
            f'model_config_list {{ config {{ name: "digits" base_path: "{self.base_path}" model_platform: "tensorflow" '
            f"model_version_policy {{ {policy} }} {label} }} }}"
        )
        staging.rename(self.file)


def states(server):
    status, answer = server.rest("/v1/models/digits")
    assert status == 200
    return {int(entry["version"]): entry["state"] for entry in answer["model_version_status"]}


def until(claim):
    deadline = time.monotonic() + 60
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


@contextlib.contextmanager
def asked(server, threads, pause_s):
    """Clients that name the label and clients that name nothing, all the while."""
    loads = {label: Load(server, "digits", threads, label, pause_s) for label in ("stable", "")}
    try:
        yield loads
    finally:
        for load in loads.values():
            load.stop()


@pytest.fixture
def promotions(tmp_path, publish):
    return Promotions(tmp_path, publish)


@pytest.fixture
def server(promotions, start_server):
    """Started before the first release, as in production: the newest version, no label."""
    promotions.write([])
    server = start_server(
        f"--model_config_file={promotions.file}", "--model_config_file_poll_wait_seconds=1",
        "--allow_version_labels_for_unavailable_models=true", "--file_system_poll_wait_seconds=0.2",
    )  # fmt: skip
    server.wait_for("server_started")
    promotions.publish(1)
    server.wait_for("version_available", version=1)
    promotions.write([1], stable=1)
    server.wait_for("config_reloaded")
    return server


def test_promotion_and_rollback_lose_no_call(server, promotions):
    """Promotion: both versions with the old label, then, once the new one is there, the label. Rollback: the label, at
    once, then the abandoned version goes. Nobody who asks meanwhile is refused, and each hears the version it should.
    """
    with asked(server, threads=2, pause_s=0.003) as loads:
        loads["stable"].answered(1)
        promotions.publish(2)
        time.sleep(0.5)
        assert states(server) == {1: "AVAILABLE"}, "published is not promoted"
        promotions.write([1, 2], stable=1)
        until(lambda: states(server) == {1: "AVAILABLE", 2: "AVAILABLE"})
        loads[""].answered(2)
        assert set(loads["stable"].digits) == {1}
        promotions.write([1, 2], stable=2)
        loads["stable"].answered(2)
        promotions.write([1, 2], stable=1)
        until(lambda: loads["stable"].digits[-1] == 1)
        promotions.write([1], stable=1)
        until(lambda: states(server) == {1: "AVAILABLE", 2: "END"})
        loads[""].answered(1)
        # In one step, without waiting for the server: the label waits for its version.
        promotions.write([2, 3], stable=3)
        promotions.publish(3)
        loads["stable"].answered(3)
        loads[""].answered(3)
        until(lambda: states(server) == {1: "END", 2: "AVAILABLE", 3: "AVAILABLE"})
    for load in loads.values():
        assert load.failures == []
        assert len(load.digits) > 100
    assert set(loads["stable"].digits) == {1, 2, 3}


@pytest.mark.slow
def test_fifty_thousand_calls_outlive_every_change(server, promotions):
    """Versions promoted, rolled back, dropped and loaded again, a damaged one, the storage lost: no call fails."""

    def promote(new, old):
        promotions.write([old, new], stable=old)
        until(lambda: states(server).get(new) == "AVAILABLE")
        promotions.write([old, new], stable=new)
        loads["stable"].answered(new)
        promotions.write([new], stable=new)
        until(lambda: states(server)[old] == "END")

    def lose_the_storage():
        aside = promotions.base_path.rename(promotions.base_path.with_name("aside"))
        time.sleep(1)
        aside.rename(promotions.base_path)

    def promote_what_cannot_load():
        promotions.write([1, 9], stable=9)
        until(lambda: states(server).get(9) == "END")
        loads["stable"].answered(1)
        promotions.write([1], stable=1)

    for version in (2, 3):
        promotions.publish(version)
    damaged = promotions.base_path / "9"
    damaged.mkdir()
    (damaged / "saved_model.pb").write_bytes(b"no graph")
    with asked(server, threads=3, pause_s=0.0) as loads:
        while sum(len(load.digits) for load in loads.values()) < 50_000:
            promote(2, 1)
            promote(3, 2)
            lose_the_storage()
            promote(1, 3)
            promote_what_cannot_load()
    for load in loads.values():
        assert load.failures == []
        assert set(load.digits) == {1, 2, 3}


@pytest.mark.slow
def test_fifty_thousand_calls_through_the_gateway_outlive_promotions(server, promotions):
    """``models.config`` rewritten again and again, and the gateway's workers replaced between: no call of either
    protocol fails, each answer is of the version it names, and the gateway follows the label.
    """

    def promote(new, old):
        promotions.write([old, new], stable=old)
        until(lambda: states(server).get(new) == "AVAILABLE")
        promotions.write([old, new], stable=new)
        heard = load.versions[str(new)]
        until(lambda: load.versions[str(new)] > heard)
        promotions.write([new], stable=new)
        until(lambda: states(server)[old] == "END")

    for version in (2, 3):
        promotions.publish(version)
    gateway = Process(
        f"127.0.0.1:{server.port}", DIGITS_MODEL_LABEL="stable", DIGITS_WORKERS="2", DIGITS_STATUS_POLL_S="0.1"
    )
    try:
        gateway.wait_ready()
        with GatewayLoad(
            LoopThread(), gateway.url, gateway.first["grpc"], rest=8, rpc=8, digit_is_version=True
        ) as load:
            rounds = 0
            while load.good < 50_000 or not rounds:
                promote(2, 1)
                gateway.popen.send_signal(signal.SIGHUP)
                promote(3, 2)
                promote(1, 3)
                rounds += 1
    finally:
        gateway.popen.terminate()
        assert gateway.end() == 0
    print(load.good, "calls,", rounds * 3, "promotions,", gateway.events().count("replaced"), "times replaced")
    assert (load.how_it_went(), load.wrong, load.late) == ({}, 0, 0)
    assert set(load.versions) == {"1", "2", "3"}
    assert "replaced" in gateway.events()
