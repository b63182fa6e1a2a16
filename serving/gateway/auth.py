"""Who may call, and how often: API keys, hashed where they are kept, and rate limits for each of them.

A key is 256 random bits, so one SHA-256 keeps it as well as a slow hash would keep a password. The file holds one line
a key, ``name:hash`` or ``name:hash:rate``; ``python -m serving.gateway make-key NAME`` makes both.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from digits.errors import Overloaded, Unauthenticated
from serving.gateway.metrics import Metrics
from serving.gateway.settings import BadSettings, Settings, check_rate

KEY_BYTES: Final = 32

_LINE: Final = re.compile(r"(?P<name>[\w.@-]{1,64}):(?P<hash>[0-9a-f]{64})(?::(?P<rate>.+))?", re.ASCII)

Headers = Iterable[tuple[bytes | str, bytes | str]]


class ApiKey(NamedTuple):
    """One line of the keys' file. ``rate`` is empty where the general one applies."""

    name: str
    sha256: bytes
    rate: str = ""


def make_key() -> str:
    """A new random key."""
    return secrets.token_urlsafe(KEY_BYTES)


def key_line(name: str, key: str, rate: str = "") -> str:
    """What the keys' file holds of a key.

    Raises:
        BadSettings: The name is none.
    """
    line = f"{name}:{_sha256(key).hex()}" + (f":{rate}" if rate else "")
    if not _LINE.fullmatch(line):
        raise BadSettings(f"expected a name of letters, digits and ._@-, at most 64 of them; came {name[:80]!r}")
    return line


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file; empty lines and those that begin with # are skipped.

    Raises:
        BadSettings: It cannot be read, a line is malformed, or two have the same name. The line itself is not quoted:
            somebody may have put a key there.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not text"
        raise BadSettings(f"DIGITS_API_KEYS_FILE={str(path)!r} cannot be read: {reason}") from err
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise BadSettings(
                f"{path}, line {number}: expected name:sha256, the hash as 64 hexadecimal digits, and :rate if it has "
                "one of its own. `python -m serving.gateway make-key NAME` makes such a line"
            )
        if found["name"] in keys:
            raise BadSettings(f"{path}, line {number}: the name {found['name']!r} is there twice")
        try:
            rate = check_rate(found["rate"] or "")
        except ValueError as err:
            raise BadSettings(f"{path}, line {number}: {err}") from err
        keys[found["name"]] = ApiKey(found["name"], bytes.fromhex(found["hash"]), rate)
    return tuple(keys.values())


class Guard:
    """Stands before everything that costs work. Make one with ``Guard.of``.

    Args:
        keys: Whose keys are known; None if nobody needs one.
        rate: What each caller may ask, such as ``100/second``; empty for no limit.
        metrics: Where refusals are counted.
    """

    def __init__(self, keys: tuple[ApiKey, ...] | None, rate: str, metrics: Metrics) -> None:
        self._keys = keys
        self._metrics = metrics
        rates = {key.name: key.rate or rate for key in keys or ()}
        self._rates = Rates(rate, rates) if rate or any(rates.values()) else None

    @classmethod
    def of(cls, settings: Settings, metrics: Metrics) -> "Guard | None":
        """As the settings say; None if they ask for neither keys nor rates.

        Raises:
            BadSettings: The file of keys cannot be used, or keys are required and there are none.
        """
        keys = read_keys(settings.api_keys_file) if settings.api_keys_file else None
        if settings.require_keys and not keys:
            raise BadSettings(
                "DIGITS_REQUIRE_KEYS=true: expected a file with at least one key; set DIGITS_API_KEYS_FILE, and make "
                "keys with `python -m serving.gateway make-key NAME`"
            )
        return None if keys is None and not settings.rate_limit else cls(keys, settings.rate_limit, metrics)

    def admit(self, headers: Headers, address: str) -> str:
        """Let a request in.

        Args:
            headers: Those of HTTP, names in lower case, or the metadata of gRPC.
            address: The client's.

        Returns:
            The name of its key; empty where nobody needs one.

        Raises:
            Unauthenticated: No key came, or one that is not known.
            Overloaded: The caller has had its share for now.
        """
        name = self.identify(headers)
        self.count(name, address)
        return name

    def identify(self, headers: Headers) -> str:
        """The name of a request's key; empty where nobody needs one. Raises Unauthenticated."""
        return "" if self._keys is None else self._owner(headers)

    def count(self, name: str, address: str) -> None:
        """One request more of a caller that is known. Raises Overloaded."""
        if self._rates is None:
            return
        wait_s = self._rates.take(name, address)
        if wait_s:
            self._metrics.shed("rate_limited")
            raise Overloaded("more requests than this caller may send; try again later", wait_s)

    def _owner(self, headers: Headers) -> str:
        sent = _sent_key(headers)
        if sent is None:
            raise Unauthenticated("expected an API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`")
        digest = _sha256(sent)
        owner = ""
        for key in self._keys or ():  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(key.sha256, digest):
                owner = key.name
        if not owner:
            raise Unauthenticated("the API key is not one that is known here")
        return owner


class Rates:
    """Counts requests in a sliding window. Each worker process counts its own.

    Args:
        rate: Of callers that have none of their own; empty for no limit.
        of_keys: The rates of keys by their names.
    """

    def __init__(self, rate: str, of_keys: Mapping[str, str]) -> None:
        # Imported where rates are set: 0.1 s of start and some megabytes for nothing otherwise.
        from limits import parse_many
        from limits.storage import MemoryStorage
        from limits.strategies import SlidingWindowCounterRateLimiter

        # Not its moving window: that one keeps every address it ever saw.
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._by_address = tuple(parse_many(rate)) if rate else ()
        self._by_name = {name: tuple(parse_many(own)) if own else () for name, own in of_keys.items()}

    def take(self, name: str, address: str) -> float:
        """Count one request: 0 if it may be answered, else seconds until it is worth another try."""
        limits: tuple[Any, ...] = self._by_name[name] if name else self._by_address
        caller = ("key", name) if name else ("address", address)
        for limit in limits:
            if not self._window.hit(limit, *caller):
                return max(0.05, self._window.get_window_stats(limit, *caller).reset_time - time.time())
        return 0.0


def _sent_key(headers: Headers) -> str | None:
    for name, value in headers:
        if name in (b"authorization", "authorization"):
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            scheme, _, key = text.partition(" ")
            if scheme.lower() == "bearer":
                return key.strip()
        elif name in (b"x-api-key", "x-api-key"):
            return value.decode("latin-1") if isinstance(value, bytes) else value
    return None


def _sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
