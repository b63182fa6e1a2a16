"""A labelled batch becomes part of training and nothing else: checked, deduplicated, whole or not at all, recorded."""

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from digits.contract import DIGITS
from pipelines import versioning
from pipelines.additions import CHANGELOG
from pipelines.arrays import BadInput, idx_header, read_images, read_labels
from pipelines.batches import read_batch
from pipelines.dataset import digest_of
from pipelines.ingest import add_batch, ingest
from pipelines.settings import Settings
from pipelines.transaction import Transaction
from tests.pipelines.conftest import TEST, TRAIN, environment_for, run, write_idx


def npz(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    np.savez(path, images=images, labels=labels)
    return path


def files(settings: Settings) -> dict[str, bytes]:
    """Everything that makes a data version."""
    kept = [*settings.data_dir.iterdir(), *(settings.project / n for n in ("data.dvc", "params.yaml", CHANGELOG))]
    return {path.name: path.read_bytes() for path in kept if path.is_file()}


def require_consistent(settings: Settings, train_images: int) -> None:
    """Images, labels, params.yaml, data.dvc, cache and changelog tell the same story; the test files are as before."""
    assert len(read_images(settings.data_dir / "train-images-idx3-ubyte")) == train_images
    assert len(read_labels(settings.data_dir / "train-labels-idx1-ubyte")) == train_images
    validate = YAML(typ="safe").load((settings.project / "params.yaml").read_text())["validate"]
    assert validate["train_images"] == train_images
    assert validate["sha256"] == {p.name: digest_of(p) for p in settings.data_dir.iterdir()}
    with versioning.open_repo(settings) as repo:
        assert repo.status(targets=[str(settings.project / "data.dvc")]) == {}
        for name, path in versioning.cached_data_files(repo).items():
            assert path.read_bytes() == (settings.data_dir / name).read_bytes()
    if train_images > TRAIN:
        (*_, last) = YAML(typ="safe").load((settings.project / CHANGELOG).read_text())
        assert (last["data"], last["train_images"]) == (versioning.data_hash(settings), train_images)
    assert not (settings.run_dir / "addition").exists()


def test_batch_becomes_a_new_data_version(team: Settings, mnist: tuple, tmp_path: Path) -> None:
    """By the real command: rows appended, digests and count in params.yaml with its comments kept, told in JSON."""
    before, test_before = (team.project / "params.yaml").read_text(), files(team)["t10k-images-idx3-ubyte"]
    batch = npz(tmp_path / "batch.npz", mnist[0][1000:1100], mnist[1][1000:1100])
    done = run(team.project, "pipelines", "ingest", "--add", str(batch), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["added"], told["refused"], told["train_images"]) == (100, {}, TRAIN + 100)
    require_consistent(team, TRAIN + 100)
    added = read_images(team.data_dir / "train-images-idx3-ubyte")
    assert np.array_equal(added, np.concatenate([mnist[0][:TRAIN], mnist[0][1000:1100]]))
    assert files(team)["t10k-images-idx3-ubyte"] == test_before
    changed = [pair for pair in zip(before.splitlines(), read_params(team), strict=True) if pair[0] != pair[1]]
    assert len(changed) == 3
    (entry,) = YAML(typ="safe").load((team.project / CHANGELOG).read_text())
    assert (entry["source"], entry["added"], entry["was"]) == ("batch.npz", 100, told["was"])
    assert entry["added_by_digit"] == np.bincount(mnist[1][1000:1100], minlength=10).tolist()
    assert ingest(team).source == "already here"


def read_params(settings: Settings) -> list[str]:
    return (settings.project / "params.yaml").read_text().splitlines()


def test_each_row_is_added_or_refused_with_its_reason(team: Settings, mnist: tuple, tmp_path: Path) -> None:
    """Known from any split, repeated, contradictory, blank or without paper: refused by name; the rest is added."""
    train, labels, test, test_labels = mnist
    images = np.concatenate([train[500:506], train[7:8], train[8:9], test[3:4], train[500:501], train[501:502],
                             np.zeros((1, 28, 28), np.uint8), np.maximum(train[510:511], 9)])  # fmt: skip
    given = [*labels[500:506], labels[7], (labels[8] + 1) % 10, test_labels[3], labels[500], (labels[501] + 1) % 10, 0,
             labels[510]]  # fmt: skip
    done = add_batch(team, npz(tmp_path / "b.npz", images, np.array(given, np.int64)))
    assert {(one.name, one.reason) for one in done.refused} == {
        ("row 1", "has two labels in the batch"),
        ("row 6", "in the training images already"),
        ("row 7", "in the training images with another label"),
        ("row 8", "in the test images"),
        ("row 9", "repeats another of the batch"),
        ("row 10", "has two labels in the batch"),
        ("row 11", "blank"),
        ("row 12", "no paper"),
    }
    assert done.added == 5
    require_consistent(team, TRAIN + 5)
    rows = list(csv.DictReader((team.run_dir / "refused.csv").open()))
    assert {row["name"]: row["detail"] for row in rows}["row 8"] == "test row 3"
    assert add_batch(team, tmp_path / "b.npz").added == 0  # a second time there is nothing new
    require_consistent(team, TRAIN + 5)


def test_changed_copies_of_test_images_are_kept_out(team: Settings, mnist: tuple, tmp_path: Path) -> None:
    """Moved by a pixel, re-encoded or noisy: 98 % and more are refused, and of honest images 2 % at most."""
    test = mnist[2][:TEST]
    noise = np.random.default_rng(7).normal(0, 10, test.shape)
    copies = {
        "moved": np.roll(test, (1, 0), (1, 2)),
        "noisy": np.clip(test + noise, 0, 255).astype(np.uint8),
        "re-encoded": np.stack([jpeg(image) for image in test]),
    }
    for how, images in copies.items():
        images[:, 0, 0] = 0  # noise leaves no paper, which is a reason of its own
        done = add_batch(team, npz(tmp_path / "b.npz", images, mnist[3][:TEST]), dry_run=True)
        refused = sum(done.reasons.get(reason, 0) for reason in ("nearly a test image", "in the test images"))
        assert refused >= 0.98 * TEST, how
    done = add_batch(team, npz(tmp_path / "b.npz", mnist[0][1000:2000], mnist[1][1000:2000]), dry_run=True)
    assert len(done.refused) <= 20
    require_consistent(team, TRAIN)


def jpeg(image: np.ndarray) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=50)
    return np.asarray(Image.open(out))


