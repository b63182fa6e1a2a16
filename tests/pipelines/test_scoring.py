"""Batch scoring: one row out for each row in, whatever the input holds and whoever is killed meanwhile."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from digits.image import read_digit
from pipelines import prefect_server
from pipelines.arrays import BadInput, idx_header
from pipelines.scoring.job import JobError, Tally, finish, plan, profile_shard, require_plausible, score_shard
from pipelines.scoring.scorers import GatewayScorer, ScorerUnavailable, ScoringFailed, Spec, count_classes, spec_of
from pipelines.settings import Settings
from tests.conftest import HANG_S, running_below
from tests.pipelines.conftest import environment_for
from tests.serving.gateway.conftest import Here, LoopThread, start_gateway, stop_gateway
from tests.serving.gateway.upstream_server import expected_probabilities


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    """A running gateway; its model's digit is an image's first pixel modulo 10."""
    gateway = start_gateway(LoopThread())
    yield gateway
    stop_gateway(gateway)


def images_with(count: int) -> np.ndarray:
    """uint8 (N, 28, 28), a tenth ink; the first pixel is the row's number modulo 256, so that each has its answer."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 5:13, 10:20] = 255
    images[:, 0, 0] = np.arange(count) % 256
    images[:, 0, 1] = np.arange(count) // 256 % 256
    return images


def score(source: Path, output: Path, here: Here, **options: object) -> Tally:
    """The whole job in this process, without Prefect."""
    job = plan(source, output, Spec("gateway", here.url), **options)  # type: ignore[arg-type]
    for shard in job.missing():
        score_shard(job.folder, shard)
    return finish(job, output, 10)


def rows_of(output: Path) -> list[dict[str, str]]:
    with output.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def require_each_row_once(output: Path, images: np.ndarray) -> None:
    rows = rows_of(output)
    assert [int(row["row"]) for row in rows] == list(range(len(images)))
    assert [int(row["digit"]) for row in rows] == (images[:, 0, 0] % 10).tolist()
    confidence = expected_probabilities(images.reshape(-1, 784)).max(axis=1)
    assert np.allclose([float(row["confidence"]) for row in rows], confidence, atol=1e-5)


def write_npy(path: Path, images: np.ndarray) -> None:
    np.save(path, images.reshape(-1, 784))


def write_npz(path: Path, images: np.ndarray) -> None:
    np.savez_compressed(path, images=images[..., None])


def write_idx(path: Path, images: np.ndarray) -> None:
    path.write_bytes(idx_header(*images.shape) + images.tobytes())


def write_idx_gz(path: Path, images: np.ndarray) -> None:
    path.write_bytes(gzip.compress(idx_header(*images.shape) + images.tobytes(), 1))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.npy", write_npy), ("a.npz", write_npz), ("a-images-idx3-ubyte", write_idx), ("a-idx3-ubyte.gz", write_idx_gz)],
    ids=["npy", "npz", "idx", "idx.gz"],
)
def test_each_kind_of_array_file_is_scored_row_by_row(
    here: Here, tmp_path: Path, name: str, write: Callable[[Path, np.ndarray], None]
) -> None:
    """In order, over shards that do not divide it evenly; nothing is left beside the output."""
    images = images_with(2500)
    write(tmp_path / name, images)
    tally = score(tmp_path / name, tmp_path / "out.csv", here, shard_rows=999)
    assert (tally.rows, tally.failed, tally.versions) == (2500, 0, ("3",))
    assert sum(tally.by_digit) == 2500
    require_each_row_once(tmp_path / "out.csv", images)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.csv"])


def test_bad_pictures_get_a_row_with_their_error(here: Here, tmp_path: Path) -> None:
    """A folder with subfolders: every file has its row, by name; what is no picture says so; JSON lines on request."""
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    images = images_with(20)
    for row in range(1, 20):  # the first has no pixel that tells its digit
        Image.fromarray(images[row]).save(folder / "more" / f"{row:02}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (folder / "notes, mine.txt").write_text("not a picture")
    Image.new("L", (28, 28), 255).save(folder / "blank.png")
    tally = score(folder, tmp_path / "out.jsonl", here, shard_rows=7, probabilities=True)
    assert (tally.rows, tally.failed) == (22, 3)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(22))
    assert [row["name"] for row in rows if "error" in row] == ["blank.png", "broken.png", "notes, mine.txt"]
    assert all(row["error"].startswith(("bad_image: ", "unsupported_media_type: ")) for row in rows if "error" in row)
    for row in (row for row in rows if "error" not in row):
        image = read_digit((folder / row["name"]).read_bytes())
        assert row["digit"] == image[0, 0] % 10
        assert row["confidence"] == pytest.approx(max(row[f"p{digit}"] for digit in range(10)), abs=1e-5)


