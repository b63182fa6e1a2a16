"""Every look at the sealed test split leaves a line, and the lines tell how many candidates were measured on it."""

import json
import multiprocessing
from pathlib import Path

import pytest

from tests.training.conftest import ROOT
from training.looks import CANDIDATE, looks_file, recipe, record_look, record_result
from training.params import load_params
from training.workspace import BadArtifact, Workspace

PARAMS = load_params(ROOT / "params.yaml")

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def test_candidates_are_counted_once_each_and_by_test_split(tmp_path: Path) -> None:
    """A second look at a network is counted as such, a twin is no candidate, another test split counts from one."""
    workspace = Workspace(tmp_path)
    looks = [
        record_look(workspace, PARAMS, model, test, 300, why)
        for model, test, why in (
            (A, "t", CANDIDATE), (B, "t", "twin"), (A, "t", CANDIDATE), (C, "t", CANDIDATE), (C, "u", CANDIDATE),
        )
    ]  # fmt: skip
    assert [look.candidates for look in looks] == [1, 1, 1, 2, 1]
    assert [look.look for look in looks] == [1, 1, 2, 1, 1]
    lines = (tmp_path / "models/looks.jsonl").read_text().splitlines()
    assert [json.loads(line)["model_sha256"] for line in lines] == [A, B, A, C, C]
    first = json.loads(lines[0])
    assert (first["why"], first["test_images"]) == (CANDIDATE, 300)
    assert first["at"].endswith("+00:00")


def test_results_of_one_recipe_are_gathered_by_seed(tmp_path: Path) -> None:
    """Three seeds and, of another recipe or another test split, one each: the spread is over the three."""
    workspace = Workspace(tmp_path)
    longer = PARAMS.model_copy(update={"train": PARAMS.train.model_copy(update={"epochs": 99})})
    assert recipe(longer) != recipe(PARAMS) == recipe(PARAMS.model_copy(update={"seed": 8}))
    for params, seed, test, accuracy in (
        (PARAMS, 7, "t", 0.991), (longer, 7, "t", 0.5), (PARAMS, 8, "t", 0.993), (PARAMS, 9, "u", 0.5),
    ):  # fmt: skip
        params = params.model_copy(update={"seed": seed})
        record_result(workspace, record_look(workspace, params, f"{seed}", test, 300, CANDIDATE), accuracy)
    params = PARAMS.model_copy(update={"seed": 5})
    seeds = record_result(workspace, record_look(workspace, params, "5", "t", 300, CANDIDATE), 0.992)
    assert seeds == {5: 0.992, 7: 0.991, 8: 0.993}


def look_often(root: Path, name: str) -> None:
    for number in range(20):
        record_look(Workspace(root), PARAMS, f"{name}{number}", "t", 300, CANDIDATE)


def test_looks_at_the_same_time_are_all_recorded(tmp_path: Path) -> None:
    """Two processes, twenty candidates each: forty lines, and forty candidates by the last of them."""
    both = [multiprocessing.get_context("spawn").Process(target=look_often, args=(tmp_path, name)) for name in "xy"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    counts = [json.loads(line)["candidates"] for line in (tmp_path / "models/looks.jsonl").read_text().splitlines()]
    assert counts == list(range(1, 41))


def test_a_damaged_record_is_named_and_kept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    record_look(workspace, PARAMS, A, "t", 300, CANDIDATE)
    with looks_file(workspace).open("a") as file:
        file.write('{"at": "2026\n')
    before = looks_file(workspace).read_bytes()
    with pytest.raises(BadArtifact, match=r"looks\.jsonl, line 2, is no look at the test split"):
        record_look(workspace, PARAMS, B, "t", 300, CANDIDATE)
    assert looks_file(workspace).read_bytes() == before


def test_an_experiment_in_a_temporary_checkout_is_recorded_where_it_was_started(tmp_path: Path) -> None:
    """`dvc exp run --temp` and the queue work in .dvc/tmp/exps/, which goes away."""
    temporary = tmp_path / ".dvc/tmp/exps/standalone/tmpabc"
    temporary.mkdir(parents=True)
    assert looks_file(Workspace(temporary)) == tmp_path / "models/looks.jsonl"
    assert looks_file(Workspace(tmp_path)) == tmp_path / "models/looks.jsonl"
