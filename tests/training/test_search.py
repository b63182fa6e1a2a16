"""The search for better parameters: what it may try, what it prunes, what it survives, what it leaves."""

import csv
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from ruamel.yaml import YAML

from tests.conftest import HANG_S, ROOT, clean_environment
from tests.training import toy_worker
from tests.training.conftest import small_params
from training.params import BadParams, Params, change_params, load_params
from training.search import results
from training.search.search import search
from training.search.space import build_space, experiment_command, fragment
from training.search.study import SearchStopped
from training.workspace import BadArtifact, Split, Workspace, save_split

SPACE: dict[str, Any] = {
    "train.learning_rate": {"low": 0.001, "high": 0.03, "log": True},
    "model.activation": ["relu", "gelu"],
}


def make_params(folder: Path, **changes: Any) -> Params:
    small = {"search.space": SPACE, "search.trials": 12, "search.epochs": 3, "search.images": 200}
    YAML().dump(small_params(**{**small, **changes}), folder / "params.yaml")
    return load_params(folder / "params.yaml")


@pytest.fixture
def prepared(tmp_path: Path) -> Workspace:
    """Splits that no toy worker looks at."""
    workspace = Workspace(tmp_path)
    nothing = Split(np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.int64))
    for name in ("train", "validation"):
        save_split(workspace.stage_dir("prepare") / f"{name}.npz", nothing)
    return workspace


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than such a search, and one test has looked at them."""
    for name in ("draw_history", "draw_values", "draw_importance"):
        monkeypatch.setattr(results, name, lambda *_: None)


def run_search(
    workspace: Workspace,
    worker: Callable[..., None] = toy_worker.learn,
    workers: int = 1,
    minutes: float | None = None,
    **changes: Any,
) -> tuple[bool, str]:
    """Whether it came to its end, and what it printed."""
    printed = io.StringIO()
    console = Console(file=printed, width=400)
    params = make_params(workspace.root, **changes)
    ended = search(workspace, params, console, name="toy", worker=worker, workers=workers, minutes=minutes)
    return ended, printed.getvalue()


def trials(workspace: Workspace) -> list[dict[str, str]]:
    with (workspace.root / "run/search/toy/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def states(workspace: Workspace) -> list[str]:
    return [row["state"] for row in trials(workspace)]


def values(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
    return [tuple(row[key] for key in SPACE) for row in rows]


def test_a_search_finds_what_is_best_and_prunes_what_is_not(prepared: Workspace) -> None:
    """TPE comes near the least loss; a trial worse than the median is not trained to its end; one seed, one search."""
    ended, printed = run_search(prepared, **{"search.trials": 30, "train.learning_rate": 0.003})
    assert ended
    rows = trials(prepared)
    assert len(rows) == 30
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned
    assert {row["epochs"] for row in pruned} == {"2"}
    found = YAML(typ="safe").load((prepared.root / "run/search/toy/best.yaml").read_text())
    assert found["model"] == {"activation": "gelu"}
    assert found["train"]["learning_rate"] == pytest.approx(0.003, rel=0.25)
    assert "best: trial" in printed
    assert "(params.yaml now: 0.15" in printed  # 0.003 with relu, tried first
    for picture in ("history.png", "values.png", "importance.png"):
        assert (prepared.root / "run/search/toy" / picture).stat().st_size > 5000


@pytest.mark.usefixtures("without_pictures")
def test_workers_share_a_search_and_no_trial_is_too_many(prepared: Workspace) -> None:
    ended, _ = run_search(prepared, workers=3)
    assert ended
    assert len(trials(prepared)) == 12
    assert len(set(values(trials(prepared)))) == 12


@pytest.mark.usefixtures("without_pictures")
def test_a_killed_worker_costs_its_trial_and_nothing_else(prepared: Workspace) -> None:
    """Its trial is marked as failed, its values are tried once more, the number of trials is reached."""
    ended, printed = run_search(prepared, toy_worker.die_in_the_second_trial)
    assert ended
    assert "the worker of trial 1 died (exit code -9); the search goes on" in printed
    assert states(prepared).count("failed") == states(prepared).index("failed") == 1
    assert states(prepared).count("complete") + states(prepared).count("pruned") == 12
    rows = trials(prepared)
    assert values(rows[1:2]) == values(rows[2:3])


@pytest.mark.usefixtures("without_pictures")
def test_workers_that_all_die_end_the_search_with_a_word_about_it(prepared: Workspace) -> None:
    with pytest.raises(SearchStopped, match=r"exit code -9.*as did 2 before it.*workers.log.*memory"):
        run_search(prepared, toy_worker.die_always)


@pytest.mark.usefixtures("without_pictures")
def test_ctrl_c_keeps_what_there_is_and_the_same_command_goes_on(prepared: Workspace) -> None:
    ended, printed = run_search(prepared, toy_worker.interrupt_in_the_third_trial)
    assert not ended
    assert "stopped after 2 of 12 trials; the same command goes on" in printed
    before = trials(prepared)
    assert [row["state"] for row in before] == ["complete", "complete", "failed"]
    assert (prepared.root / "run/search/toy/best.yaml").exists()

    assert run_search(prepared)[0]
    after = trials(prepared)
    assert after[:3] == before
    assert values(after[3:4]) == values(before[2:3])  # what was under way is begun anew
    assert states(prepared).count("complete") + states(prepared).count("pruned") == 12


@pytest.mark.usefixtures("without_pictures")
def test_a_search_that_was_killed_goes_on(prepared: Workspace) -> None:
    """Kill -9 of the search itself: its workers end too, what was finished counts, what was under way is tried anew."""
    make_params(prepared.root)
    command = [sys.executable, "-m", "tests.training.toy_search", str(prepared.root)]
    killed = subprocess.run(command, cwd=ROOT, timeout=HANG_S, check=False, env=clean_environment())
    assert killed.returncode == -signal.SIGKILL
    assert run_search(prepared)[0]
    assert states(prepared)[:3] == ["complete", "complete", "failed"]
    assert values(trials(prepared)[2:3]) == values(trials(prepared)[3:4])
    assert len(trials(prepared)) == 13


@pytest.mark.usefixtures("without_pictures")
def test_a_longer_search_goes_on_and_another_one_is_refused(prepared: Workspace) -> None:
    """More trials are the same search; another space, length or network is not, and says so."""
    run_search(prepared, **{"search.trials": 2})
    run_search(prepared, **{"search.trials": 3})
    assert len(trials(prepared)) == 3
    run_search(prepared, **{"search.trials": 3})
    assert len(trials(prepared)) == 3
    with pytest.raises(SearchStopped, match=r"other parameters, whose trials cannot be compared.*--name"):
        run_search(prepared, **{"search.epochs": 4})
    with pytest.raises(SearchStopped, match="other space, whose"):
        run_search(prepared, **{"search.space": {**SPACE, "model.dropout": [0.0, 0.1]}})


def test_no_trial_is_begun_once_time_is_up(prepared: Workspace) -> None:
    """`--minutes 0` begins none, ends well, and says that there is nothing to choose from."""
    ended, printed = run_search(prepared, minutes=0)
    assert ended
    assert "no trial was trained to its end" in printed


def test_a_name_that_is_no_name_of_a_folder_is_refused(prepared: Workspace) -> None:
    with pytest.raises(SearchStopped, match=r"'../x'; allowed: letters"):
        search(prepared, make_params(prepared.root), Console(quiet=True), name="../x")


def test_unprepared_data_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match="dvc repro"):
        run_search(Workspace(tmp_path))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"train.lerning_rate": [1, 2]}, ["train.lerning_rate is not a known key"]),
        ({"gate.max_ece": [0.1, 0.2]}, ["search.space names gate.max_ece", "train, model, augment"]),
        ({"train.epochs": [1, 2]}, ["train.epochs", "search.epochs"]),
        ({"model.activation": ["relu", "step"]}, ["search.space, model.activation", "'step'"]),
        ({"model.dropout": {"low": 0.0, "high": 1.5}}, ["search.space, model.dropout", "1.5", "less than 1"]),
        ({"model.dropout": {"low": 0.5, "high": 0.1}}, ["low is 0.5", "below high"]),
        ({"model.dropout": {"low": 0.0, "high": 0.5, "log": True}}, ["low is 0.0", "above 0"]),
        (
            {"model.dropout": {"low": 0.0, "high": 0.5, "lag": True}},
            ["model.dropout", "lag is not a known key", "low, high, log"],
        ),
        ({"model.dropout": [0.1]}, ["search.space.model.dropout", "at least 2 items"]),
        ({}, ["search.space is {}"]),
    ],
)
def test_a_space_that_cannot_be_searched_names_the_key(tmp_path: Path, space: Any, said: list[str]) -> None:
    with pytest.raises(BadParams) as caught:
        build_space(make_params(tmp_path, **{"search.space": space}))
    for words in said:
        assert words in str(caught.value)


def test_the_repositorys_own_space_can_be_searched_in_every_profile(tmp_path: Path) -> None:
    """And what params.yaml says lies inside it, so that a search begins with that."""
    content = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    for profile in content["profiles"]:
        YAML().dump({**content, "profile": profile}, tmp_path / "params.yaml")
        assert len(build_space(load_params(tmp_path / "params.yaml"))) == len(content["search"]["space"])


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_the_fragment_and_the_command_set_what_was_found(tmp_path: Path, profile: str) -> None:
    """Pasted into params.yaml or given to `dvc exp run -S`, they give the same parameters, in a profile as well."""
    from dvc.utils.hydra import apply_overrides

    found = {"train.learning_rate": 1.234e-05, "train.batch_size": 512, "model.hidden_widths": [64, 32]}
    content = small_params(profile=profile)
    content["profiles"] = {"quick": {}, "full": {"train": {"batch_size": 25}}}
    path = tmp_path / "params.yaml"
    YAML().dump(content, path)
    params = load_params(path)
    meant = change_params(params, found)

    _lay_over(content, YAML(typ="safe").load(fragment(params, found)))
    YAML().dump(content, tmp_path / "pasted.yaml")
    assert load_params(tmp_path / "pasted.yaml").model_dump(include={"model", "train"}) == meant.model_dump(
        include={"model", "train"}
    )
    command = experiment_command(params, found).removeprefix("dvc exp run ")
    apply_overrides(path, [setting.strip(" '") for setting in command.split("-S ") if setting])
    assert load_params(path).model_dump(include={"model", "train"}) == meant.model_dump(include={"model", "train"})


def _lay_over(content: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            _lay_over(content[key], value)
        else:
            content[key] = value


def test_the_command_trains_networks_and_leaves_the_stages_alone(tmp_path: Path, real: dict[str, Split]) -> None:
    """`python -m training search` as people run it, on real digits, judged on the validation split.

    A loss that is no number is pruned with its reason; the next trial in the same process is none the worse.
    """
    space = {"train.learning_rate": [0.01, 1e30]}
    undeformed = dict.fromkeys(
        (f"augment.{key}" for key in ("rotation_rad", "scale", "shear", "shift_px", "elastic_px")), 0
    )
    make_params(
        tmp_path, **{"search.space": space, "train.learning_rate": 0.01, "model.hidden_widths": [16], **undeformed}
    )
    workspace = Workspace(tmp_path)
    prepare = workspace.stage_dir("prepare")
    train = real["train"]
    save_split(prepare / "train.npz", Split(train.images[:600], train.labels[:600]))
    save_split(prepare / "validation.npz", Split(train.images[600:900], train.labels[600:900]))
    command = [sys.executable, "-m", "training", "--root", str(tmp_path), "search", "--name", "toy"]
    options = ["--trials", "3", "--epochs", "2", "--images", "400"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False,
        env={**clean_environment(), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = trials(workspace)
    assert len(rows) == 3
    first = rows[0]
    assert (first["state"], first["epochs"], first["train.learning_rate"]) == ("complete", "2", "0.01")
    assert 0.5 < float(first["accuracy"]) <= 1
    for row in rows[1:]:
        if row["train.learning_rate"] == "1e+30":
            assert (row["state"], "lower train.learning_rate" in row["reason"]) == ("pruned", True), row
        else:
            assert row["state"] == "complete"
    assert any(row["reason"] for row in rows)
    assert sorted(os.listdir(tmp_path / "artifacts")) == ["prepare"]  # noqa: PTH208 - names are enough
