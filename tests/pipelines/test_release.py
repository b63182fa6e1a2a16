"""The release flow: DVC's stages in DVC's order, one release at a time, and nothing published that was not approved."""

import http.server
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest

from pipelines import ledger, serving_config, versioning
from pipelines.locks import only_one
from pipelines.settings import Settings
from tests.conftest import HANG_S, HTTP
from tests.pipelines.conftest import environment_for, run
from tests.ports import free_ports

T = TypeVar("T")


class Webhook:
    """A receiver on a free port that refuses the first calls with 503."""

    def __init__(self, refusals: int) -> None:
        self.calls: list[dict] = []
        webhook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                webhook.calls.append({"path": self.path, **body})
                self.send_response(503 if len(webhook.calls) <= refusals else 204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hooks/s3cret-token"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    receiver = Webhook(refusals=1)
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


def release(project: Path, prefect_url: str) -> subprocess.CompletedProcess[str]:
    return run(project, "pipelines", "release", PREFECT_API_URL=prefect_url)


def last_run(prefect_url: str) -> dict:
    """The newest flow run, as the server has it."""
    body = {"sort": "EXPECTED_START_TIME_DESC", "limit": 1}
    return HTTP.post(f"{prefect_url}/flow_runs/filter", json=body).json()[0]


def artifacts_of_last_run(prefect_url: str) -> dict[str, dict]:
    body = {"flow_runs": {"id": {"any_": [last_run(prefect_url)["id"]]}}}
    return {a["key"]: a for a in HTTP.post(f"{prefect_url}/artifacts/filter", json=body).json()}


def steps(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str]]:
    """The list of steps a person sees: sign and name."""
    return re.findall(r"^([✓–✗]) (\w+)", done.stderr, flags=re.MULTILINE)


def versions(project: Path) -> list[str]:
    return sorted(path.name for path in (project / "models" / "digits").iterdir() if path.name.isdecimal())


def test_stages_come_in_the_order_of_dvcs_own_graph(toy: Path) -> None:
    """dvc.yaml lists export first; it is the last to run. The flow never states an order of its own."""
    stages = versioning.stages_in_order(Settings(project=toy))
    assert [stage.name for stage in stages] == ["evaluate", "gate", "export"]
    assert stages[-1].needs == ("evaluate", "gate")


