"""Other data than MNIST go from a folder to an answer by changing data.dvc and params.yaml, and nothing else."""

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from pipelines import serving_config
from pipelines.arrays import BadInput
from pipelines.ingest import add_batch, ingest
from pipelines.promotion import promote
from pipelines.publish import publish
from pipelines.run import model_server_command
from pipelines.scoring.job import finish, plan, score_shard
from pipelines.scoring.scorers import GATEWAY, Spec, count_classes
from pipelines.settings import Settings
from pipelines.smoke import ask_model_server
from pipelines.versions import newest_version
from serving.client import GrpcClient, RestClient
from tests import fashion
from tests.conftest import ANY_ROBUSTNESS, HANG_S, ROOT, change_params, clean_environment, copy_checkout
from tests.docs.commands import documented
from tests.pipelines.conftest import run
from tests.ports import free_ports
from tests.stack.conftest import wait_until_ready

FASHION = "tests/pipelines/test_other_data.py::test_fashion_mnist_goes_all_the_way"
LETTERS = ("A", "K", "M", "&")
TRAIN, TEST = 80, 25
"""Pictures of each letter."""


@dataclass
class Served:
    """A project with other data whose model is served."""

    project: Path
    settings: Settings
    rest_url: str
    grpc_address: str

    def metrics(self) -> dict:
        return json.loads((self.project / "artifacts" / "evaluate" / "metrics.json").read_text())


def draw_letters(data: Path) -> None:
    """Pictures of letters, each turned, placed and sized by chance: black on white, or white on black."""
    rng = np.random.default_rng(5)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for letter in LETTERS:
            folder = data / split / letter
            folder.mkdir(parents=True)
            for number in range(count):
                sheet = Image.new("L", (64, 64), 255)
                font = ImageFont.load_default(float(rng.uniform(28, 44)))
                place = tuple(rng.uniform(28, 36, 2))
                ImageDraw.Draw(sheet).text(place, letter, fill=0, font=font, anchor="mm")
                sheet = sheet.rotate(rng.uniform(-15, 15), fillcolor=255, resample=Image.Resampling.BILINEAR)
                pixels = np.asarray(sheet) if rng.random() < 0.7 else 255 - np.asarray(sheet)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def about_letters(params: dict) -> None:
    """A small network too: the rest of params.yaml is as it comes."""
    params["data"] = {"format": "folder", "classes": list(LETTERS)}
    params["validate"] |= {
        "sha256": {}, "train_images": len(LETTERS) * TRAIN, "test_images": len(LETTERS) * TEST,
        "class_share": [0.2, 0.3], "ink_share": [0.05, 0.3], "features": {},
    }  # fmt: skip
    params["prepare"]["validation_images"] = 40
    params["model"]["hidden_widths"] = [64]
    params["train"] |= {"epochs": 6, "batch_size": 20}
    params["evaluate"] |= {"robustness_images": 20, "nondigit_images": 16}
    params["gate"] |= {"min_accuracy": 0.9, "min_macro_f1": 0.9, "min_class_recall": 0.8, "max_nll": 0.5}
    params["gate"]["robustness"] = dict(ANY_ROBUSTNESS)


