"""What the validate stage does with data: what it writes, what it stops at, what it only tells."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.training.conftest import ROOT, make_workspace, write_raw
from training.data import BadRawData
from training.prepare import prepare
from training.validate import DataNotValid, validate
from training.workspace import BadArtifact, Split, Workspace

Poison = Callable[[Split, Split], tuple[Split, Split]]


def read_report(workspace: Workspace) -> dict:
    return json.loads((workspace.root / "artifacts/validate/report.json").read_text())


def read_quarantine(workspace: Workspace) -> list[dict[str, str]]:
    with (workspace.root / "artifacts/validate/quarantine.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_real_data_are_valid_and_leave_a_report_and_docs_that_load_nothing(
    tmp_path: Path, real: dict[str, Split], quiet: Console
) -> None:
    workspace, params = make_workspace(tmp_path, real)
    validate(workspace, params, quiet)
    report = read_report(workspace)
    assert report["valid"] is True
    assert report["images"] == {"train": 1500, "test": 300}
    assert not [f for f in report["findings"] if not f["passed"] and f["severity"] == "stop"]
    out = tmp_path / "artifacts/validate"
    pages = sorted((out / "data_docs").glob("*.html"))
    assert [page.stem for page in pages] == ["classes", "drift", "files", "index", "test", "train"]
    for page in pages:
        text = page.read_text()
        assert not any(word in text for word in ("<script", "<img", "<link", "<iframe", "http:", "https:", "url("))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["train"]["images"] == 1500
    assert metrics["failed_stop"] == 0
    assert metrics["quarantined"] == len(read_quarantine(workspace))
    assert "passed" in (out / "report.md").read_text().splitlines()[0]
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.format == "PNG"


def test_the_same_data_leave_the_same_bytes(tmp_path: Path, real: dict[str, Split], quiet: Console) -> None:
    """DVC goes by hashes: a run that finds the same must not look like another one."""
    contents = []
    for name in ("once", "again"):
        workspace, params = make_workspace(tmp_path / name, real)
        validate(workspace, params, quiet)
        out = tmp_path / name / "artifacts/validate"
        contents.append({p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 11


def label_out_of_range(train: Split, test: Split) -> tuple[Split, Split]:
    labels = train.labels.copy()
    labels[1234] = 12
    return Split(train.images, labels), test


def blank_image(train: Split, test: Split) -> tuple[Split, Split]:
    images = train.images.copy()
    images[77] = 0
    return Split(images, train.labels), test


def inverted(train: Split, test: Split) -> tuple[Split, Split]:
    return Split(255 - train.images, train.labels), test


def repeated(train: Split, test: Split) -> tuple[Split, Split]:
    images = train.images.copy()
    images[200] = images[100]
    return Split(images, train.labels), test


def leaked(train: Split, test: Split) -> tuple[Split, Split]:
    images = test.images.copy()
    images[42] = train.images[42]
    return train, Split(images, test.labels)


def one_digit_only(train: Split, test: Split) -> tuple[Split, Split]:
    return Split(train.images, np.full_like(train.labels, 7)), test


def too_few(train: Split, test: Split) -> tuple[Split, Split]:
    return train, Split(test.images[:299], test.labels[:299])


@pytest.mark.parametrize(
    ("poison", "said", "listed"),
    [
        (label_out_of_range, ["labels are 0 to 9", "12", "1234"], ("train", 1234, "none of 0 to 9")),
        (blank_image, ["no image is blank", "77"], ("train", 77, "nearly blank")),
        (inverted, ["ink is as dark", "0.1 to 0.16", "0.8"], ("train", 0, "border_ink")),
        (repeated, ["images do not repeat", "200"], ("train", 200, "the same picture as row 100")),
        (leaked, ["test images are not in the training file", "42"], ("test", 42, "training row 42")),
        (one_digit_only, ["every class occurs", "about equally common"], None),
        (too_few, ["as many images as expected", "300", "299"], None),
    ],
)
def test_poisoned_data_stop_the_pipeline_with_a_readable_table(
    tmp_path: Path, real: dict[str, Split], poison: Poison, said: list[str], listed: tuple[str, int, str] | None
) -> None:
    workspace, params = make_workspace(tmp_path, real)
    train, test = real["train"], real["test"]
    write_raw(
        workspace.raw_dir,
        *poison(Split(train.images[:1500], train.labels[:1500]), Split(test.images[:300], test.labels[:300])),
    )
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(DataNotValid) as caught:
        validate(workspace, params, console)
    table = console.file.getvalue()
    for words in said:
        assert words in table
    assert "\n" not in str(caught.value)
    assert (tmp_path / "artifacts/validate/data_docs/index.html").exists()
    assert "stopped" in (tmp_path / "artifacts/validate/report.md").read_text().splitlines()[0]
    assert read_report(workspace)["valid"] is False
    if listed:
        split, row, reason = listed
        (reasons,) = [q["reasons"] for q in read_quarantine(workspace) if (q["split"], q["row"]) == (split, str(row))]
        assert reason in reasons
    with pytest.raises(BadArtifact, match="not valid"):
        prepare(workspace, params, console)


def test_what_may_only_warn_lets_the_pipeline_go_on(tmp_path: Path, real: dict[str, Split], quiet: Console) -> None:
    """The severity of a rule is in params.yaml."""
    workspace, params = make_workspace(tmp_path, real, **{"validate.severity.duplicates": "warn"})
    train, test = real["train"], real["test"]
    write_raw(
        workspace.raw_dir,
        *repeated(Split(train.images[:1500], train.labels[:1500]), Split(test.images[:300], test.labels[:300])),
    )
    validate(workspace, params, quiet)
    report = read_report(workspace)
    assert report["valid"] is True
    assert report["verdict"] == "warned"
    assert [f["about"] for f in report["findings"] if f["column"] == "repeats" and not f["passed"]] == ["train"]


def test_killed_before_its_end_it_leaves_no_report(tmp_path: Path, real: dict[str, Split], quiet: Console) -> None:
    """An old report must not vouch for data that were never looked at."""
    workspace, params = make_workspace(tmp_path, real)
    (workspace.stage_dir("validate") / "report.json").write_text('{"valid": true}')
    (workspace.raw_dir / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(BadRawData, match="missing"):
        validate(workspace, params, quiet)
    with pytest.raises(BadArtifact, match="validate"):
        prepare(workspace, params, quiet)


def test_a_flipped_byte_is_caught_by_the_known_hash(tmp_path: Path, real: dict[str, Split]) -> None:
    known = {"train-images-idx3-ubyte": "0" * 64}
    workspace, params = make_workspace(tmp_path, real, **{"validate.sha256": known})
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(DataNotValid, match="each file has its SHA-256"):
        validate(workspace, params, console)
    assert "train-images-idx3-ubyte: SHA-256" in console.file.getvalue()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_an_emptied_file_is_named(tmp_path: Path, real: dict[str, Split], quiet: Console, name: str) -> None:
    workspace, params = make_workspace(tmp_path, real)
    (workspace.raw_dir / name).write_bytes(b"")
    with pytest.raises(BadRawData, match=f"{name} is empty"):
        validate(workspace, params, quiet)


def test_a_file_without_images_is_refused(tmp_path: Path, real: dict[str, Split]) -> None:
    workspace, params = make_workspace(tmp_path, real)
    none = Split(np.zeros((0, 28, 28), np.uint8), np.zeros(0, np.int64))
    write_raw(workspace.raw_dir, none, none)
    with pytest.raises(DataNotValid, match="expectations about the raw data failed"):
        validate(workspace, params, Console(file=io.StringIO()))


def test_the_command_ends_with_one_line_and_exit_code_1(tmp_path: Path, real: dict[str, Split]) -> None:
    """A person sees what is wrong and how to mend it; no traceback."""
    workspace, _ = make_workspace(tmp_path, real)
    with (workspace.raw_dir / "train-images-idx3-ubyte").open("r+b") as file:
        file.truncate(1000)
    done = subprocess.run(
        [sys.executable, "-m", "training", "--root", str(tmp_path), "validate"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "DO_NOT_TRACK": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "train-images-idx3-ubyte is cut short" in done.stderr
    assert "python -m pipelines ingest" in done.stderr