def test_release_runs_alone_and_leaves_dvc_nothing_to_do(first_release, released: Path) -> None:
    """With a Prefect server of its own. Afterwards `dvc repro` finds all up to date, also the decision."""
    done = first_release[1]
    assert done.returncode == 0, done.stderr
    built = [("✓", step) for step in ("ingest", "evaluate", "gate", "export", "publish")]
    assert steps(done) == [*built, ("–", "smoke"), ("✓", "promote"), ("✓", "gate")]
    published = r"^version 1 published: .*/models/digits/1, 99.00% of the test images right$"
    assert re.search(published, done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert (released / ".prefect" / "prefect.db").is_file()  # the history is kept with the project
    repro = run(released, "dvc", "repro")
    assert "Running stage" not in repro.stdout
    assert "Data and pipelines are up to date." in repro.stdout
    assert json.loads(run(released, "dvc", "status", "--json").stdout) == {}


def test_release_finds_dvcs_work_done(toy: Path, prefect_url: str) -> None:
    """What `dvc repro` has built is not built again, only published; its figures are artifacts all the same."""
    assert run(toy, "dvc", "repro").returncode == 0
    done = release(toy, prefect_url)
    assert done.returncode == 0, done.stderr
    found = [("–", stage) for stage in ("evaluate", "gate", "export")]
    assert steps(done) == [("✓", "ingest"), *found, ("✓", "publish"), ("–", "smoke"), ("✓", "promote"), ("✓", "gate")]
    assert {"metrics", "evaluation", "decision", "published"} <= set(artifacts_of_last_run(prefect_url))


def test_second_release_does_nothing_but_complete_a_lost_record(
    released: Path, prefect_url: str, webhook: Webhook
) -> None:
    """As after a crash between the version's rename and the champion's record: written before the gate looks.

    Nobody is told of a release that changed nothing.
    """
    record = released / "models" / "champion" / "champion.json"
    before = record.read_bytes()
    record.unlink()
    again = ["release", "--profile", "full"]
    done = run(released, "pipelines", *again, PREFECT_API_URL=prefect_url, DIGITS_NOTIFY_URL=webhook.url)
    assert done.returncode == 0, done.stderr
    assert "the champion's record was missing or old: completed" in done.stderr
    assert record.read_bytes() == before
    assert [step for step in steps(done) if step[0] == "✓"] == [("✓", "the"), ("✓", "ingest")]
    assert "version 1 already published" in done.stdout
    assert versions(released) == ["1"]
    assert webhook.calls == []


def test_release_leaves_a_rollback_alone(released: Path, prefect_url: str) -> None:
    """What a person went back from is not promoted again by the next release, though the gate approves it still."""
    (released / "weights.txt").write_text("second")
    for words in (("dvc", "repro"), ("pipelines", "publish"), ("pipelines", "promote", "2"), ("pipelines", "rollback")):
        assert run(released, *words).returncode == 0
    done = release(released, prefect_url)
    assert done.returncode == 0, done.stderr
    assert "version 2 was rolled back; to serve it again: python -m pipelines promote 2" in done.stderr
    settings = Settings(project=released)
    assert serving_config.promoted(settings) == 1
    assert json.loads(settings.champion_file.read_text())["version"] == 1
    rows = [(str(e.decision.kind), e.decision.version) for e in ledger.read(settings)]
    assert rows == [("release", 1), ("promotion", 1), ("release", 2), ("promotion", 2), ("rollback", 1)]


def test_rejected_candidate_ends_in_a_state_of_that_name(released: Path, prefect_url: str) -> None:
    """Exit code 3, the gate's rows in a table, no export, no new version; the record in Prefect says Rejected.

    A better candidate is published after it, and its metrics, decision and lineage are the run's artifacts.
    """
    champion = (released / "models" / "champion" / "champion.json").read_bytes()
    (released / "weights.txt").write_text("worse")
    (released / "accuracy.txt").write_text("0.42")
    done = release(released, prefect_url)
    assert done.returncode == 3, done.stderr
    assert steps(done) == [("✓", "ingest"), ("✓", "evaluate"), ("✓", "gate"), ("✗", "rejected")]
    assert re.search(r"✗ +│ accuracy +│ 0\.4200 +│ 0\.9000 +│ the floor", done.stdout)
    assert "accuracy is below its floor; the served version stays" in done.stdout
    assert versions(released) == ["1"]
    assert (released / "models" / "champion" / "champion.json").read_bytes() == champion
    assert (last_run(prefect_url)["state"]["name"], last_run(prefect_url)["state_type"]) == ("Rejected", "COMPLETED")

    (released / "accuracy.txt").write_text("0.98")
    better = release(released, prefect_url)
    assert better.returncode == 0, better.stderr
    assert versions(released) == ["1", "2"]
    artifacts = artifacts_of_last_run(prefect_url)
    assert set(artifacts) == {"metrics", "evaluation", "decision", "published", "lineage"}
    assert "![Confusion matrix](data:image/png;base64,iVBORw0KGgo" in artifacts["evaluation"]["data"]
    assert {"metric": "accuracy", "value": 0.98} in json.loads(artifacts["metrics"]["data"])
    assert "| ✓ | accuracy | 0.98 | 0.9 | the floor |" in artifacts["decision"]["data"]
    assert "| commit | `" in artifacts["published"]["data"]
    rows = ledger.read(Settings(project=released))
    kinds = [(str(row.decision.kind), row.decision.version) for row in rows]
    assert kinds == [("release", 1), ("promotion", 1), ("rejection", None), ("release", 2), ("promotion", 2)]
    assert rows[2].decision.note == "accuracy is below its floor"
    assert ", flow run " in rows[3].decision.who


def test_webhook_is_told_of_what_matters_and_its_secret_stays_secret(
    released: Path, prefect_url: str, webhook: Webhook
) -> None:
    """A rejection, a publication and a failure, each once it listens again."""
    environment = {"PREFECT_API_URL": prefect_url, "DIGITS_NOTIFY_URL": webhook.url}
    said = ""
    for weights, accuracy, code in (("worse", 0.42, 3), ("better", 0.98, 0), ("broken", 0.98, 1)):
        (released / "weights.txt").write_text(weights)
        (released / "accuracy.txt").write_text(str(accuracy))
        done = run(released, "pipelines", "release", **environment)
        assert done.returncode == code, done.stderr
        said += done.stdout + done.stderr
    events = [call["event"] for call in webhook.calls]
    assert events == ["release.rejected", "release.rejected", "release.published", "release.failed"]  # one refused
    assert {call["path"] for call in webhook.calls} == {"/hooks/s3cret-token"}
    assert "accuracy is below its floor; the served version stays" in webhook.calls[1]["text"]
    assert "version 2 is published" in webhook.calls[2]["text"]
    assert "the loss is not a number" in webhook.calls[3]["text"]
    assert webhook.calls[2]["url"].endswith(f"/runs/flow-run/{webhook.calls[2]['run_id']}")
    logs = HTTP.post(f"{prefect_url}/logs/filter", json={"limit": 200}).text
    assert "s3cret" not in said + logs


def test_webhook_that_does_not_listen_fails_nothing(toy: Path, prefect_url: str) -> None:
    """One line names its host, not its path."""
    nowhere = {"DIGITS_NOTIFY_URL": "http://127.0.0.1:9/s3cret-token", "DIGITS_NOTIFY_TIMEOUT_S": "1"}
    level = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING"}
    done = run(toy, "pipelines", "release", PREFECT_API_URL=prefect_url, **nowhere, **level)
    assert done.returncode == 0, done.stderr
    assert "the webhook at 127.0.0.1 was not told: ConnectError" in done.stderr
    assert "s3cret" not in done.stdout + done.stderr


def test_failing_stage_stops_the_flow_with_its_own_last_line(toy: Path, prefect_url: str) -> None:
    """Exit code 1 and one error line that names the stage and says what it said; the run there is Failed."""
    (toy / "weights.txt").write_text("broken")
    done = release(toy, prefect_url)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: stage ")]
    assert errors == ["error: stage evaluate failed: the loss is not a number; lower the learning rate"]
    assert "Traceback" not in done.stderr
    assert steps(done) == [("✓", "ingest")]
    assert last_run(prefect_url)["state_type"] == "FAILED"
    assert "the loss is not a number" in last_run(prefect_url)["state"]["message"]


def test_second_release_is_refused_by_name(toy: Path) -> None:
    """At once, before a server is started for it."""
    with only_one(toy / "run" / "release.lock", "release"):
        done = run(toy, "pipelines", "release")
    assert done.returncode == 5
    assert done.stderr.startswith(f"error: another release (process {os.getpid()}) is at work here")


def test_killed_release_takes_its_stage_along_and_the_next_one_completes(toy: Path, prefect_url: str) -> None:
    """Kill -9 of the flow while a stage works: neither DVC nor the stage goes on behind one's back."""
    (toy / "weights.txt").write_text("slow")
    environment = environment_for(toy, PREFECT_API_URL=prefect_url)
    process = subprocess.Popen([sys.executable, "-m", "pipelines", "release"], cwd=toy, env=environment)
    stage = wait_until(lambda: [p for p in below(process) if working_on("evaluate", p)])
    started = below(process)
    assert len(started) >= 2  # DVC, perhaps a shell, and the stage
    process.send_signal(signal.SIGKILL)
    process.wait(HANG_S)
    _, alive = psutil.wait_procs(started, timeout=HANG_S)
    assert alive == [], stage
    (toy / "weights.txt").write_text("first")
    done = release(toy, prefect_url)
    assert done.returncode == 0, done.stderr
    assert versions(toy) == ["1"]


@pytest.mark.parametrize("how", ["Ctrl-C", "cancelled in Prefect"])
def test_release_stopped_on_request_leaves_nothing_half_done(toy: Path, prefect_url: str, how: str) -> None:
    """Its stage ends with it, the run is Cancelled there, exit code 130; the next release completes."""
    (toy / "weights.txt").write_text("slow")
    environment = environment_for(toy, PREFECT_API_URL=prefect_url)
    command = [sys.executable, "-m", "pipelines", "release"]
    process = subprocess.Popen(command, cwd=toy, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: [p for p in below(process) if working_on("evaluate", p)])
    started = below(process)
    if how == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        state = {"state": {"type": "CANCELLING"}, "force": False}
        HTTP.post(f"{prefect_url}/flow_runs/{last_run(prefect_url)['id']}/set_state", json=state).raise_for_status()
    _, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == 130, stderr
    assert "cancelled   the served version stays; the next release goes on from here" in stderr
    assert "Traceback" not in stderr
    assert psutil.wait_procs(started, timeout=HANG_S)[1] == []
    assert last_run(prefect_url)["state_type"] == "CANCELLED"
    (toy / "weights.txt").write_text("first")
    done = release(toy, prefect_url)
    assert done.returncode == 0, done.stderr
    assert versions(toy) == ["1"]


def wait_until(there: Callable[[], T], limit_s: float = HANG_S) -> T:
    """What it gives as soon as that is something."""
    deadline = time.monotonic() + limit_s
    while not (found := there()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def heeds(process: subprocess.Popen, number: signal.Signals) -> bool:
    """Has it a handler of its own for a signal?"""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) >> number - 1 & 1)