def build_and_serve(project: Path, stack: contextlib.ExitStack) -> Served:
    """`dvc add data`, `dvc repro`, publish; then model server and gateway, a process each, and promote."""
    for words in (("dvc", "add", "-q", "data"), ("dvc", "repro")):
        done = run(project, *words)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    grpc, rest, gateway_rest, gateway_grpc = free_ports(4)
    settings = Settings(
        project=project, model_server_port=grpc, model_server_rest_port=rest,
        model_server_url=f"http://127.0.0.1:{rest}",
    )  # fmt: skip
    publish(settings)
    environment = clean_environment(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1", PYTHONPATH=str(ROOT))
    gateway = {
        "DIGITS_REST_PORT": str(gateway_rest), "DIGITS_GRPC_PORT": str(gateway_grpc),
        "DIGITS_UPSTREAM": f"127.0.0.1:{grpc}", "DIGITS_MODEL_LABEL": serving_config.LABEL,
    }  # fmt: skip
    log = project / "run" / "servers.log"
    log.parent.mkdir(exist_ok=True)
    for command in (model_server_command(settings), [sys.executable, "-m", "serving.gateway"]):
        sink = stack.enter_context(log.open("a"))
        process = subprocess.Popen(command, cwd=ROOT, env=environment | gateway, stdout=sink, stderr=sink)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
    rest_url = f"http://127.0.0.1:{gateway_rest}"
    wait_until_ready(rest_url, process, log, 120)
    promote(settings, 1)
    deadline = time.monotonic() + HANG_S
    while RestClient(rest_url).classify(bytes(392) + b"\xff" * 392).model_version != "1":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return Served(project, settings, rest_url, f"127.0.0.1:{gateway_grpc}")


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Four letters, as a folder of pictures for each."""
    project = copy_checkout(tmp_path_factory.mktemp("letters") / "project")
    draw_letters(project / "data")
    change_params(project, about_letters)
    with contextlib.ExitStack() as stack:
        yield build_and_serve(project, stack)


def test_only_data_dvc_and_params_yaml_are_changed(letters: Served) -> None:
    """By the team; dvc.lock is what DVC then records."""
    listing = subprocess.run(
        ["git", "status", "--porcelain"], cwd=letters.project, check=True, capture_output=True, text=True
    ).stdout
    assert {line[3:] for line in listing.splitlines()} == {"data.dvc", "params.yaml", "dvc.lock"}


def test_pictures_of_letters_are_named_over_rest_and_grpc(letters: Served) -> None:
    """Every picture of the test folder, sent as it lies there: as many are right as the evaluation measured."""
    test = letters.project / "data" / "test"
    files = [(label, path) for label, name in enumerate(LETTERS) for path in sorted((test / name).iterdir())]
    with RestClient(letters.rest_url) as rest, GrpcClient(letters.grpc_address) as grpc:
        answers = [rest.classify(path.read_bytes()) for _, path in files]
        again = [grpc.classify(path.read_bytes()) for _, path in files[::10]]
    assert {len(answer.probabilities) for answer in answers} == {4}
    assert all(answer.label == LETTERS[answer.digit] for answer in answers)
    right = np.mean([answer.digit == label for answer, (label, _) in zip(answers, files, strict=True)])
    assert right == pytest.approx(letters.metrics()["accuracy"])
    assert right > 0.9
    for one, other in zip(again, answers[::10], strict=True):
        assert (one.label, one.digit) == (other.label, other.digit)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_tables_and_lineage_call_classes_by_their_names(letters: Served) -> None:
    artifacts = letters.project / "artifacts"
    rows = (artifacts / "evaluate" / "classes.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == list(LETTERS)
    assert json.loads((artifacts / "validate" / "report.json").read_text())["classes"] == list(LETTERS)
    version = newest_version(letters.settings.versions_dir)
    assert version is not None
    assert version.lineage["params"]["data"] == {"format": "folder", "classes": list(LETTERS)}
    assert ask_model_server(letters.settings, version) > 0


def test_batch_scoring_has_a_column_for_each_class(letters: Served, tmp_path: Path) -> None:
    """A row without an answer has empty ones."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "no.png").write_bytes(b"no picture")
    (folder / "a.png").write_bytes(next((letters.project / "data/test/K").iterdir()).read_bytes())
    spec = Spec(GATEWAY, letters.rest_url)
    assert count_classes(spec) == count_classes(Spec("model", str(letters.settings.versions_dir / "1"))) == 4
    job = plan(folder, tmp_path / "out.csv", spec, probabilities=True)
    score_shard(job.folder, 0)
    tally = finish(job, tmp_path / "out.csv", 4)
    assert (tally.rows, tally.failed, len(tally.by_digit)) == (2, 1, 4)
    head, first, second = (tmp_path / "out.csv").read_text().splitlines()
    assert head.endswith("error,p0,p1,p2,p3")
    assert first.startswith("0,a.png,1,")
    assert second.endswith(",,,,")


def test_a_picture_that_is_lost_comes_back(letters: Served) -> None:
    """Ingest, with which a release begins, gets it from the DVC cache, and takes the rest as it is."""
    lost = letters.project / "data" / "train" / "M" / "7.png"
    content = lost.read_bytes()
    lost.unlink()
    assert ingest(letters.settings).source == "DVC cache"
    assert lost.read_bytes() == content
    assert ingest(letters.settings).source == "already here"


def test_a_batch_is_added_to_pictures_by_hand(letters: Served) -> None:
    """`ingest --add` appends to IDX files; for a folder it says what to do, and changes nothing."""
    before = (letters.project / "data.dvc").read_text()
    with pytest.raises(BadInput, match="put the pictures into data/train/CLASS yourself, then dvc add data"):
        add_batch(letters.settings, letters.project / "data" / "test")
    assert (letters.project / "data.dvc").read_text() == before


@pytest.mark.slow
def test_fashion_mnist_goes_all_the_way(tmp_path: Path) -> None:
    """60,000 + 10,000 garments with the network of the quick profile; its accuracy is printed."""
    fashion.require()
    project = copy_checkout(tmp_path / "project")
    for command in documented(FASHION):
        subprocess.run(["bash", "-euc", command.text], cwd=project, check=True)
    change_params(project, lambda params: fashion.describe(params, 60_000, 10_000, 5_000))
    images, labels = fashion.images_of(project / "data")
    with contextlib.ExitStack() as stack:
        served = build_and_serve(project, stack)
        found = []
        with RestClient(served.rest_url) as rest:
            for image in images[:500]:
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, "PNG")
                found.append(rest.classify(stream.getvalue()))
    assert all(answer.label == fashion.GARMENTS[answer.digit] for answer in found)
    assert np.mean([answer.digit for answer in found] == labels[:500]) > 0.85
    metrics = served.metrics()
    print(
        f"\nFashion-MNIST: {metrics['accuracy']:.2%} right ({metrics['accuracy_low']:.2%} to "
        f"{metrics['accuracy_high']:.2%}, n = {metrics['test_images']:,}), macro F1 {metrics['macro_f1']:.4f}"
    )
    assert metrics["accuracy"] > 0.88
