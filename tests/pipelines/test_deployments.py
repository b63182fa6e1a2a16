"""prefect.yaml: what `prefect deploy` makes of it, and a worker that runs it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import HANG_S, HTTP, ROOT
from tests.pipelines.conftest import environment_for, run


def make_pools(prefect_url: str) -> None:
    for kind in ("process", "kubernetes"):
        body = {"name": f"digits-{kind}", "type": kind}
        HTTP.post(f"{prefect_url}/work_pools/", json=body).raise_for_status()


def test_every_deployment_is_accepted_and_one_runs_at_a_time(toy: Path, prefect_url: str) -> None:
    """Release, maintenance and scoring for both pools, the first two on a cron schedule; the code is found."""
    shutil.copy(ROOT / "prefect.yaml", toy)
    make_pools(prefect_url)
    environment = {"PREFECT_API_URL": prefect_url, "DIGITS_PIPELINE_IMAGE": "registry.example/digits:1"}
    done = run(toy, "prefect", "--no-prompt", "deploy", "--all", PWD=str(toy), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for pool, folder in (("process", str(toy)), ("kubernetes", "/project")):
        crons = {}
        for flow in ("release", "maintenance", "score"):
            deployment = HTTP.get(f"{prefect_url}/deployments/name/{flow}/{pool}").raise_for_status().json()
            crons[flow] = [s["schedule"]["cron"] for s in deployment["schedules"] if s["active"]]
            assert deployment["work_pool_name"] == f"digits-{pool}"
            (step,) = deployment["pull_steps"]
            assert step["prefect.deployments.steps.set_working_directory"]["directory"] == folder
            assert deployment["entrypoint"] == f"pipelines.flows.{flow}.{flow}"
            if flow == "release":
                assert deployment["parameters"] == {"profile": "full"}
            if flow != "score":
                assert deployment["global_concurrency_limit"]["limit"] == 1
                assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
            image = deployment["job_variables"].get("image")
            assert image == ("registry.example/digits:1" if pool == "kubernetes" else None)
        assert crons == {"release": ["0 3 * * *"], "maintenance": ["30 4 * * 0"], "score": []}


@pytest.mark.slow
def test_process_worker_releases_and_a_cancelled_run_leaves_nothing_half_done(toy: Path, prefect_url: str) -> None:
    """A run by the worker publishes; one cancelled in Prefect ends with its stage; the next one completes."""
    shutil.copy(ROOT / "prefect.yaml", toy)
    prefect(toy, prefect_url, "work-pool", "create", "digits-process", "--type", "process", "--overwrite")
    prefect(toy, prefect_url, "deploy", "--name", "process")
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "digits-process"]
    environment = environment_for(toy, PREFECT_API_URL=prefect_url, PREFECT_WORKER_QUERY_SECONDS="1")
    worker = subprocess.Popen(command, cwd=toy, env=environment, start_new_session=True)
    try:
        assert ended(prefect_url, start(toy, prefect_url)) == "COMPLETED"
        (toy / "weights.txt").write_text("slow")
        cancelled = start(toy, prefect_url)
        deadline = time.monotonic() + HANG_S
        while not (stages := [p for p in psutil.Process(worker.pid).children(recursive=True) if at_work(p)]):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        state = {"state": {"type": "CANCELLING"}, "force": False}
        HTTP.post(f"{prefect_url}/flow_runs/{cancelled}/set_state", json=state).raise_for_status()
        assert ended(prefect_url, cancelled) == "CANCELLED"
        assert psutil.wait_procs(stages, timeout=HANG_S)[1] == []
        (toy / "weights.txt").write_text("second")
        assert ended(prefect_url, start(toy, prefect_url)) == "COMPLETED"
        assert sorted(p.name for p in (toy / "models" / "digits").iterdir() if p.name.isdecimal()) == ["1", "2"]
    finally:
        worker.terminate()
        try:
            worker.wait(HANG_S)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)


def prefect(project: Path, url: str, *words: str) -> str:
    """What the command says; the commands are those of docs/orchestration.md."""
    done = run(project, "prefect", "--no-prompt", *words, PREFECT_API_URL=url, PWD=str(project))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(project: Path, prefect_url: str) -> str:
    said = prefect(project, prefect_url, "deployment", "run", "release/process")
    return re.search(r"UUID: ([0-9a-f-]{36})", said)[1]


def ended(prefect_url: str, run_id: str) -> str:
    deadline = time.monotonic() + HANG_S
    while True:
        state = HTTP.get(f"{prefect_url}/flow_runs/{run_id}").json()["state_type"]
        if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return state
        assert time.monotonic() < deadline, state
        time.sleep(0.5)


def at_work(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[-2:] == ["training", "evaluate"]
    except psutil.Error:
        return False