def below(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def working_on(stage: str, process: psutil.Process) -> bool:
    try:
        return process.cmdline()[-2:] == ["training", stage]
    except psutil.Error:
        return False


def test_data_changed_unasked_stops_before_any_stage(toy: Path, prefect_url: str) -> None:
    """The file is named, and how to go on either way."""
    (toy / "data" / "labels").write_text("lab3ls")
    done = release(toy, prefect_url)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: data/labels has MD5 .*python -m pipelines ingest.*dvc add data", error)
    assert steps(done) == []
    assert not (toy / "artifacts").exists()


def test_schedule_survives_a_stop_and_allows_one_release_at_a_time(toy: Path, prefect_url: str) -> None:
    """Cron at the server, active also after SIGTERM; a release that comes due during another one is cancelled.

    Started as a script's ``&`` starts it, with SIGINT ignored: it stops all the same.
    """
    process = subprocess.Popen(
        ["bash", "-c", "trap '' INT; exec \"$@\"", "bash",
         sys.executable, "-m", "pipelines", "schedule", "--cron", "0 3 * * *", "--name", "nightly",
         "--profile", "full"],
        cwd=toy, env=environment_for(toy, PREFECT_API_URL=prefect_url), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert "releases at '0 3 * * *'" in process.stdout.readline()
    wait_until(lambda: heeds(process, signal.SIGTERM))  # a moment after it has said so
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(HANG_S) == 0
    finally:
        process.kill()
    deployment = HTTP.get(f"{prefect_url}/deployments/name/release/nightly").json()
    assert deployment["paused"] is False
    assert [(s["active"], s["schedule"]["cron"]) for s in deployment["schedules"]] == [(True, "0 3 * * *")]
    assert deployment["parameters"]["profile"] == "full"
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def test_schedule_alone_plans_releases_and_one_outlives_its_prefect_server(toy: Path) -> None:
    """Without PREFECT_API_URL it brings a server that has a scheduler, which is what makes releases come due.

    That server, killed -9 in the middle of a release, is started again on the same port; the release completes.
    """
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    (toy / "weights.txt").write_text("waiting")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "schedule", "--cron", "0 3 * * *"], cwd=toy, stdout=subprocess.PIPE,
        env=environment_for(toy, DIGITS_PREFECT_PORT=str(port), PREFECT_RUNNER_POLL_FREQUENCY="1"), text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == f"releases at '0 3 * * *' (UTC); Prefect's UI: http://127.0.0.1:{port}; stop: Ctrl-C\n"
        planned = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
        runs = wait_until(lambda: HTTP.post(f"{url}/flow_runs/filter", json=planned).json())
        assert all("T03:00:00" in run["expected_start_time"] for run in runs)
        assert "<title>Prefect" in HTTP.get(f"http://127.0.0.1:{port}/", follow_redirects=True).text

        deployment = runs[0]["deployment_id"]
        started = HTTP.post(f"{url}/deployments/{deployment}/create_flow_run", json={"state": {"type": "SCHEDULED"}})
        wait_until(lambda: [p for p in below(process) if working_on("evaluate", p)])
        (server,) = [p for p in below(process) if "pipelines.prefect_server" in p.cmdline()]
        server.send_signal(signal.SIGKILL)
        (toy / "go").touch()
        run_url = f"{url}/flow_runs/{started.json()['id']}"
        ends = ("COMPLETED", "FAILED", "CRASHED")
        wait_until(lambda: HTTP.get(run_url).json()["state_type"] in ends)
        assert HTTP.get(run_url).json()["state_type"] == "COMPLETED"
        assert not server.is_running()
        assert versions(toy) == ["1"]

        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_S) == 0
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_releases_every_two_minutes_publish_only_what_passes(toy: Path) -> None:
    """Three come due by cron, one after another: a good candidate, a bad one, a better one."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "schedule", "--cron", "*/2 * * * *"],
        cwd=toy, env=environment_for(toy, DIGITS_PREFECT_PORT=str(port)), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    body = {
        "sort": "START_TIME_ASC",
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}},
    }

    def ended(count: int) -> list[dict]:
        try:
            runs = HTTP.post(f"{url}/flow_runs/filter", json=body).json()
        except httpx.TransportError:  # the server is still starting
            return []
        return runs if len(runs) >= count else []

    try:
        for at, (weights, accuracy) in enumerate((("first", 0.99), ("worse", 0.42), ("better", 0.98)), 1):
            (toy / "weights.txt").write_text(weights)
            (toy / "accuracy.txt").write_text(str(accuracy))
            runs = wait_until(lambda at=at: ended(at))
        assert [run["state_name"] for run in runs] == ["Completed", "Rejected", "Completed"]
        assert all(run["auto_scheduled"] for run in runs)
        minutes = [datetime.fromisoformat(run["expected_start_time"]).minute for run in runs]
        assert {minute % 2 for minute in minutes} == {0}
        assert [(b - a) % 60 for a, b in itertools.pairwise(minutes)] == [2, 2]
        assert versions(toy) == ["1", "2"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_S) == 0
    finally:
        process.kill()


def test_schedule_that_cron_does_not_know_is_refused(toy: Path, prefect_url: str) -> None:
    done = run(toy, "pipelines", "schedule", "--cron", "every night", PREFECT_API_URL=prefect_url)
    assert done.returncode == 1
    assert done.stderr == "error: expected cron's five fields, such as '0 3 * * *'; came 'every night'\n"


def test_prefect_server_that_is_not_there_is_named(toy: Path) -> None:
    """With the setting to look at."""
    done = run(
        toy, "pipelines", "release", PREFECT_API_URL="http://127.0.0.1:9/api", DIGITS_PREFECT_ANSWER_TIMEOUT_S="1"
    )
    assert done.returncode == 1
    assert "expected a Prefect server at http://127.0.0.1:9/api/health within 1 s" in done.stderr
    assert "PREFECT_API_URL" in done.stderr


def test_something_else_in_prefects_place_is_one_line(toy: Path) -> None:
    """Not what it sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\x00\xff garbage\nmore\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        done = run(toy, "pipelines", "await-prefect", PREFECT_API_URL=url)
        thread.join(20)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: PREFECT_API_URL: expected a Prefect server at {url}/health; what answers")
    assert "garbage" not in line


