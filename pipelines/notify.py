"""Tell a webhook what became of a flow. A webhook that does not listen never stops or fails anything."""

import logging
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from pipelines.settings import Settings

_ATTEMPTS: Final = 5


def notify(settings: Settings, event: dict[str, Any], tell: Callable[[str], None]) -> bool:
    """POST an event as JSON to ``DIGITS_NOTIFY_URL``, trying again while the network or the receiver fails.

    Args:
        settings: where to, and how long to try.
        event: what happened. ``text`` is a sentence for people, which chat services show as it is.
        tell: called with one line when it could not be delivered. The URL often holds a secret: only its host is named.

    Returns:
        Whether it was delivered. False also when no webhook is set.
    """
    if settings.notify_url is None:
        return False
    import stamina

    url = settings.notify_url.get_secret_value()
    try:
        for attempt in stamina.retry_context(
            on=_TryAgain, attempts=_ATTEMPTS, timeout=settings.notify_timeout_s, wait_initial=0.5
        ):
            with attempt:
                _post(url, event, settings.notify_timeout_s / 2)
    except _NotTold as err:
        tell(f"the webhook at {_host(url)} was not told: {err}")
        return False
    return True


class _NotTold(Exception):
    """In words without the URL, since retries are logged with their cause."""


class _TryAgain(_NotTold):
    """It may listen later."""


def _post(url: str, event: dict[str, Any], timeout_s: float) -> None:
    import httpx2

    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)  # below, they log whole URLs
    try:
        status = httpx2.post(url, json=event, timeout=timeout_s).status_code
    except httpx2.TransportError as err:
        raise _TryAgain(type(err).__name__) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as err:
        raise _NotTold(type(err).__name__) from None
    if status in (408, 425, 429) or status >= 500:
        raise _TryAgain(f"it answers {status}")
    if not 200 <= status < 300:
        raise _NotTold(f"it answers {status}")


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "(no host in DIGITS_NOTIFY_URL)"
    except ValueError:
        return "(no host in DIGITS_NOTIFY_URL)"