def test_blank_rows_of_an_array_are_not_guessed_at(here: Here, tmp_path: Path) -> None:
    """As the gateway refuses a blank picture."""
    images = images_with(10)
    images[4] = 7
    np.save(tmp_path / "a.npy", images)
    assert score(tmp_path / "a.npy", tmp_path / "out.csv", here).failed == 1
    row = rows_of(tmp_path / "out.csv")[4]
    assert (row["row"], row["digit"], row["error"]) == ("4", "", "bad_image: nothing is drawn on it")


def test_inverted_images_are_stopped_before_the_first_answer(here: Here, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", 255 - images_with(100))
    job = plan(tmp_path / "a.npy", tmp_path / "out.csv", Spec("gateway", here.url), shard_rows=50)
    with pytest.raises(BadInput, match=r"look inverted\. Score 255 - images"):
        require_plausible([profile_shard(job.folder, shard) for shard in job.shards])


def test_input_that_cannot_be_scored_is_said_at_once(here: Here, tmp_path: Path) -> None:
    """Floats, a wrong shape, a file cut short, an empty folder, an unknown output: one line each, no output."""
    np.save(tmp_path / "floats.npy", np.zeros((2, 28, 28)))
    np.save(tmp_path / "wide.npy", np.zeros((2, 28, 30), np.uint8))
    (tmp_path / "cut-idx3-ubyte").write_bytes(idx_header(5, 28, 28) + b"\0" * 100)
    (tmp_path / "cut-idx3-ubyte.gz").write_bytes(gzip.compress(idx_header(5, 28, 28) + b"\0" * 1000)[:-9])
    (tmp_path / "empty").mkdir()
    faults = {
        "floats.npy": "holds float64; images are uint8", "wide.npy": r"shape \(2, 28, 30\)", "absent": "is not there",
        "cut-idx3-ubyte": "has 116 bytes; its header says", "cut-idx3-ubyte.gz": "cut short", "empty": "is empty",
    }  # fmt: skip
    for name, said in faults.items():
        with pytest.raises(BadInput, match=said):
            plan(tmp_path / name, tmp_path / "out.csv", Spec("gateway", here.url))
    with pytest.raises(JobError, match=r"out\.xls ends in \.xls; expected one of \.csv, \.jsonl"):
        plan(tmp_path / "floats.npy", tmp_path / "out.xls", Spec("gateway", here.url))
    assert not (tmp_path / "out.csv").exists()


def test_finished_output_and_other_settings_are_not_overwritten_unasked(here: Here, tmp_path: Path) -> None:
    """An unfinished job goes on only with the same input; a changed input, or a finished output, needs --overwrite."""
    source, output = tmp_path / "a.npy", tmp_path / "out.csv"
    np.save(source, images_with(100))
    job = plan(source, output, Spec("gateway", here.url), shard_rows=50)
    score_shard(job.folder, 1)
    assert plan(source, output, Spec("gateway", "http://elsewhere"), shard_rows=50).missing() == [0]
    np.save(source, images_with(150))
    with pytest.raises(JobError, match="unfinished job with another input"):
        plan(source, output, Spec("gateway", here.url), shard_rows=50)
    assert score(source, output, here, shard_rows=50, overwrite=True).rows == 150
    with pytest.raises(JobError, match="is there already"):
        plan(source, output, Spec("gateway", here.url))


def test_damaged_part_is_named_and_not_joined(here: Here, tmp_path: Path) -> None:
    """Rows that are not those that are due: the output does not appear."""
    np.save(tmp_path / "a.npy", images_with(100))
    job = plan(tmp_path / "a.npy", tmp_path / "out.csv", Spec("gateway", here.url), shard_rows=50)
    for shard in job.shards:
        score_shard(job.folder, shard)
    text = job.part(1).read_text()
    for spoiled, said in (
        (job.part(0).read_text(), "where row 50 is due"),
        (text[: text.index("\n99,") + 1], "cut short"),
    ):
        job.part(1).write_text(spoiled)
        with pytest.raises(JobError, match=said):
            finish(job, tmp_path / "out.csv", 10)
        assert not (tmp_path / "out.csv").exists()


def test_gateway_that_comes_back_is_waited_for_and_one_that_is_none_is_named(here: Here) -> None:
    """Overload and absence pass; an answer that is no gateway's does not."""
    images = images_with(3)
    with pytest.raises(ScorerUnavailable, match=r"the gateway at http://127\.0\.0\.1:9 cannot be reached"):
        count_classes(Spec("gateway", "http://127.0.0.1:9"))
    here.thread.run(here.upstream.stop())
    try:
        with pytest.raises(ScorerUnavailable, match=r"answered 503 .*is a model served"):
            GatewayScorer(here.url, attempts=1).score(images)
    finally:
        here.thread.run(here.upstream.start(here.upstream.port))
    assert GatewayScorer(here.url).score(images).probabilities.argmax(axis=1).tolist() == [0, 1, 2]


def test_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    """Nothing promoted, or a folder without one: with what to do."""
    with pytest.raises(ScoringFailed, match=r"no version in .*models/digits is promoted\. Run: python -m pipelines"):
        spec_of(Settings(project=tmp_path), "model", None)
    with pytest.raises(ScoringFailed, match=r"expected a SavedModel in .*; there is none"):
        spec_of(Settings(project=tmp_path), "model", str(tmp_path))


def test_killed_job_goes_on_and_a_killed_dask_worker_loses_no_row(
    here: Here, toy: Path, tmp_path: Path, prefect_url: str
) -> None:
    """Kill -9 of the command midway; run again on Dask with two worker processes, one of them killed midway too.

    What was scored before is not scored again, and every row is there once, with its answer.
    """
    images = images_with(16_000)
    np.save(tmp_path / "a.npy", images)
    output = tmp_path / "out.csv"
    parts = tmp_path / "out.csv.job" / "parts"
    command = [
        sys.executable, "-m", "pipelines", "score", str(tmp_path / "a.npy"), "-o", str(output),
        "--where", here.url, "--shard-rows", "1000", "--json",
    ]  # fmt: skip
    here.behaviour.delay_s = 0.4  # a shard takes long enough to be cut off in

    first = subprocess.Popen(command, cwd=toy, env=environment_for(toy, PREFECT_API_URL=prefect_url))
    wait_for(lambda: len(list(parts.glob("0*.csv"))) >= 3, first)
    first.send_signal(signal.SIGKILL)
    first.wait(HANG_S)
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*.csv")}
    assert 3 <= len(kept) < 12
    assert not output.exists()

    environment = environment_for(toy, PREFECT_API_URL=prefect_url, DIGITS_TASK_RUNNER="dask")
    second = subprocess.Popen(command, cwd=toy, env=environment, stdout=subprocess.PIPE, text=True)
    mtimes: dict[str, int] = {}

    def some_are_new() -> bool:
        mtimes.update({path.name: path.stat().st_mtime_ns for path in parts.glob("0*.csv")})
        return len(mtimes) >= len(kept) + 2

    wait_for(some_are_new, second)
    workers = [p for p, line in running_below(second.pid) if "spawn_main" in line and psutil.pid_exists(p.pid)]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    said, _ = second.communicate(timeout=HANG_S)
    assert second.returncode == 0
    told = json.loads(said.splitlines()[-1])
    assert (told["rows"], told["failed"], told["rows_by_this_run"]) == (16_000, 0, 16_000 - 1000 * len(kept))
    assert {name: mtimes[name] for name in kept} == kept
    require_each_row_once(output, images)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, limit_s: float = 180) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, f"the command ended by itself: {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One temporary Prefect server, as the product starts it."""
    settings = Settings(project=tmp_path_factory.mktemp("prefect"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        prefect_server.prepare_environment(settings)
        with prefect_server.server(settings):
            prefect_server.wait_until_ready(settings)
            yield os.environ["PREFECT_API_URL"]
