"""Structured logs: a constant event with its values as fields, text on a terminal and JSON otherwise. Never pixels."""

import asyncio
import atexit
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import orjson

# structlog looks for rich, to draw tracebacks with it; the gateway does not, and importing it is a fifth of its start.
_hidden = "rich" not in sys.modules
if _hidden:
    sys.modules["rich"] = None  # type: ignore[assignment]
import structlog  # noqa: E402
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger  # noqa: E402

if _hidden:
    del sys.modules["rich"]

FLUSH_S: Final = 0.05
"""Longest time a line stays in the process: a write for each of thousands of requests a second is costly."""

FLUSH_BYTES: Final = 64 * 1024


SHARED_BYTES: Final = 4096
"""What Linux writes to a pipe in one piece (PIPE_BUF), so that lines of several processes do not mix."""


class Lines:
    """Where rendered lines go. In a running loop they are gathered for at most ``FLUSH_S``; errors go out at once.

    Args:
        stream: Where to.
        shared: Other processes write there too.
    """

    def __init__(self, stream: TextIO, *, shared: bool = False) -> None:
        self._stream = stream
        self._shared = shared
        self._parts: list[bytes] = []
        self._bytes = 0
        self._flush_is_due = False
        atexit.register(self.flush)

    def info(self, line: bytes | str) -> None:
        """Take one line."""
        data = line if isinstance(line, bytes) else line.encode(errors="backslashreplace")
        self._parts.append(data)
        self._bytes += len(data)
        if self._flush_is_due:
            if self._bytes >= FLUSH_BYTES:
                self.flush()
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
        else:
            self._flush_is_due = True
            loop.call_later(FLUSH_S, self._flush_later)

    debug = warning = info

    def error(self, line: bytes | str) -> None:
        """Take one line and write all."""
        self.info(line)
        self.flush()

    critical = exception = error

    def flush(self) -> None:
        """Write what was gathered. A reader that has gone is no reason to stop serving."""
        parts, self._parts, self._bytes = self._parts, [], 0
        if not parts:
            return
        for piece in _pieces(parts) if self._shared else (b"\n".join(parts) + b"\n",):
            self._write(piece)

    def _write(self, text: bytes) -> None:
        try:
            if hasattr(self._stream, "buffer"):
                self._stream.buffer.write(text)
            else:
                self._stream.write(text.decode())
            self._stream.flush()
        except (OSError, ValueError):
            return

    def _flush_later(self) -> None:
        self._flush_is_due = False
        self.flush()


class Logs:
    """What the gateway logs with. Takes a level, a format and a stream as ``DIGITS_LOG_LEVEL`` and ``…_FORMAT`` say.

    Args:
        level: debug, info, warning or error.
        log_format: auto, json or text.
        stream: Where to; standard output if None.
        shared: Other processes write there too.
    """

    def __init__(
        self, level: str = "info", log_format: str = "auto", stream: TextIO | None = None, *, shared: bool = False
    ) -> None:
        stream = stream or sys.stdout
        self._as_text = log_format == "text" or (log_format == "auto" and stream.isatty())
        self._level = logging.getLevelNamesMapping()[level.upper()]
        self._lines = Lines(stream, shared=shared)
        processors: list[Processor] = [structlog.processors.add_log_level]
        if self._as_text:
            processors += [
                structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
                structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=12),
            ]
        else:
            processors += [_stamp, _exception_as_text, _json]
        self.log: FilteringBoundLogger = structlog.wrap_logger(
            self._lines,
            processors=processors,
            wrapper_class=structlog.make_filtering_bound_logger(self._level),
            context_class=dict,
        ).bind()
        """For everything but requests."""

    def request(self, fields: dict[str, object], *, failed: bool) -> None:
        """The one line of a request. At thousands a second, structlog's general way would be a tenth of the work."""
        if self._as_text:
            (self.log.warning if failed else self.log.info)("request", **fields)
        elif self._level <= (logging.WARNING if failed else logging.INFO):
            line = {"time": datetime.now(UTC), "level": "warning" if failed else "info", "event": "request", **fields}
            self._lines.info(orjson.dumps(line, option=orjson.OPT_UTC_Z))

    def shed(self, protocol: str, route: str, code: str, duration_s: float, request_id: str) -> None:
        """The line of a request that was refused for lasting overload: the same one, made in half the time.

        All that goes into it is ours or harmless in JSON (``app.request_id_from``).
        """
        if self._as_text or self._level > logging.INFO:
            fields = {"protocol": protocol, "route": route, "code": code, "ms": round(duration_s * 1000, 3)}
            self.request({**fields, "request_id": request_id, "error": "overloaded"}, failed=False)
            return
        time = datetime.now(UTC).isoformat()[:-6]
        self._lines.info(
            f'{{"time":"{time}Z","level":"info","event":"request","protocol":"{protocol}","route":"{route}",'
            f'"code":"{code}","ms":{duration_s * 1000:.3f},"request_id":"{request_id}","error":"overloaded"}}'
        )

    def flush(self) -> None:
        """Write what was gathered."""
        self._lines.flush()


def take_over_library_logs(log: FilteringBoundLogger) -> None:
    """Have the warnings of uvicorn, grpc and asyncio written as our own lines."""
    handler = _Forward(log)
    for name in ("uvicorn", "grpc", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.WARNING)


class _Forward(logging.Handler):
    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        write = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        write("library", logger=record.name, message=record.getMessage(), exc_info=record.exc_info)


def _pieces(lines: list[bytes]) -> Iterator[bytes]:
    """Whole lines in pieces of at most ``SHARED_BYTES``, but for a line that is longer."""
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) >= SHARED_BYTES:
            yield piece
            piece = b""
        piece += line + b"\n"
    yield piece


def _json(_: WrappedLogger, __: str, event: EventDict) -> bytes:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z)


def _stamp(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {"time": datetime.now(UTC), "level": event.pop("level"), "event": event.pop("event"), **event}


def _exception_as_text(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    found: Any = event.pop("exc_info", None)
    if found is True:
        found = sys.exc_info()
    if isinstance(found, tuple):
        found = found[1]
    if isinstance(found, BaseException):
        event["exception"] = "".join(traceback.format_exception(found))
    return event
