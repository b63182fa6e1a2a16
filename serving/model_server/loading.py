"""From a version's folder to a model that is ready to serve: its format, its batching, its warm-up."""

import time
from pathlib import Path

import structlog

from serving.model_server import storage, warmup
from serving.model_server.batching import BatchedModel, Batcher
from serving.model_server.errors import Code, ServingError
from serving.model_server.flags import Flags
from serving.model_server.metrics import Metrics
from serving.model_server.model import Model
from serving.model_server.saved_model import Options, SavedModel
from serving.model_server.tflite import CompletedTfLiteModel, TfLiteModel

log = structlog.get_logger()


class Loader:
    """Loads as the flags say.

    Attributes:
        batcher: joins the calls of every model, None where batching is off.
        metrics: told of each load, None where they are off.
    """

    def __init__(self, flags: Flags) -> None:
        self._flags = flags
        self._options = Options(
            tags=tuple(flags.saved_model_tags.split(",")),
            intra_op_threads=flags.tensorflow_intra_op_parallelism or flags.tensorflow_session_parallelism,
            inter_op_threads=flags.tensorflow_inter_op_parallelism or flags.tensorflow_session_parallelism,
        )
        self.batcher: Batcher | None = None
        self.metrics: Metrics | None = None

    def load(self, name: str, number: int, path: Path) -> Model:
        """Load and warm version ``number`` of model ``name``.

        Raises:
            ServingError: its files are no model, or its warm-up requests fail; with the reason.
        """
        model = self._read(path)
        try:
            if self._flags.enable_model_warmup:
                records = self._warm(model)
                log.info("version_warmed", model=name, version=number, records=records)
        except Exception:
            model.close()
            raise
        return BatchedModel(model, self.batcher) if self.batcher else model

    def _read(self, path: Path) -> Model:
        started_s, succeeded = time.perf_counter(), False
        try:
            model = self._open(path)
            succeeded = True
        finally:
            if self.metrics:
                self.metrics.loaded(str(path), succeeded, time.perf_counter() - started_s)
        return model

    def _open(self, path: Path) -> Model:
        if self._flags.prefer_tflite_model and storage.has_lite_model(path):
            lite = TfLiteModel(path, self._flags.num_tflite_pools * self._flags.num_tflite_interpreters_per_pool)
            if not storage.has_saved_model(path):
                return lite
            return CompletedTfLiteModel(lite, SavedModel(path, self._options))
        return SavedModel(path, self._options)

    def _warm(self, model: Model) -> int:
        started_s, status = time.perf_counter(), Code.OK
        try:
            return warmup.replay(model, self._flags.num_request_iterations_for_warmup)
        except ServingError as err:
            status = err.status
            raise
        finally:
            if self.metrics:
                self.metrics.warmed(str(model.path), status, time.perf_counter() - started_s)
