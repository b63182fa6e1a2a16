"""Several worker processes: one address, one sum of metrics, replaced and killed under load."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.gateway.totals import add_up, that_stay
from tests.serving.gateway.conftest import LoopThread, eventually
from tests.serving.gateway.load import Load
from tests.serving.gateway.test_process import Process, run
from tests.serving.gateway.upstream_server import TestUpstream

CALLS = 2000


@pytest.fixture
def upstream(thread: LoopThread) -> Iterator[TestUpstream]:
    server = TestUpstream()
    thread.run(server.start())
    yield server
    thread.run(server.stop())


@pytest.fixture
def start(upstream: TestUpstream) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(**settings: str) -> Process:
        process = Process(upstream.target, DIGITS_WORKERS="2", DIGITS_STATUS_POLL_S="0.1", **settings)
        started.append(process)
        process.wait_ready()
        return process

    yield begin
    for process in started:
        workers = psutil.Process(process.popen.pid).children() if process.popen.poll() is None else []
        if process.popen.poll() is None:
            process.popen.terminate()
        process.end()
        assert [one for one in workers if one.is_running()] == []


def metric(process: Process, name: str, **labels: str) -> float:
    """The sum of the samples with these labels; a new connection each time, so that any worker may be asked."""
    text = httpx.get(process.url + "/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def counted(process: Process) -> float:
    return metric(process, "digits_requests_total", route="/classify", code="200") + metric(
        process, "digits_requests_total", route="Classify", code="OK"
    )


def workers(process: Process) -> list[int]:
    return [child.pid for child in psutil.Process(process.popen.pid).children()]


def test_work_is_shared_and_any_worker_shows_the_sum(start: Callable[..., Process], thread: LoopThread) -> None:
    """Both answer over both protocols; /metrics is the same whichever is asked, and right to the last request."""
    process = start()
    assert len(workers(process)) == 2
    with Load(thread, process.url, process.first["grpc"], rest=16, rpc=16) as load:
        eventually(lambda: load.good > 500)
    assert (load.bad, load.wrong) == ([], 0)
    assert {counted(process) for _ in range(8)} == {load.good}
    assert metric(process, "digits_workers") == 2
    assert metric(process, "digits_predictions_total") == load.good
    assert metric(process, "digits_request_duration_seconds_count", route="/classify") > 0
    assert metric(process, "digits_upstream_ready") == 1
    shares = [psutil.Process(pid).cpu_times().user for pid in workers(process)]
    assert min(shares) > 0.1 * max(shares)


def replace_under_load(process: Process, upstream: TestUpstream, thread: LoopThread, calls: int) -> Load:
    """SIGHUP again and again, a new version and a moved label between, until so many calls were answered."""
    upstream.behaviour.delay_s = 0.002
    with Load(thread, process.url, process.first["grpc"], rest=8, rpc=8) as load:
        eventually(lambda: load.good > 100)
        replaced = 0
        while load.good < calls or replaced < 2:
            before = workers(process)
            process.popen.send_signal(signal.SIGHUP)
            eventually(lambda done=replaced: process.events().count("replaced") > done, 60)
            replaced += 1
            assert not set(before) & set(workers(process))
            upstream.behaviour.newest = upstream.behaviour.version + replaced
            upstream.behaviour.labels = {"stable": upstream.behaviour.newest}
    return load


def test_replaced_one_by_one_under_load_no_call_fails(
    start: Callable[..., Process], upstream: TestUpstream, thread: LoopThread
) -> None:
    """Every call of 2,000 and more, from clients that send nothing again, is answered, and each is counted."""
    process = start(DIGITS_MODEL_LABEL="stable")
    load = replace_under_load(process, upstream, thread, CALLS)
    assert (load.how_it_went(), load.wrong, load.late) == ({}, 0, 0)
    assert len(load.versions) > 2
    assert counted(process) == load.good
    assert metric(process, "digits_worker_crashes_total") == 0


@pytest.mark.slow
def test_replaced_again_and_again_no_call_of_50_000_fails(
    start: Callable[..., Process], upstream: TestUpstream, thread: LoopThread
) -> None:
    """The same for longer."""
    process = start(DIGITS_MODEL_LABEL="stable")
    load = replace_under_load(process, upstream, thread, 50_000)
    print(load.good, "calls,", len(load.versions), "versions")
    assert (load.how_it_went(), load.wrong, load.late) == ({}, 0, 0)
    assert counted(process) == load.good


def test_a_worker_that_is_killed_is_started_again_and_its_counts_stay(start: Callable[..., Process]) -> None:
    """Connections to it are cut, the other answers meanwhile; counters never go back: that would read as a burst."""
    process = start()
    for _ in range(20):
        httpx.post(process.url + "/classify", content=bytes(784))
    before = counted(process)
    victim = workers(process)[0]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: len(workers(process)) == 2 and victim not in workers(process))
    eventually(lambda: metric(process, "digits_workers") == 2)
    assert before == counted(process) == 20
    assert metric(process, "digits_worker_crashes_total") == 1
    assert "worker_ended" in process.events()


def test_a_worker_that_falls_over_again_and_again_is_not_started_at_full_speed(start: Callable[..., Process]) -> None:
    """Each is killed at sight: the pauses between them grow, and the other worker goes on answering."""
    process = start()
    stays = workers(process)[1]
    times: dict[int, float] = {}

    def kill_the_new() -> bool:
        for pid in set(workers(process)) - {stays} - set(times):
            times[pid] = time.monotonic()
            os.kill(pid, signal.SIGKILL)
        return len(times) >= 5

    eventually(kill_the_new)
    pauses = [later - earlier for earlier, later in pairwise(times.values())]
    assert pauses[-1] > pauses[0] + 0.5
    # The dead worker's socket is closed while nobody is to accept from it, so none of these waits there.
    answers = [httpx.post(process.url + "/classify", content=bytes(784), timeout=20).status_code for _ in range(20)]
    assert set(answers) == {200}


def test_without_its_supervisor_a_worker_drains_and_goes(start: Callable[..., Process]) -> None:
    """Kill -9 of the supervisor leaves no worker behind to hold the ports."""
    process = start()
    left = [psutil.Process(pid) for pid in workers(process)]
    process.popen.kill()
    process.popen.wait()
    eventually(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in left))


def test_a_setting_that_cannot_be_used_is_said_once(tmp_path: Path) -> None:
    """One line and status 2, as with one process."""
    keys = tmp_path / "keys"
    keys.write_text("not a key\n")
    ended = run(DIGITS_WORKERS="3", DIGITS_REST_PORT="0", DIGITS_GRPC_PORT="0", DIGITS_API_KEYS_FILE=str(keys))
    assert ended.returncode == 2
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("gateway: ")]
    assert "line 1" in line


def test_replacing_with_what_does_not_start_keeps_what_runs(start: Callable[..., Process], tmp_path: Path) -> None:
    """A damaged file of keys at SIGHUP is an error in the log and nothing else."""
    keys = tmp_path / "keys"
    keys.write_text("")
    process = start(DIGITS_API_KEYS_FILE=str(keys))
    before = workers(process)
    keys.write_text("damaged")
    process.popen.send_signal(signal.SIGHUP)
    eventually(lambda: "replacing_failed" in process.events())
    assert workers(process) == before
    assert httpx.get(process.url + "/readyz").status_code == 200


def test_totals_of_processes() -> None:
    """Counters and histograms add up and outlive a process; gauges are combined by what they mean."""
    one = [
        ["a", "", "counter", [["a_total", {"x": "1"}, 2.0], ["a_created", {"x": "1"}, 50.0]]],
        ["digits_upstream_ready", "", "gauge", [["digits_upstream_ready", {}, 1.0]]],
        ["digits_queue_images", "", "gauge", [["digits_queue_images", {}, 3.0]]],
    ]
    other = [
        ["a", "", "counter", [["a_total", {"x": "1"}, 5.0], ["a_total", {"x": "2"}, 1.0]]],
        ["a", "", "counter", [["a_created", {"x": "1"}, 40.0]]],
        ["digits_upstream_ready", "", "gauge", [["digits_upstream_ready", {}, 0.0]]],
        ["digits_queue_images", "", "gauge", [["digits_queue_images", {}, 4.0]]],
    ]  # fmt: skip
    found = {
        family[0]: {(name, *labels.values()): value for name, labels, value in family[3]}
        for family in add_up((one, other))
    }
    assert found["a"] == {("a_total", "1"): 7.0, ("a_total", "2"): 1.0, ("a_created", "1"): 40.0}
    assert found["digits_upstream_ready"] == {("digits_upstream_ready",): 0.0}
    assert found["digits_queue_images"] == {("digits_queue_images",): 7.0}
    assert [family[0] for family in that_stay(one)] == ["a"]
