"""The process: listen, load TensorFlow, follow the models, and leave in order."""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import structlog

from serving.model_server import config, logs
from serving.model_server.errors import ServingError, UsageError
from serving.model_server.flags import Flags, cpus
from serving.model_server.health import Health
from serving.model_server.listeners import GrpcListener, RestListener

log = structlog.get_logger()

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"


class Server:
    """One model server process. ``run`` returns when it was told to stop and has drained."""

    def __init__(self, flags: Flags) -> None:
        """Read the configuration and bind the ports.

        Raises:
            UsageError: see ``config`` and ``listeners``.
        """
        self._flags = flags
        self._models = config.from_flags(flags)
        self._batching = config.read_batching(flags)
        self._metrics_path = config.read_metrics_path(flags)
        tls = config.read_tls(flags)
        config.require_folders(self._models, flags)
        self._health = Health()
        self._stop = threading.Event()
        self._loaded = False
        self._grpc: GrpcListener | None = None
        self._rest: RestListener | None = None
        if flags.port or flags.grpc_socket_path:
            self._grpc = GrpcListener(
                flags.host,
                flags.port,
                flags.grpc_socket_path,
                flags.grpc_channel_arguments,
                tls,
            )
            self._grpc.add(lambda server: server.add_generic_rpc_handlers([self._health.handler()]))
        if flags.rest_api_port:
            self._rest = RestListener(
                flags.host,
                flags.rest_api_port,
                header_timeout_s=flags.rest_api_header_timeout_in_ms / 1000,
                idle_timeout_s=flags.rest_api_idle_timeout_in_ms / 1000,
            )

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit status. A second signal ends the process at once."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        log.info(
            "server_starting",
            host=self._flags.host,
            port=self._flags.port,
            rest_api_port=self._flags.rest_api_port,
            models={model.name: str(model.base_path) for model in self._models},
        )
        manager = self._load()
        self._loaded = True
        threading.Thread(target=self._follow_config, args=(manager,), name="config", daemon=True).start()
        log.info("server_started", pid=os.getpid())
        self._stop.wait()
        self._drain()
        manager.stop()
        log.info("server_stopped")
        return 0

    def _load(self) -> Any:
        """Everything that needs TensorFlow, imported here so that all before it was instant."""
        started = time.monotonic()
        with logs.libraries_silenced():
            from serving.model_server import runtime  # noqa: F401, I001 - before all others: it is what keeps the import short

            from serving.model_server import rest, rpc
            from serving.model_server.api import Api
            from serving.model_server.batching import Batcher
            from serving.model_server.loading import Loader
            from serving.model_server.manager import Manager
            from serving.model_server.metrics import Metrics
            from serving.model_server.workers import Workers

        flags = self._flags
        loader = Loader(flags)
        manager = Manager(
            loader.load,
            poll_s=flags.file_system_poll_wait_seconds,
            max_retries=flags.max_num_load_retries,
            retry_s=flags.load_retry_interval_micros / 1e6,
            on_change=self._on_change,
            labels_may_dangle=flags.allow_version_labels_for_unavailable_models,
        )
        metrics = Metrics(manager.knows, manager.states) if self._metrics_path else None
        loader.metrics = metrics
        if self._batching:
            loader.batcher = Batcher(self._batching, metrics.batches() if metrics else None)
        api = Api(manager, check_method_names=flags.enable_signature_method_name_check, metrics=metrics)
        # Before anybody may ask for another configuration, which this would take back.
        manager.start(self._models)
        if self._grpc:
            workers = Workers(flags.grpc_max_threads, cpus(), in_loop=loader.batcher is None)
            self._grpc.add(lambda server: rpc.add_services(server, api, workers, metrics))
            self._grpc.ready()
        if self._rest:
            app = rest.create_app(
                api,
                ThreadPoolExecutor(flags.grpc_max_threads, "rest"),
                timeout_s=flags.rest_api_timeout_in_ms / 1000,
                max_body_bytes=flags.rest_api_max_body_bytes,
                cors=flags.rest_api_enable_cors_support,
                metrics=metrics,
                metrics_path=self._metrics_path or "",
            )
            self._rest.serve(app)
        gc.freeze()  # a full collection would stop all calls while it looks at what TensorFlow's import left
        log.info("tensorflow_loaded", seconds=round(time.monotonic() - started, 1))
        return manager

    def _on_change(self, serving: Mapping[str, bool]) -> None:
        everything = bool(serving) and all(serving.values())
        self._health.update({"": everything, PREDICTION_SERVICE: everything, **serving})

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self._stop.is_set():
            os._exit(128 + signum)
        self._stop.set()
        log.info("server_stopping", signal=signal.Signals(signum).name, grace_seconds=self._flags.grace_seconds)
        if not self._loaded:
            os._exit(0)  # nothing was served yet, and the import of TensorFlow cannot be interrupted otherwise

    def _drain(self) -> None:
        """Say so, wait for those who look, then refuse new calls and let those under way end."""
        deadline = time.monotonic() + self._flags.grace_seconds
        self._health.drain()
        time.sleep(min(self._flags.lame_duck_seconds, self._flags.grace_seconds))
        left = max(0.0, deadline - time.monotonic())
        stopped = self._grpc.stop(left) if self._grpc else None
        if self._rest:
            self._rest.stop(left)
        self._health.close()
        if stopped:
            futures.wait([stopped], left + 1)
        if self._rest:
            self._rest.wait(max(0.0, deadline - time.monotonic()) + 1)

    def _follow_config(self, manager: Any) -> None:
        """Read ``--model_config_file`` again at its interval; a bad file changes nothing."""
        period_s = self._flags.model_config_file_poll_wait_seconds
        if not self._flags.model_config_file or not period_s:
            return
        current, complaint = self._models, ""
        while not self._stop.wait(period_s):
            try:
                models = config.read_file(Path(self._flags.model_config_file))
                if models != current:
                    manager.reconfigure(models)
                    current = models
                    log.info("config_reloaded", models=[model.name for model in models])
                complaint = ""
            except (UsageError, ServingError) as err:
                if str(err) != complaint:  # once, not at every look
                    complaint = str(err)
                    log.error("config_not_reloaded", reason=complaint)  # noqa: TRY400 - the reason is the whole story


def leave(status: int) -> None:
    """End the process without the interpreter's teardown, in which the threads of two C++ runtimes may still run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
