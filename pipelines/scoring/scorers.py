"""Who answers: the gateway over the network, or the SavedModel in this process."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from digits import contract
from digits.errors import DigitsError
from pipelines import serving_config
from pipelines.settings import Settings

GATEWAY: Final = "gateway"
MODEL: Final = "model"

BATCH: Final = 1024
"""Images in one call: below the gateway's usual limit of 4,096, and enough for a full matrix product."""


class ScoringFailed(DigitsError):
    """The model or the gateway refuses the images or is not what it should be. Another try would end the same way."""

    code = "scoring_failed"


class ScorerUnavailable(DigitsError):
    """The gateway is away, overloaded or late. Worth another try."""

    code = "scorer_unavailable"


class Scores(NamedTuple):
    """Answers for N images."""

    probabilities: np.ndarray
    """float32 (N, C)."""
    model_version: str


class Scorer(Protocol):
    """Answers for images."""

    def score(self, images_u8: np.ndarray) -> Scores:
        """uint8 (N, 28, 28), N at most ``BATCH``."""


@dataclass(frozen=True)
class Spec:
    """Which scorer; plain data, so that it can travel to another process."""

    through: str
    where: str
    """The gateway's address, or the SavedModel's folder."""


def spec_of(settings: Settings, through: str, where: str | None) -> Spec:
    """The scorer that was asked for; by default the gateway of this machine, or the version served by default.

    Raises:
        ScoringFailed: there is no such model.
    """
    if through == GATEWAY:
        return Spec(GATEWAY, (where or f"http://{settings.host}:{settings.rest_port}").rstrip("/"))
    folder = Path(where).absolute() if where else _served(settings)
    if not (folder / "saved_model.pb").is_file():
        raise ScoringFailed(f"expected a SavedModel in {folder}; there is none. Run: python -m pipelines release")
    return Spec(MODEL, str(folder))


def open_scorer(spec: Spec) -> Scorer:
    """The scorer, loaded once a process."""
    return _model(spec.where) if spec.through == MODEL else _gateway(spec.where)


def count_classes(spec: Spec) -> int:
    """How many classes the model tells apart.

    A gateway is asked for an answer, so that one that is away is said at once and not after each shard's retries.

    Raises:
        ScorerUnavailable, ScoringFailed: as ``GatewayScorer.score``; or the model's list of classes is damaged.
    """
    if spec.through == GATEWAY:
        blank = np.zeros((1, contract.IMAGE_HEIGHT, contract.IMAGE_WIDTH), np.uint8)
        return GatewayScorer(spec.where, attempts=3).score(blank).probabilities.shape[1]
    path = Path(spec.where) / contract.CLASSES_FILE
    try:
        return len(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:  # exported before models said so
        return len(contract.DIGITS)
    except (OSError, ValueError, TypeError) as err:
        raise ScoringFailed(f"{path} is no list of the model's classes: {err}") from err


def _served(settings: Settings) -> Path:
    """The folder of the version that is served by default."""
    number = serving_config.promoted(settings)
    if number is None:
        raise ScoringFailed(f"no version in {settings.versions_dir} is promoted. Run: python -m pipelines release")
    return settings.versions_dir / str(number)


class GatewayScorer:
    """The open inference protocol's REST with binary tensors: ``POST /v2/models/digits/infer``."""

    def __init__(self, url: str, attempts: int = 8, timeout_s: float = 30.0) -> None:
        import httpx2

        self._url, self._attempts = url, attempts
        self._http = httpx2.Client(base_url=url, timeout=timeout_s)

    def score(self, images_u8: np.ndarray) -> Scores:
        """Scores.

        Raises:
            ScorerUnavailable: after several attempts, with growing waits or those that the gateway asks for.
            ScoringFailed: the gateway refuses, or is none.
        """
        import stamina

        def wait_of(err: Exception) -> bool | float:
            return isinstance(err, ScorerUnavailable) and (getattr(err, "retry_after_s", None) or True)

        stamina.instrumentation.set_on_retry_hooks([])  # they log each retry
        retry = stamina.RetryingCaller(attempts=self._attempts, timeout=120.0, wait_initial=0.2, wait_max=10.0)
        return retry.on(wait_of)(self._score_once, images_u8)

    def _score_once(self, images_u8: np.ndarray) -> Scores:
        import httpx2

        tensor = {"name": contract.INPUT_IMAGES, "datatype": "UINT8", "shape": list(images_u8.shape)}
        body = images_u8.tobytes()
        wanted = {"name": contract.OUTPUT_PROBABILITIES, "parameters": {"binary_data": True}}
        head = json.dumps(
            {"inputs": [{**tensor, "parameters": {"binary_data_size": len(body)}}], "outputs": [wanted]}
        ).encode()
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
        try:
            answer = self._http.post(f"/v2/models/{contract.MODEL_NAME}/infer", content=head + body, headers=headers)
        except httpx2.TransportError as err:
            raise ScorerUnavailable(
                f"the gateway at {self._url} cannot be reached: {err or type(err).__name__}"
            ) from err
        if answer.status_code in (429, 502, 503, 504):
            raise _unavailable(self._url, answer)
        return self._read(answer, len(images_u8))

    def _read(self, answer: Any, count: int) -> Scores:
        try:
            if answer.status_code != 200:
                raise ScoringFailed(f"the gateway at {self._url} refused: {answer.json()['error']}")
            size = int(answer.headers["inference-header-content-length"])
            document = json.loads(answer.content[:size])
            probabilities = np.frombuffer(answer.content[size:], "<f4").reshape(count, -1)
            return Scores(probabilities, str(document["model_version"]))
        except (KeyError, ValueError, TypeError) as err:
            raise ScoringFailed(
                f"{self._url} answered {answer.status_code}, and not as a gateway does: is it one?"
            ) from err


class _Unavailable(ScorerUnavailable):
    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def _unavailable(url: str, answer: Any) -> ScorerUnavailable:
    after = answer.headers.get("retry-after", "")
    return _Unavailable(
        f"the gateway at {url} answered {answer.status_code} and still did after several attempts: is a model served?",
        float(after) if after.isdecimal() else None,
    )


class ModelScorer:
    """The SavedModel's serving signature on the TensorFlow runtime here. Imports TensorFlow: seconds."""

    def __init__(self, folder: Path) -> None:
        from training.workspace import import_tensorflow_quietly

        import_tensorflow_quietly(with_keras=False)
        import tensorflow as tf

        self._tf = tf
        self._version = folder.name
        try:
            self._loaded = tf.saved_model.load(str(folder))
            self._call = self._loaded.signatures[contract.SIGNATURE]
        except (OSError, ValueError, KeyError, tf.errors.OpError) as err:
            raise ScoringFailed(f"{folder} cannot be loaded as a model of ours: {' '.join(str(err).split())}") from err

    def score(self, images_u8: np.ndarray) -> Scores:
        """Scores."""
        outputs = self._call(**{contract.INPUT_IMAGES: self._tf.constant(images_u8)})
        return Scores(outputs[contract.OUTPUT_PROBABILITIES].numpy(), self._version)


@functools.lru_cache(maxsize=2)
def _model(folder: str) -> ModelScorer:
    return ModelScorer(Path(folder))


@functools.lru_cache(maxsize=4)
def _gateway(url: str) -> GatewayScorer:
    return GatewayScorer(url)
