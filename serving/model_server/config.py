"""What the files say that flags name: which models and versions are served, how calls are batched, TLS, metrics."""

import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from serving.model_server.errors import UsageError
from serving.model_server.flags import Flags, cpus
from serving.protos import model_server_files_pb2


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
    return from_proto(_read("model_config_file", path, model_server_config_pb2.ModelServerConfig()))


def require_folders(models: list[ModelConfig], flags: Flags) -> None:
    """A wrong path is said at the start; the original waits, and says in its log that it does.

    The folder of ``--model_base_path`` must exist, though no version need be in it yet. One that a configuration file
    names may yet be made by a first release, so there its parent must exist.

    Raises:
        UsageError: one does not.
    """
    flag = "--model_config_file" if flags.model_config_file else "--model_base_path"
    for model in models:
        wanted = model.base_path.parent if flags.model_config_file else model.base_path
        if not wanted.is_dir():
            raise UsageError(
                f"model {model.name!r}: base path {model.base_path}: expected a folder that holds a folder a version, "
                f"and there is no {wanted}; check {flag}, or mount it"
            )


@dataclass(frozen=True)
class Batching:
    """How calls are joined. Sizes count rows. The defaults are TensorFlow Serving's."""

    max_batch_size: int = 1000
    batch_timeout_s: float = 0.0
    max_enqueued_batches: int = 10
    num_batch_threads: int = 1
    allowed_batch_sizes: tuple[int, ...] = ()
    pad_variable_length_inputs: bool = False
    capacity: int = 1000
    """Rows of one run of the model; less than ``max_batch_size`` where large calls are split."""

    def padded(self, size: int) -> int:
        """``size``, or the next allowed one."""
        return next((allowed for allowed in self.allowed_batch_sizes if allowed >= size), size)


def read_batching(flags: Flags) -> Batching | None:
    """The batching parameters, None where batching is off.

    Raises:
        UsageError: the file cannot be read or parsed, or its sizes do not fit each other.
    """
    file = model_server_files_pb2.BatchingParameters()
    if not flags.enable_batching:
        if flags.batching_parameters_file:
            raise UsageError("--batching_parameters_file: --enable_batching is needed besides")
        return None
    if flags.batching_parameters_file:
        file = _read("batching_parameters_file", Path(flags.batching_parameters_file), file)

    def value(name: str, default: int, least: int = 1) -> int:
        given = getattr(file, name).value if file.HasField(name) else default
        if given < least:
            raise UsageError(f"--batching_parameters_file: {name} is {given}; at least {least} was expected")
        return int(given)

    largest = value("max_batch_size", Batching.max_batch_size)
    capacity = value("max_execution_batch_size", largest) if file.enable_large_batch_splitting.value else largest
    allowed = tuple(file.allowed_batch_sizes)
    if allowed and (list(allowed) != sorted(set(allowed)) or allowed[0] < 1 or allowed[-1] != capacity):
        raise UsageError(
            f"--batching_parameters_file: allowed_batch_sizes are {list(allowed)}; ascending sizes were expected, "
            f"the last of them {capacity}, the largest batch"
        )
    return Batching(
        max_batch_size=largest,
        batch_timeout_s=value("batch_timeout_micros", 0, least=0) / 1e6,
        max_enqueued_batches=value("max_enqueued_batches", Batching.max_enqueued_batches),
        num_batch_threads=value("num_batch_threads", cpus()),
        allowed_batch_sizes=allowed,
        pad_variable_length_inputs=file.pad_variable_length_inputs,
        capacity=capacity,
    )


def read_tls(flags: Flags) -> ssl.SSLContext | None:
    """What the gRPC port speaks TLS with, None where it is plain.

    Raises:
        UsageError: the file cannot be read or parsed, or key and certificates do not belong together.
    """
    if not flags.ssl_config_file:
        return None
    file = _read("ssl_config_file", Path(flags.ssl_config_file), model_server_files_pb2.SSLConfig())
    if file.client_verify and not file.custom_ca:
        raise UsageError("--ssl_config_file: client_verify needs custom_ca, the authority of the clients' certificates")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    try:
        with tempfile.NamedTemporaryFile("w") as chain:  # readable to its owner only
            chain.write(f"{file.server_cert}\n{file.server_key}\n")
            chain.flush()
            context.load_cert_chain(chain.name, password="")  # an encrypted key is an error, not a question
        if file.custom_ca:
            context.load_verify_locations(cadata=file.custom_ca)
    except (ssl.SSLError, ValueError) as err:
        raise UsageError(
            "--ssl_config_file: server_key, server_cert and custom_ca must be PEM texts, the key that of the "
            f"certificate ({getattr(err, 'reason', None) or err})"
        ) from err
    if file.client_verify:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


METRICS_PATH = "/monitoring/prometheus/metrics"


def read_metrics_path(flags: Flags) -> str | None:
    """The REST path of the metrics, None where they are off.

    Raises:
        UsageError: the file cannot be read or parsed, or there is no REST port or no usable path.
    """
    if not flags.monitoring_config_file:
        return None
    file = _read(
        "monitoring_config_file", Path(flags.monitoring_config_file), model_server_files_pb2.MonitoringConfig()
    )
    if not file.prometheus_config.enable:
        return None
    if not flags.rest_api_port:
        raise UsageError("--monitoring_config_file: the metrics are on the REST port; give --rest_api_port")
    path = file.prometheus_config.path or METRICS_PATH
    if not path.startswith("/") or path.lower().startswith("/v1/"):
        raise UsageError(f"--monitoring_config_file: path {path!r}: a path beginning with / and not /v1/ was expected")
    return str(path)


def _read(flag: str, path: Path, message: Any) -> Any:
    """A text protocol message from the file that a flag names."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"--{flag} {path} cannot be read: {err}") from err
    try:
        return text_format.Parse(text, message)
    except text_format.ParseError as err:
        raise UsageError(f"--{flag} {path} is no text {message.DESCRIPTOR.name}: {err}") from err


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
