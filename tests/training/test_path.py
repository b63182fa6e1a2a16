"""From raw data to an exported model in small: prepare, train, twin, evaluate, gate, export, verify."""

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from ruamel.yaml import YAML

from digits import contract
from tests import fashion
from tests.training.conftest import make_workspace, small_params
from training.params import Params, load_params
from training.workspace import BadArtifact, Split, Workspace, import_tensorflow_quietly, load_split, save_split

QUIET = Console(file=io.StringIO())


@dataclass
class Run:
    """A finished run of all stages."""

    workspace: Workspace
    params: Params

    def json(self, stage: str, name: str) -> dict[str, Any]:
        return json.loads((self.workspace.root / "artifacts" / stage / name).read_text())

    @property
    def saved_model(self) -> Path:
        return self.workspace.root / "artifacts/export/saved_model"


def run_stages(workspace: Workspace, params: Params, *names: str) -> None:
    import_tensorflow_quietly()
    from training.evaluate import evaluate
    from training.export import export
    from training.gate import gate
    from training.prepare import prepare
    from training.probe import probe
    from training.train import train
    from training.twin import twin

    stages = {
        "prepare": prepare,
        "train": train,
        "twin": twin,
        "evaluate": evaluate,
        "probe": probe,
        "gate": gate,
        "export": export,
    }
    for name in names or stages:
        stages[name](workspace, params, QUIET)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, real: dict[str, Split]) -> Iterator[Run]:
    """All stages on 1,200 + 300 + 300 images: a network of 64-32, three epochs."""
    folder = tmp_path_factory.mktemp("run")
    workspace, params = make_workspace(folder, real)
    (workspace.stage_dir("validate") / "report.json").write_text('{"valid": true}')
    run_stages(workspace, params)
    return Run(workspace, params)


def test_a_few_hundred_digits_are_learnt(done: Run) -> None:
    """Three epochs on 1,200 images read most of the 300 test images."""
    assert done.json("evaluate", "metrics.json")["accuracy"] > 0.75


def test_every_output_that_dvc_expects_is_there(done: Run) -> None:
    from ruamel.yaml import YAML

    from tests.training.conftest import ROOT

    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        for out in [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]:
            if name != "validate":
                assert (done.workspace.root / out).exists(), out


def test_nothing_is_left_half_written(done: Run) -> None:
    assert not [path for path in (done.workspace.root / "artifacts").rglob("*") if ".part" in path.name]


