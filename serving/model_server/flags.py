"""TensorFlow Serving's command line: its flag names and defaults, as ``--flag=value`` and as ``--flag value``.

Three groups: flags that act as in the original, flags that are accepted because start scripts carry them but change
nothing here, and flags that are refused because ignoring them would be unsafe or would serve something else.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Never

from serving.model_server.errors import UsageError

WITHOUT_EFFECT = {
    "rest_api_num_threads": "REST calls share the threads of --grpc_max_threads",
    "flush_filesystem_caches": "the page cache is left to the kernel",
    "num_load_threads": "versions are loaded one at a time",
    "num_unload_threads": "versions are unloaded one at a time",
    "per_process_gpu_memory_fraction": "TensorFlow's default is used",
    "remove_unused_fields_from_bundle_metagraph": "the graph is read as it is",
    "enforce_session_run_timeout": "a call past its deadline is not started; a started one runs to its end",
    "enable_profiler": "there is no profiler service",
    "enable_grpc_healthcheck_service": "the health service is always on",
    "skip_initialize_tpu": "there is no TPU support",
    "xla_cpu_compilation_enabled": "XLA runs where the graph asks for it",
}
"""Flags that are read and then ignored, each with the reason."""

REFUSED = {
    "use_alts_credentials": "ALTS is not offered",
    "platform_config_file": "only the TensorFlow platform is offered",
    "tensorflow_session_config_file": "use the --tensorflow_*_parallelism flags",
    "thread_pool_factory_config_file": "use the --tensorflow_*_parallelism flags",
    "mixed_precision": "export the model in the precision that it is to be served in",
}
"""Flags whose silent loss would change what is served or how safely, each with what to do instead."""


_POSITIVE = (
    "grpc_max_threads",
    "num_tflite_pools",
    "num_tflite_interpreters_per_pool",
    "rest_api_timeout_in_ms",
    "rest_api_header_timeout_in_ms",
    "rest_api_idle_timeout_in_ms",
    "rest_api_max_body_bytes",
)


@dataclass(frozen=True, slots=True)
class Flags:
    """The command line, read and checked. Sizes in bytes, times in the unit of each name."""

    host: str
    port: int
    grpc_socket_path: str
    rest_api_port: int
    rest_api_timeout_in_ms: int
    rest_api_header_timeout_in_ms: int
    rest_api_idle_timeout_in_ms: int
    rest_api_max_body_bytes: int
    rest_api_enable_cors_support: bool
    model_name: str
    model_base_path: str
    model_config_file: str
    model_config_file_poll_wait_seconds: float
    file_system_poll_wait_seconds: float
    max_num_load_retries: int
    load_retry_interval_micros: int
    saved_model_tags: str
    prefer_tflite_model: bool
    num_tflite_pools: int
    num_tflite_interpreters_per_pool: int
    enable_batching: bool
    batching_parameters_file: str
    monitoring_config_file: str
    ssl_config_file: str
    enable_model_warmup: bool
    num_request_iterations_for_warmup: int
    allow_version_labels_for_unavailable_models: bool
    enable_signature_method_name_check: bool
    grpc_max_threads: int
    grpc_channel_arguments: str
    tensorflow_session_parallelism: int
    tensorflow_intra_op_parallelism: int
    tensorflow_inter_op_parallelism: int
    grace_seconds: float
    lame_duck_seconds: float


def parse(arguments: Sequence[str]) -> Flags:
    """Read the command line.

    Raises:
        UsageError: an unknown flag, a value that cannot be read, or nothing to serve; the message is one line.
        SystemExit: with 0, after ``--help`` or ``--version`` was answered.
    """
    known, rest = _parser().parse_known_args(list(arguments))
    if rest:
        raise UsageError(f"unknown argument: {rest[0]}; --help lists the flags")
    values = vars(known)
    for name in WITHOUT_EFFECT:
        values.pop(name)
    for name, reason in REFUSED.items():
        if values.pop(name):
            raise UsageError(f"--{name} is not supported: {reason}")
    # A call that waits in a batch holds its thread.
    values["grpc_max_threads"] = values["grpc_max_threads"] or (128 if values["enable_batching"] else 4 * cpus())
    flags = Flags(**values)
    _check(flags)
    return flags


def cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(flags: Flags) -> None:
    if not flags.model_base_path and not flags.model_config_file:
        raise UsageError("nothing to serve: give --model_base_path=FOLDER or --model_config_file=FILE")
    if not flags.port and not flags.grpc_socket_path and not flags.rest_api_port:
        raise UsageError("nothing to listen on: give --port, --grpc_socket_path or --rest_api_port")
    if flags.port and flags.port == flags.rest_api_port:
        raise UsageError(f"--port and --rest_api_port are both {flags.port}; give each its own")
    for name in ("port", "rest_api_port"):
        if not 0 <= getattr(flags, name) <= 65535:
            raise UsageError(f"--{name}={getattr(flags, name)} is no port: 0 (off) to 65535 was expected")
    for name in _POSITIVE:
        if getattr(flags, name) < 1:
            raise UsageError(f"--{name}={getattr(flags, name)}: at least 1 was expected")
    for name in ("file_system_poll_wait_seconds", "model_config_file_poll_wait_seconds"):
        if getattr(flags, name) < 0:
            raise UsageError(f"--{name}={getattr(flags, name)}: 0 (look once) or more was expected")
    if flags.grace_seconds < 0 or flags.lame_duck_seconds < 0:
        raise UsageError("--grace_seconds and --lame_duck_seconds: 0 or more was expected")
    if flags.tensorflow_session_parallelism and (
        flags.tensorflow_intra_op_parallelism or flags.tensorflow_inter_op_parallelism
    ):
        raise UsageError("give either --tensorflow_session_parallelism or the intra and inter op flags, not both")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, keeps line breaks."""


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise UsageError(f"{message}; --help lists the flags")


