"""What may be tried: `search.space` of params.yaml for Optuna, and what was tried as keys of params.yaml."""

import io
import json
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ruamel.yaml import YAML

from training.params import BadParams, Params, SearchRange, change_params

_SECTIONS = ("train", "model", "augment")
_FIXED = {
    "train.epochs": "search.epochs",
    "train.free_epochs": "nothing: trials end before",
    "train.precision": "nothing: it is a matter of the machine",
}


def build_space(params: Params) -> dict[str, BaseDistribution]:
    """The distribution of each key; each bound and each choice has been checked as a value of that key.

    Raises:
        BadParams: a key is unknown or not to be searched, or a bound or choice is not allowed there.
    """
    return {key: _build_distribution(params, key, allowed) for key, allowed in params.search.space.items()}


def read_values(params: Params, suggested: Mapping[str, Any]) -> dict[str, Any]:
    """What Optuna proposed, as values of params.yaml: numbers of four digits, lists as lists."""
    values = {}
    for key, value in suggested.items():
        allowed = params.search.space[key]
        if isinstance(allowed, SearchRange):
            values[key] = float(f"{value:.4g}") if isinstance(value, float) else value
        else:
            values[key] = next(choice for choice in allowed if _encode(choice) == value)
    return values


def present_values(params: Params, space: Mapping[str, BaseDistribution]) -> dict[str, Any] | None:
    """What params.yaml says now, as Optuna would propose it; None where that lies outside the space."""
    content = params.model_dump(by_alias=True, mode="json")
    present = {key: _encode(_look_up(content, key)) for key in space}
    inside = all(_contains(distribution, present[key]) for key, distribution in space.items())
    return present if inside else None


def fragment(params: Params, values: Mapping[str, Any]) -> str:
    """The values as YAML, at the keys where params.yaml would take them from under the chosen profile."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, leaf = _effective_key(params, key).split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(tree, text)
    return text.getvalue()


def experiment_command(params: Params, values: Mapping[str, Any]) -> str:
    """The `dvc exp run` that trains with these values, ready for a shell."""
    settings = []
    for key, value in values.items():
        text = json.dumps(value, separators=(",", ":")).replace('"', "")
        setting = f"{_effective_key(params, key)}={text}"
        settings.append(f"-S '{setting}'" if isinstance(value, list) else f"-S {setting}")
    return " ".join(["dvc exp run", *settings])


def _build_distribution(params: Params, key: str, allowed: SearchRange | list[Any]) -> BaseDistribution:
    section, _, leaf = key.partition(".")
    if section not in _SECTIONS or not leaf:
        raise BadParams(
            f"search.space names {key}; allowed: keys of {', '.join(_SECTIONS)}, such as train.learning_rate"
        )
    if key in _FIXED:
        raise BadParams(f"search.space names {key}, which cannot be searched; what sets it is {_FIXED[key]}")
    if not isinstance(allowed, SearchRange):
        for choice in allowed:
            _check(params, key, choice)
        return CategoricalDistribution([_encode(choice) for choice in allowed])
    whole = isinstance(_look_up(_check(params, key, allowed.low).model_dump(), key), int)
    _check(params, key, allowed.high)
    if whole:
        return IntDistribution(int(allowed.low), int(allowed.high), log=allowed.log)
    return FloatDistribution(float(allowed.low), float(allowed.high), log=allowed.log)


def _check(params: Params, key: str, value: Any) -> Params:
    try:
        return change_params(params, {key: value})
    except BadParams as err:
        raise BadParams(f"search.space, {key}: {err}") from err


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return not isinstance(value, str) and distribution.low <= value <= distribution.high


def _encode(value: Any) -> Any:
    """A list as JSON text: Optuna's choices are single values."""
    return json.dumps(value) if isinstance(value, (list, tuple)) else value


def _look_up(content: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        content = content[name]
    return content


def _effective_key(params: Params, key: str) -> str:
    """Where the value is read from: the chosen profile, if it sets this key."""
    section, _, leaf = key.partition(".")
    in_profile = leaf.split(".")[0] in params.profiles[params.profile].get(section, {})  # type: ignore[call-overload]
    return f"profiles.{params.profile}.{key}" if in_profile else key
