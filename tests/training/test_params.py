"""params.yaml says what is allowed when it is wrong, and names the key."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.training.conftest import ROOT, small_params
from training.params import BadParams, load_params


def load(folder: Path, content: Any) -> Any:
    path = folder / "params.yaml"
    if isinstance(content, str):
        path.write_text(content)
    else:
        YAML().dump(content, path)
    return load_params(path)


def test_the_repositorys_own_params_are_valid_in_every_profile(tmp_path: Path) -> None:
    content = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    for profile in content["profiles"]:
        assert load(tmp_path, {**content, "profile": profile}).profile == profile


def test_a_profile_replaces_only_the_values_it_names(tmp_path: Path) -> None:
    content = small_params(profile="full")
    content["profiles"] = {"full": {"train": {"epochs": 77}}}
    params = load(tmp_path, content)
    assert params.train.epochs == 77
    assert params.train.batch_size == 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train.learning_rat": 0.1}, ["train.learning_rat", "not a known key", "0.1", "learning_rate", "batch_size"]),
        ({"train.learning_rate": -1}, ["train.learning_rate is -1", "greater than 0"]),
        ({"train.epochs": "many"}, ["train.epochs is 'many'", "integer"]),
        ({"train.optimiser": "lion"}, ["train.optimiser is 'lion'", "'adamw'", "'sgd'"]),
        ({"train.optimiser": "sgd"}, ["train.weight_decay is 0.05", "optimiser sgd"]),
        ({"train.momentum": 0.9}, ["train.momentum is 0.9", "only sgd"]),
        ({"model.l2": 0.001}, ["model.l2 is 0.001", "weight_decay"]),
        ({"data.format": "zip"}, ["data.format is 'zip'", "'idx' or 'folder'"]),
        ({"data.classes": ["one"]}, ["data.classes", "at least 2 items"]),
        ({"data.classes": ["a", "b", "a"]}, ["data.classes is 'a' twice", "different names"]),
        ({"data.classes": ["a", "../b"]}, ["data.classes.1 is '../b'", "pattern"]),
        ({"data.classes": list(range(257))}, ["data.classes is 257 names", "at most 256 where format is idx"]),
        (
            {"model.least_contrast": 1.0, "model.paper_share": 0.5},
            ["model.paper_share is 0.5", "0 with a least_contrast of 1"],
        ),
        (
            {"train.free_epochs": 2, "model.receptive_fields": []},
            ["train.free_epochs is 2", "0 without model.receptive_fields"],
        ),
        (
            {"model.receptive_fields": [{"size": 29, "stride": 2, "features": 4}]},
            ["model.receptive_fields.0.size is 29", "less than or equal to 28"],
        ),
        (
            {
                "model.receptive_fields": [
                    {"size": 20, "stride": 2, "features": 4},
                    {"size": 6, "stride": 1, "features": 4},
                ]
            },
            ["model.receptive_fields is of size 6", "at most the 5 that are left"],
        ),
        (
            {"model.receptive_fields": [{"size": 1, "stride": 1, "features": 30}]},
            ["model.receptive_fields is 28 x 28 places x 30 features", "at most 16384 units"],
        ),
        (
            {"model.receptive_fields": [{"size": 5, "stride": 2, "features": 4}], "model.normalisation": "layer"},
            ["model.normalisation is layer", "batch or none with receptive_fields"],
        ),
        ({"model.averaged_turn_deg": 90}, ["model.averaged_turn_deg is 90", "less than or equal to 45"]),
        ({"model.hidden_widths": []}, ["model.hidden_widths is []", "at least 1 item"]),
        ({"gate.max_latency_p99_ms": 1.0}, ["gate.max_latency_p99_ms is 1.0", "max_latency_ms, which is 20.0"]),
        ({"prepare.validation_images": 1500}, ["prepare.validation_images is 1500", "train_images, which is 1500"]),
        ({"train.batch_size": 1201}, ["train.batch_size is 1201", "at most the 1200 images"]),
        (
            {"evaluate.robustness_images": 20, "gate.robustness.robustness_images": 21},
            ["robustness_images is 21", "at most 20"],
        ),
        ({"gate.robustness.robustness_images": 301}, ["gate.robustness.robustness_images is 301", "at most 40"]),
        (
            {"gate.robustness.shift3_accuracy": 0.9},
            ["gate.robustness.shift3_accuracy", "not a known key", "thin_accuracy"],
        ),
        ({"validate.class_share": [0.2, 0.1]}, ["validate.class_share is [0.2, 0.1]", "the smaller first"]),
        ({"gate.min_accuracy": float("nan")}, ["gate.min_accuracy", "finite"]),
        ({"profile": "warp"}, ["'warp'", "quick, full"]),
        ({"profiles.full": {"train": {"epoch": 3}}, "profile": "full"}, ["train.epoch", "not a known key"]),
        ({"profiles.full": {"gate": {}}}, ["profiles.full.gate"]),
    ],
)
def test_a_wrong_key_is_named_with_its_value_and_what_is_allowed(
    tmp_path: Path, change: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(BadParams) as caught:
        load(tmp_path, small_params(**change))
    for words in said:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    content = small_params()
    del content["gate"]
    with pytest.raises(BadParams, match="gate is missing"):
        load(tmp_path, content)


@pytest.mark.parametrize("text", ["a: [1", "just words", ""])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadParams, match=r"params\.yaml"):
        load(tmp_path, text)


def test_a_missing_file_says_where_to_stand(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="--root"):
        load_params(tmp_path / "params.yaml")