@pytest.mark.parametrize("command", ["ingest", "release", "publish", "schedule", "maintain", "restore", "run"])
def test_help_explains_each_command(command: str, toy: Path) -> None:
    done = run(toy, "pipelines", command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("words", "environment", "line"),
    [
        (["relaese"], {}, "relaese"),
        (["metrics", "--port", "70000"], {}, "--port"),
        (["history"], {"DIGITS_REST_PORT": "many"}, "DIGITS_REST_PORT='many'"),
        (["history"], {"DIGITS_PROJECT": "/no/such/folder"}, "DIGITS_PROJECT='/no/such/folder'"),
        (["release"], {"DIGITS_MIRRORS": "http://mirror"}, "DIGITS_MIRRORS"),
    ],
)
def test_wrong_usage_and_bad_settings_are_one_line_and_exit_code_2(
    toy: Path, words: list[str], environment: dict[str, str], line: str
) -> None:
    """What came and what is expected; nothing is made or changed."""
    done = run(toy, "pipelines", *words, **environment)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (toy / "run").exists()


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:many/api"])
def test_prefect_address_that_is_none_is_refused(toy: Path, url: str) -> None:
    done = run(toy, "pipelines", "release", PREFECT_API_URL=url)
    assert done.returncode == 1
    assert done.stderr.startswith("error: PREFECT_API_URL: expected an address such as")
    assert len(done.stderr.splitlines()) == 1
