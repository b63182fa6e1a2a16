"""What the model server says of its versions, over its REST API. It may be away: promotions do not depend on it."""

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from digits import contract
from digits.errors import DigitsError
from pipelines.settings import Settings

AVAILABLE: Final = "AVAILABLE"
_LOOK_EVERY_S: Final = 0.1


class NotLoaded(DigitsError):
    """The model server cannot load this version, or takes too long."""

    code = "not_loaded"


class NoAnswer(DigitsError):
    """The model server did not answer a query."""

    code = "no_answer"


def version_states(settings: Settings) -> dict[int, tuple[str, str]] | None:
    """Version -> its state and what went wrong (empty when nothing did); None when no model server answers."""
    answer = _get(settings, "")
    if answer is None:
        return None
    return {
        int(status["version"]): (str(status.get("state")), _problem(status))
        for status in answer.get("model_version_status", [])
    }


def labelled_version(settings: Settings, label: str) -> int | None:
    """The available version that a label names at the model server; None when it knows none, or does not answer."""
    answer = _get(settings, f"/labels/{label}") or {}
    numbers = [int(s["version"]) for s in answer.get("model_version_status", []) if s.get("state") == AVAILABLE]
    return numbers[0] if numbers else None


def wait_until_available(settings: Settings, number: int) -> None:
    """Wait until a version is loaded and warm.

    Raises:
        NotLoaded: it cannot be, or not within ``load_timeout_s``.
    """

    def there() -> bool:
        state, problem = (version_states(settings) or {}).get(number, ("", ""))
        if problem:
            raise NotLoaded(f"the model server cannot load version {number}: {problem}")
        return state == AVAILABLE

    if not _wait(there, settings.load_timeout_s):
        raise NotLoaded(f"the model server did not load version {number} within {settings.load_timeout_s:.0f} s")


def wait_until_labelled(settings: Settings, label: str, number: int, limit_s: float) -> bool:
    """Wait until a label names this version at the model server. False when it does not within the limit."""
    return _wait(lambda: labelled_version(settings, label) == number, limit_s)


def predict(settings: Settings, number: int, images_u8: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One version's probabilities (N, C) and digits (N,) for uint8 images (N, 28, 28).

    Raises:
        NoAnswer: there is none, or it is no such answer.
    """
    body = {"signature_name": contract.SIGNATURE, "inputs": {contract.INPUT_IMAGES: images_u8.tolist()}}
    url = _url(settings, f"/versions/{number}:predict")
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310  # an operator's setting
    try:
        with urllib.request.urlopen(request, timeout=settings.load_timeout_s) as answer:  # noqa: S310  # as above
            outputs = json.loads(answer.read())["outputs"]
        return np.asarray(outputs[contract.OUTPUT_PROBABILITIES]), np.asarray(outputs[contract.OUTPUT_DIGIT])
    except urllib.error.HTTPError as err:
        raise NoAnswer(f"the model server answers {err.code} for version {number}") from err
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise NoAnswer(f"the model server gives no answer with version {number}: {err}") from err


def _wait(there: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not there():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def _get(settings: Settings, path: str) -> dict[str, Any] | None:
    """The answer's JSON; of an error too, which has no versions in it."""
    url = _url(settings, path)
    try:
        with urllib.request.urlopen(url, timeout=settings.model_server_timeout_s) as answer:  # noqa: S310  # an operator's setting
            content = json.loads(answer.read())
    except urllib.error.HTTPError as err:
        content = {}
        with contextlib.suppress(ValueError, OSError):
            content = json.loads(err.read())
        if "error" not in content:
            return None  # something else listens there
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _url(settings: Settings, path: str) -> str:
    base = settings.model_server_url or f"http://127.0.0.1:{settings.model_server_rest_port}"
    return f"{base.rstrip('/')}/v1/models/{contract.MODEL_NAME}{path}"


def _problem(status: dict[str, Any]) -> str:
    detail = status.get("status") or {}
    code = detail.get("error_code", "OK")
    return "" if code == "OK" else str(detail.get("error_message") or code)
