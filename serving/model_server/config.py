"""Which models are served, from which folders, and which of their versions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from serving.model_server.errors import UsageError
from serving.model_server.flags import Flags


@dataclass(frozen=True, slots=True)
class Latest:
    """Serve the ``count`` highest versions that load."""

    count: int = 1


@dataclass(frozen=True, slots=True)
class All:
    """Serve every version in the folder."""


@dataclass(frozen=True, slots=True)
class Specific:
    """Serve exactly these versions."""

    numbers: frozenset[int]


VersionPolicy = Latest | All | Specific


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model: its name to clients, the folder that holds ``<version>/`` folders, the policy and the labels."""

    name: str
    base_path: Path
    policy: VersionPolicy = Latest()
    labels: Mapping[str, int] = field(default_factory=dict)


def from_flags(flags: Flags) -> list[ModelConfig]:
    """The configured models, from ``--model_config_file`` or else from the two model flags.

    Raises:
        UsageError: the file cannot be read or parsed, or a base path is no local folder.
    """
    if flags.model_config_file:
        return read_file(Path(flags.model_config_file))
    return [_checked(ModelConfig(flags.model_name, Path(flags.model_base_path)))]


def read_file(path: Path) -> list[ModelConfig]:
    """Read a text ``ModelServerConfig``.

    Raises:
        UsageError: see ``from_flags``.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"--model_config_file {path} cannot be read: {err}") from err
    try:
        config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    except text_format.ParseError as err:
        raise UsageError(f"--model_config_file {path} is no text ModelServerConfig: {err}") from err
    return from_proto(config)


def from_proto(config: model_server_config_pb2.ModelServerConfig) -> list[ModelConfig]:
    """The models of a ``ModelServerConfig``.

    Raises:
        UsageError: custom config, another platform than TensorFlow, a name twice or none, a bad folder or policy.
    """
    if config.WhichOneof("config") == "custom_model_config":
        raise UsageError("ModelServerConfig: custom_model_config is not supported; use model_config_list")
    models = [_from_model(model) for model in config.model_config_list.config]
    names = [model.name for model in models]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"ModelServerConfig: model name {min(twice)!r} appears twice")
    return models


def _from_model(model: model_server_config_pb2.ModelConfig) -> ModelConfig:
    if model.model_platform not in {"", "tensorflow"}:
        raise UsageError(f"model {model.name!r}: platform {model.model_platform!r} is not supported, only tensorflow")
    choice = model.model_version_policy.WhichOneof("policy_choice")
    policy: VersionPolicy
    if choice == "all":
        policy = All()
    elif choice == "specific":
        numbers = frozenset(model.model_version_policy.specific.versions)
        if not numbers:
            raise UsageError(f"model {model.name!r}: the specific version policy names no version")
        policy = Specific(numbers)
    else:
        # An absent or zero num_versions means one, as in the original.
        policy = Latest(model.model_version_policy.latest.num_versions or 1)
    return _checked(ModelConfig(model.name, Path(model.base_path), policy, dict(model.version_labels)))


def _checked(model: ModelConfig) -> ModelConfig:
    if not model.name:
        raise UsageError("a model has no name")
    text = str(model.base_path)
    if text in {"", "."}:
        raise UsageError(f"model {model.name!r} has no base path")
    if ":/" in text:
        raise UsageError(f"model {model.name!r}: base path {text} is not local; mount it and give the folder")
    if model.base_path.exists() and not model.base_path.is_dir():
        raise UsageError(f"model {model.name!r}: base path {text} is a file; the folder of versions was expected")
    return model