def _boolean(text: str) -> bool:
    if text.lower() in {"true", "1", "yes", "y"}:
        return True
    if text.lower() in {"false", "0", "no", "n"}:
        return False
    raise argparse.ArgumentTypeError(f"true or false was expected, {text!r} came")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m serving.model_server",
        description="TensorFlow Serving's API on the TensorFlow runtime. Flags are those of tensorflow_model_server.",
        formatter_class=_Help,
        allow_abbrev=False,
    )

    def add(name: str, kind: type, default: object, help_text: str) -> None:
        if kind is bool:
            parser.add_argument(
                f"--{name}", type=_boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help_text
            )
        else:
            parser.add_argument(f"--{name}", type=kind, default=default, metavar=kind.__name__.upper(), help=help_text)

    add("port", int, 8500, "port of the gRPC API; 0 turns it off")
    add("grpc_socket_path", str, "", "also listen for gRPC on this UNIX socket")
    add("rest_api_port", int, 0, "port of the REST API; 0 turns it off")
    add("host", str, "127.0.0.1", "address to listen on (not in the original, which listens on 0.0.0.0)")
    add("model_name", str, "default", "name of the model; unused with --model_config_file")
    add("model_base_path", str, "", "folder of numbered version folders; unused with --model_config_file")
    add("model_config_file", str, "", "text ModelServerConfig: several models, version policies, labels")
    add("model_config_file_poll_wait_seconds", float, 0.0, "read that file again this often; 0: never")
    add("file_system_poll_wait_seconds", float, 1.0, "look for new versions this often; 0: once, at the start")
    add("max_num_load_retries", int, 5, "how often a version that failed to load is tried again")
    add("load_retry_interval_micros", int, 60_000_000, "wait between those tries")
    add("saved_model_tags", str, "serve", "comma-separated tags of the graph to load")
    add("prefer_tflite_model", bool, False, "serve a version's model.tflite where there is one")
    add("num_tflite_pools", int, 1, "pools of TF Lite interpreters a model")
    add("num_tflite_interpreters_per_pool", int, cpus(), "TF Lite interpreters a pool: calls of a model at a time")
    add("enable_batching", bool, False, "run calls that wait at the same time together")
    add("batching_parameters_file", str, "", "text BatchingParameters")
    add("monitoring_config_file", str, "", "text MonitoringConfig: offer Prometheus metrics on the REST port")
    add("ssl_config_file", str, "", "text SSLConfig: TLS on the gRPC port, and clients' certificates")
    add("enable_model_warmup", bool, True, "replay assets.extra/tf_serving_warmup_requests before a version serves")
    add("num_request_iterations_for_warmup", int, 1, "how often each of those records is replayed")
    add("allow_version_labels_for_unavailable_models", bool, False, "let a label name a version that is not loaded")
    add(
        "enable_signature_method_name_check",
        bool,
        False,
        "Classify and Regress: refuse another method's signature",
    )
    add("grpc_max_threads", int, 0, "calls that are worked on at a time; 0: 4 a processor, 128 with batching")
    add("grpc_channel_arguments", str, "", "comma-separated key=value arguments of the gRPC server")
    add("tensorflow_session_parallelism", int, 0, "sets both flags below")
    add("tensorflow_intra_op_parallelism", int, 0, "threads inside one operation; 0: one")
    add("tensorflow_inter_op_parallelism", int, 0, "threads between operations; 0: the call's own thread")
    add("rest_api_timeout_in_ms", int, 30_000, "time limit of a REST call")
    add("rest_api_header_timeout_in_ms", int, 10_000, "time for a REST call's header (not in the original)")
    add("rest_api_idle_timeout_in_ms", int, 60_000, "a REST connection without a call ends (not in the original)")
    add("rest_api_max_body_bytes", int, 64 * 1024 * 1024, "largest REST body (not in the original)")
    add("rest_api_enable_cors_support", bool, False, "answer cross-origin requests from browsers")
    add("grace_seconds", float, 10.0, "time for calls under way after SIGTERM (not in the original)")
    add("lame_duck_seconds", float, 0.5, "time between NOT_SERVING and refusing calls (not in the original)")
    for name, reason in {**WITHOUT_EFFECT, **REFUSED}.items():
        word = "refused" if name in REFUSED else "no effect"
        parser.add_argument(f"--{name}", nargs="?", const="true", default="", metavar="X", help=f"{word}: {reason}")
    parser.add_argument("--version", action="version", version=_version_text(), help="print versions and exit")
    return parser


def _version_text() -> str:
    serving = version("tensorflow-serving-api")
    return f"TensorFlow ModelServer API: {serving} (serving.model_server)\nTensorFlow Library: {version('tensorflow')}"