def test_folders_of_pictures_and_idx_pairs_are_read(team: Settings, mnist: tuple, tmp_path: Path) -> None:
    """A picture that is none is refused by its path; a zipped IDX pair and plain labels come out equal."""
    pictures = tmp_path / "pictures"
    for row in range(600, 612):
        folder = pictures / str(mnist[1][row])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mnist[0][row]).save(folder / f"{row}.png")
    (pictures / str(mnist[1][600]) / "note.txt").write_text("not a picture")
    done = add_batch(team, pictures)
    assert (done.added, done.reasons) == (12, {"cannot be read": 1})
    assert done.refused[0].name == f"{mnist[1][600]}/note.txt"
    require_consistent(team, TRAIN + 12)

    pair = tmp_path / "pair"
    pair.mkdir()
    content = idx_header(9, 28, 28) + mnist[0][700:709].tobytes()
    (pair / "new-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    write_idx(pair / "new-labels-idx1-ubyte", mnist[1][700:709])
    batch = read_batch(pair, DIGITS)
    assert np.array_equal(batch.images, mnist[0][700:709])
    assert batch.labels.tolist() == mnist[1][700:709].tolist()


def bad_batches(folder: Path, images: np.ndarray, labels: np.ndarray) -> dict[str, tuple[Path, str]]:
    """Name -> a batch that must be refused as a whole, and what the error says."""
    wide = np.zeros((3, 28, 32), np.uint8)
    cut = folder / "cut"
    cut.mkdir()
    (cut / "a-images-idx3-ubyte").write_bytes(idx_header(3, 28, 28) + b"\0" * 2000)
    write_idx(cut / "a-labels-idx1-ubyte", labels[:3])
    letters = folder / "letters"
    (letters / "a").mkdir(parents=True)
    objects = folder / "objects.npz"
    np.savez(objects, images=np.array([{"a": 1}], dtype=object), labels=labels[:1])
    (folder / "text.npz").write_text("no archive")
    return {
        "inverted": (npz(folder / "i.npz", 255 - images, labels), "look inverted.*255 - images"),
        "a label of 10": (npz(folder / "l.npz", images, labels + 10), "labels are 0 to 9.*the first is"),
        "floats": (npz(folder / "f.npz", images / 255.0, labels), "holds float64; images are uint8.*astype"),
        "wide": (npz(folder / "w.npz", wide, labels[:3]), r"shape \(3, 28, 32\); expected \(N, 28, 28\)"),
        "one label short": (npz(folder / "s.npz", images, labels[:-1]), "50 images but 49 labels"),
        "cut short": (cut, "cut short: its header says"),
        "letters": (letters, "has a folder 'a'; expected one for each class"),
        "objects": (objects, "holds object"),
        "not an archive": (folder / "text.npz", "damaged"),
        "nothing": (folder / "absent", "is not there. Expected one of"),
    }


@pytest.mark.parametrize("kind", ["inverted", "a label of 10", "floats", "wide", "one label short", "cut short",
                                  "letters", "objects", "not an archive", "nothing"])  # fmt: skip
def test_doubtful_batch_is_refused_as_a_whole(team: Settings, mnist: tuple, tmp_path: Path, kind: str) -> None:
    """One line that says what was expected and what came; data, params.yaml and data.dvc are as they were."""
    path, said = bad_batches(tmp_path, mnist[0][900:950], mnist[1][900:950])[kind]
    before = files(team)
    with pytest.raises(BadInput, match=said) as caught:
        add_batch(team, path)
    assert "\n" not in str(caught.value)
    assert files(team) == before


KILLER = """
import os, signal, sys
from pathlib import Path
from pipelines.ingest import add_batch
from pipelines.settings import Settings
import dvc.repo, training.data

def watch(event, args):
    global left
    writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
    if (writes or event in ("os.rename", "os.remove", "os.rmdir")) and "project" in str(args[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

batch, *projects = sys.argv[1:]
for project in projects:  # the number at its end says before which file operation it is killed
    child = os.fork()
    if child == 0:
        left = int(project.rpartition("-")[2])
        sys.addaudithook(watch)
        os.chdir(project)
        add_batch(Settings(project=Path(project)), Path(batch))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else f"exit {os.waitstatus_to_exitcode(status)}")
"""


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_between_two_file_operations_the_next_run_has_old_or_new(
    team_template: Path, mnist: tuple, tmp_path: Path, every: int
) -> None:
    """Kill -9 before a write, rename or removal, each in turn: `ingest` finds one whole version or the other."""
    batch = npz(tmp_path / "batch.npz", mnist[0][800:810], mnist[1][800:810])
    projects = [
        Path(shutil.copytree(team_template, tmp_path / f"project-{at}", symlinks=True)) for at in range(1, 70, every)
    ]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(batch), *map(str, projects)],
        cwd=tmp_path, env=environment_for(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    outcomes = done.stdout.split("\n")[:-1]
    assert outcomes[-1] == "exit 0", f"more than 70 file operations: {done.stderr}"
    counts = []
    for project, outcome in zip(projects, outcomes, strict=True):
        settings = Settings(project=project)
        ingest(settings)
        counts.append(len(read_labels(settings.data_dir / "train-labels-idx1-ubyte")))
        require_consistent(settings, counts[-1])
        if outcome == "exit 0":
            break
    killed = outcomes.count("killed")
    assert set(counts[:killed]) == {TRAIN, TRAIN + 10}
    assert add_batch(Settings(project=projects[0]), batch).train_images == TRAIN + 10
    require_consistent(Settings(project=projects[0]), TRAIN + 10)


def test_transaction_that_was_not_decided_leaves_no_trace(tmp_path: Path) -> None:
    """And one that was is carried through, however often it is cut off."""
    (tmp_path / "a").write_text("old")
    transaction = Transaction(tmp_path / "t", tmp_path)
    transaction.begin()
    (tmp_path / "t" / "new").write_text("new")
    assert transaction.decided() is None
    transaction.decide({"new": "a"}, {"why": "test"})
    for _ in range(2):
        transaction.move()
        assert transaction.decided() == {"why": "test"}
    transaction.close()
    assert ((tmp_path / "a").read_text(), transaction.decided()) == ("new", None)


def test_without_git_or_on_a_full_disk_nothing_changes(team: Settings, mnist: tuple, tmp_path: Path) -> None:
    """A clear line each: no git repository; no room (here 1 MB files at most)."""
    batch = npz(tmp_path / "batch.npz", mnist[0][1000:3000], mnist[1][1000:3000])
    before = files(team)
    limited = f"ulimit -f 1000; exec {sys.executable} -m pipelines ingest --add {batch}"
    full = subprocess.run(
        ["bash", "-c", limited], cwd=team.project, env=environment_for(team.project), capture_output=True, text=True
    )
    assert full.returncode == 1
    assert "no space left" in full.stderr
    assert files(team) == before
    (team.project / ".git").rename(team.project / "git-away")
    with pytest.raises(versioning.VersioningError, match=r"expected a git repository.*git init"):
        add_batch(team, batch)
    assert files(team) == before