def test_one_identity_goes_from_training_to_export(done: Run) -> None:
    found = {
        done.json("train", "training.json")["model_sha256"],
        done.json("evaluate", "metrics.json")["model_sha256"],
        done.json("gate", "decision.json")["candidate"]["model_sha256"],
        done.json("gate", "approval.json")["model_sha256"],
        done.json("export", "export.json")["model_sha256"],
    }
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_history_has_a_row_an_epoch(done: Run) -> None:
    rows = (done.workspace.root / "artifacts/train/history.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss,accuracy,validation_loss,validation_accuracy,learning_rate,seconds"
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3"]


def test_predictions_agree_with_metrics_and_confusion(done: Run) -> None:
    folder = done.workspace.root / "artifacts/evaluate"
    with np.load(folder / "predictions.npz") as saved:
        predicted = saved["probabilities"].argmax(axis=1)
        labels = saved["labels"]
    metrics = done.json("evaluate", "metrics.json")
    assert metrics["errors"] == (predicted != labels).sum()
    assert metrics["test_images"] == 300
    table = (folder / "confusion.csv").read_text().splitlines()
    assert table[0] == "actual,predicted"
    assert table[1] == f"{labels[0]},{predicted[0]}"
    assert len(table) == 301


def test_the_temperature_is_fitted_on_validation_images_and_is_in_the_export(done: Run) -> None:
    """Divided by it, validation answers are likelier than undivided, and the SavedModel's are the divided ones."""
    from training.model import build_predict, load_model
    from training.train import score
    from training.verify import predict_saved_model

    model = load_model(done.workspace.artifact("train", "model.keras"))
    held_out = load_split(done.workspace.artifact("prepare", "validation.npz"))
    layer = model.get_layer("calibration")
    temperature = float(layer.temperature)
    calibrated = build_predict(model)(held_out.images)
    served, _ = predict_saved_model(done.saved_model, held_out.images)
    assert np.abs(served - calibrated).max() < 1e-4
    layer.temperature.assign(1.0)
    plain, _ = score(build_predict(model)(held_out.images), held_out.labels)
    assert temperature != 1.0
    assert score(calibrated, held_out.labels)[0] < plain
    assert done.json("train", "training.json")["temperature"] == pytest.approx(temperature, abs=1e-4)


def test_the_report_shows_every_mistake_and_stands_alone(done: Run) -> None:
    """One page, nothing loaded from anywhere; as many pictures of mistakes as metrics.json counts."""
    page = (done.workspace.root / "artifacts/evaluate/report.html").read_text()
    metrics = done.json("evaluate", "metrics.json")
    assert page.count("read as") == metrics["errors"] > 0
    assert f"{100 * metrics['accuracy']:.2f} % of 300 test images read right" in page
    # A picture's base64 may spell it by chance: once in a dozen reports it does.
    assert "http" not in re.sub(r'"data:image/png;base64,[A-Za-z0-9+/=]*"', "", page)
    assert all(uri.startswith("data:image/png;base64,") for uri in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_the_report_tells_of_the_twin_and_of_the_looks(done: Run) -> None:
    """How long each was trained, what each reads under damage, and that this is the first candidate measured."""
    page = (done.workspace.root / "artifacts/evaluate/report.html").read_text()
    metrics, twin = done.json("evaluate", "metrics.json"), done.json("twin", "twin.json")
    assert twin["epochs"] == done.params.twin.epochs == 2
    assert twin["model_sha256"] != metrics["model_sha256"]
    for share in (metrics["corruption_accuracy"], metrics["corruption_accuracy_twin"], metrics["nondigit_abstention"]):
        assert f"{100 * share:.1f} %" in page
    assert "without augmentation for 2 epochs" in page
    assert "this is the first candidate" in page
    looks = [json.loads(line) for line in (done.workspace.root / "models/looks.jsonl").read_text().splitlines()]
    assert [(look["why"], look["model_sha256"], look["test_images"]) for look in looks] == [
        ("twin", twin["model_sha256"], 300),
        ("candidate", metrics["model_sha256"], 300),
        ("result", metrics["model_sha256"], 300),
    ]
    assert looks[-1]["accuracy"] == metrics["accuracy"]
    assert "only seed 7 has been measured" in page


def test_the_twin_differs_in_augmentation_and_length_alone(done: Run) -> None:
    from training.twin import plain

    params = plain(done.params)
    assert params.augment.is_off
    assert params.train == done.params.train.model_copy(update={"epochs": 2})
    assert (params.model, params.seed) == (done.params.model, done.params.seed)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(done: Run) -> None:
    from training.model import model_sha256
    from training.train import fit

    learn = load_split(done.workspace.artifact("prepare", "train.npz"))
    held_out = load_split(done.workspace.artifact("prepare", "validation.npz"))
    again, _ = fit(learn, held_out, done.params, QUIET)
    assert model_sha256(again) == done.json("train", "training.json")["model_sha256"]
    other, _ = fit(learn, held_out, done.params.model_copy(update={"seed": 8}), QUIET)
    assert model_sha256(other) != model_sha256(again)


def test_the_same_training_data_come_out_of_prepare_again(done: Run, tmp_path: Path) -> None:
    """So that DVC does not train anew."""
    before = {p.name: p.read_bytes() for p in (done.workspace.root / "artifacts/prepare").iterdir()}
    run_stages(done.workspace, done.params, "prepare")
    after = {p.name: p.read_bytes() for p in (done.workspace.root / "artifacts/prepare").iterdir()}
    assert before == after


def test_a_loss_that_is_no_number_stops_with_step_and_rate(done: Run) -> None:
    from training.loop import TrainingDiverged
    from training.train import fit

    changes = {"optimiser": "sgd", "weight_decay": 0.0, "learning_rate": 1e30, "precision": "float32"}
    params = done.params.model_copy(
        update={
            "train": done.params.train.model_copy(update=changes),
            "model": done.params.model.model_copy(update={"normalisation": "none"}),
        }
    )
    learn = load_split(done.workspace.artifact("prepare", "train.npz"))
    with pytest.raises(TrainingDiverged, match=r"at step \d+ \(learning rate .*e\+.*lower train\.learning_rate"):
        fit(learn, learn, params, QUIET)


def test_the_weights_of_the_last_good_epoch_are_kept_when_the_loss_is_no_number(tmp_path: Path, done: Run) -> None:
    """A step of decay that more than undoes the weights: they grow until they overflow, some epochs later."""
    from training.loop import TrainingDiverged
    from training.model import load_model

    train = {
        "optimiser": "sgd", "weight_decay": 0.0, "schedule": "constant", "learning_rate": 0.3, "precision": "float32",
        "batch_size": 300, "epochs": 200,
    }  # fmt: skip
    model = {"normalisation": "none", "hidden_widths": (16,), "l2": 4.0}
    update = {
        "train": done.params.train.model_copy(update=train),
        "model": done.params.model.model_copy(update=model),
    }
    shutil.copytree(done.workspace.root / "artifacts/prepare", tmp_path / "artifacts/prepare")
    with pytest.raises(TrainingDiverged, match=r"learning rate 0\.3\).*kept in .*last_good\.keras") as caught:
        run_stages(Workspace(tmp_path), done.params.model_copy(update=update), "train")
    assert "\n" not in str(caught.value)
    kept = load_model(tmp_path / "artifacts/train/last_good.keras")
    assert all(np.isfinite(array).all() for array in kept.get_weights())
    assert not (tmp_path / "artifacts/train/model.keras").exists()
    run_stages(Workspace(tmp_path), done.params, "train")
    assert not (tmp_path / "artifacts/train/last_good.keras").exists()


def test_a_batch_larger_than_the_data_is_refused(done: Run) -> None:
    from training.params import BadParams
    from training.train import fit

    params = done.params.model_copy(update={"train": done.params.train.model_copy(update={"batch_size": 5000})})
    learn = load_split(done.workspace.artifact("prepare", "train.npz"))
    with pytest.raises(BadParams, match=r"train\.batch_size is 5000; allowed: at most the 1200"):
        fit(learn, learn, params, QUIET)


def test_an_altered_test_split_is_not_measured_on(done: Run, tmp_path: Path) -> None:
    shutil.copytree(done.workspace.root / "artifacts", tmp_path / "artifacts")
    copy = Workspace(tmp_path)
    test = load_split(copy.artifact("prepare", "test.npz"))
    save_split(copy.artifact("prepare", "test.npz"), Split(test.images, np.roll(test.labels, 1)))
    with pytest.raises(BadArtifact, match="sealed"):
        run_stages(copy, done.params, "evaluate")


def test_a_candidate_trained_on_scrambled_labels_is_rejected_and_not_exported(
    tmp_path: Path, done: Run, real: dict[str, Split]
) -> None:
    """And that is a result, not a failure: an experiment that is rejected is still recorded by DVC."""
    train = Split(real["train"].images, np.random.default_rng(0).permutation(real["train"].labels))
    workspace, params = make_workspace(tmp_path, {**real, "train": train}, **{"train.epochs": 1})
    (workspace.stage_dir("validate") / "report.json").write_text('{"valid": true}')
    shutil.copytree(done.saved_model, tmp_path / "models/digits/1")
    champion = {"version": 1, "model_sha256": done.json("train", "training.json")["model_sha256"]}
    workspace.champion_file.write_text(json.dumps({**champion, "path": "models/digits/1"}))
    run_stages(workspace, params, "prepare", "train", "twin", "evaluate", "gate")
    decision = json.loads((tmp_path / "artifacts/gate/decision.json").read_text())
    assert decision["accepted"] is False
    failed = {check["name"] for check in decision["checks"] if not check["passed"]}
    assert {"accuracy", "accuracy_against_champion", "worse_than_champion"} <= failed
    run_stages(workspace, params, "export")
    assert [file.name for file in (tmp_path / "artifacts/export/saved_model").iterdir()] == ["REJECTED.txt"]


def test_the_candidate_was_served_for_a_moment(done: Run) -> None:
    """By a model server in a process of its own, and it answered as Keras does."""
    found = done.json("probe", "probe.json")
    assert found["model_sha256"] == done.json("train", "training.json")["model_sha256"]
    assert found["golden_images"] == done.params.export.golden_images
    assert found["saved_model_difference"] < 1e-5 > found["server_difference"]
    assert found["saved_model_digits_differing"] == found["server_digits_differing"] == 0
    assert 0 < found["latency_ms"] <= found["latency_p99_ms"]
    assert found["load_s"] > 0
    weights = done.json("train", "training.json")["weights"]
    assert found["size_bytes"] > 4 * weights
    rows = {check["name"]: check for check in done.json("gate", "decision.json")["checks"]}
    assert all(rows[name]["value"] == found[name] for name in ("size_bytes", "load_s", "latency_ms", "latency_p99_ms"))


def test_a_candidate_that_answers_otherwise_once_served_is_rejected(
    tmp_path: Path, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last offsets are wrong in the SavedModel alone, as after a mistake in folding the layers."""
    from training import export
    from training.gate import judge

    def shift_an_offset(model: Any) -> list[tuple[Any, ...]]:
        *others, (kernel, bias, *rest) = fold(model)
        return [*others, (kernel, bias + np.linspace(0, 9, len(bias), dtype=np.float32), *rest)]

    fold = export.fold_layers
    monkeypatch.setattr(export, "fold_layers", shift_an_offset)
    shutil.copytree(done.workspace.root / "artifacts", tmp_path / "artifacts")
    run_stages(Workspace(tmp_path), done.params, "probe")
    failed = [check.name for check in judge(Workspace(tmp_path), done.params.gate).checks if not check.passed]
    assert failed == ["parity_saved_model", "parity_server"]


def test_an_approval_of_other_weights_exports_nothing(tmp_path: Path, done: Run) -> None:
    from training.export import NotApproved

    shutil.copytree(done.workspace.root / "artifacts", tmp_path / "artifacts")
    (tmp_path / "artifacts/gate/approval.json").write_text(json.dumps({"approved": True, "model_sha256": "0" * 64}))
    shutil.rmtree(tmp_path / "artifacts/export")
    with pytest.raises(NotApproved, match="other weights"):
        run_stages(Workspace(tmp_path), done.params, "export")
    assert not (tmp_path / "artifacts/export/saved_model").exists()


def test_full_disk_during_export_is_one_line_and_the_next_export_completes(tmp_path: Path, done: Run) -> None:
    """A real file system of 200 kB under artifacts/export: nothing half-exported stays, nothing needs cleaning up."""
    from training.export import NotWritten
    from training.verify import verify

    root = tmp_path / "checkout"
    shutil.copytree(done.workspace.root, root)
    workspace, out = Workspace(root), root / "artifacts" / "export"
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(out)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"needs the right to mount a file system: {mount.stderr.strip()}")
    try:
        with pytest.raises(NotWritten, match=r"cannot write the exported model in .*free some disk space"):
            run_stages(workspace, done.params, "export")
        assert list(out.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=50m", str(out)], check=True)
        run_stages(workspace, done.params, "export")
        verify(out / "saved_model")
    finally:
        subprocess.run(["umount", "--lazy", str(out)], check=True)


def test_a_published_model_is_compared_image_by_image(tmp_path: Path, done: Run) -> None:
    """The very candidate, exported and under another name: it reads the same images right, whatever its record says."""
    from training.gate import judge

    shutil.copytree(done.workspace.root / "artifacts", tmp_path / "artifacts")
    shutil.copytree(done.saved_model, tmp_path / "models/digits/4")
    workspace = Workspace(tmp_path)
    workspace.champion_file.parent.mkdir(parents=True)
    champion = {"version": 4, "model_sha256": "b" * 64, "path": "models/digits/4", "metrics": {"accuracy": 0.123}}
    workspace.champion_file.write_text(json.dumps(champion))
    decision = judge(workspace, done.params.gate)
    assert decision.accepted, decision.reason
    rows = {check.name: check for check in decision.checks}
    assert rows["accuracy_against_champion"].value == 0.0
    assert rows["worse_than_champion"].value == 1.0


def test_fashion_mnist_goes_through_the_stages_under_its_own_names(tmp_path: Path) -> None:
    """Ten other classes in IDX files: 2,000 + 500 garments, and in params.yaml what docs/data.md says."""
    from training.validate import validate

    fashion.copy_idx(tmp_path / "data", 2000, 500)
    content = small_params()
    fashion.describe(content, 2000, 500, 200)
    workspace = Workspace(tmp_path)
    YAML().dump(content, workspace.params_file)
    params = load_params(workspace.params_file)
    validate(workspace, params, QUIET)
    run_stages(workspace, params, "prepare", "train", "twin", "evaluate")
    run = Run(workspace, params)
    assert run.json("evaluate", "metrics.json")["accuracy"] > 0.65
    assert run.json("validate", "report.json")["classes"] == list(fashion.GARMENTS)
    rows = (tmp_path / "artifacts/evaluate/classes.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == list(fashion.GARMENTS)
    pairs = [row.split(",") for row in (tmp_path / "artifacts/evaluate/confusion.csv").read_text().splitlines()[1:]]
    _, labels = fashion.images_of(tmp_path / "data")
    assert [true for true, _ in pairs] == [fashion.GARMENTS[label] for label in labels]
    with np.load(tmp_path / "artifacts/evaluate/predictions.npz") as answers:
        read = answers["probabilities"].argmax(axis=1)
    assert [taken for _, taken in pairs] == [fashion.GARMENTS[label] for label in read]
    assert "Ankle boot" in (tmp_path / "artifacts/evaluate/report.html").read_text()


def test_golden_images_hold_every_digit(done: Run) -> None:
    with np.load(done.saved_model / "assets.extra/golden.npz") as golden:
        assert golden["images"].shape == (20, contract.IMAGE_HEIGHT, contract.IMAGE_WIDTH)
        assert golden["images"].dtype == np.uint8
        assert golden["probabilities"].dtype == np.float32
