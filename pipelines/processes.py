"""Run a command, show what it prints, keep its last lines, and leave nothing of it behind."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TextIO

LEASH: Final = Path(__file__).with_name("leash.py")
"""The script that ties a command to its parent."""

_ANSI: Final = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][A-Za-z0-9]|\x1b\][^\x07]*\x07")
_TAIL_LINES: Final = 40
_STOP_GRACE_S: Final = 10.0


@dataclass(frozen=True)
class Finished:
    """How a command ended. ``returncode`` is negative for a signal; ``tail`` are its last lines, without colours."""

    returncode: int
    tail: tuple[str, ...]
    timed_out: bool


def leashed(command: Sequence[str], terminal: str = "-") -> list[str]:
    """The command wrapped so that it dies with this process (see leash.py)."""
    return [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), terminal, *command]


def stream(
    command: Sequence[str],
    *,
    cwd: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda _line: None,
    terminal: TextIO | None = None,
    hide: Callable[[str], bool] = lambda _line: False,
) -> Finished:
    """Run a command to its end. See ``Command`` for ``cwd``, ``env`` and ``terminal``, ``follow`` for the rest."""
    with Command(command, cwd=cwd, env=env, terminal=terminal) as running:
        return running.follow(timeout_s=timeout_s, on_line=on_line, hide=hide)


class Command:
    """A command under way, on a leash and in a session of its own. A context manager: it is ended when the block ends.

    Args:
        command: program and arguments.
        cwd: folder to run in.
        env: its environment; ours when None.
        terminal: where its output goes as it comes, bytes unchanged. When this is a real terminal the command believes
            it writes to one, so its progress bars live on.
        listens: it has an open stdin, for ``tell``.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        terminal: TextIO | None = None,
        listens: bool = False,
    ) -> None:
        self._shown_on = terminal
        with contextlib.ExitStack() as stack:
            master, slave_path = stack.enter_context(_controlling_terminal(terminal))
            if terminal is not None and terminal.isatty() and master is not None:
                self._read_end, write_end = master, os.open(slave_path, os.O_RDWR | os.O_NOCTTY)
            else:
                self._read_end, write_end = os.pipe()
                stack.callback(os.close, self._read_end)
            try:
                self._process = subprocess.Popen(
                    leashed(command, slave_path),
                    cwd=cwd,
                    env=env,
                    stdin=subprocess.PIPE if listens else subprocess.DEVNULL,
                    stdout=write_end,
                    stderr=write_end,
                    start_new_session=True,
                )
            finally:
                os.close(write_end)
            self._open = stack.pop_all()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tell(self, text: str) -> None:
        """Write to its stdin and close that."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(text.encode())

    def follow(
        self,
        *,
        timeout_s: float,
        on_line: Callable[[str], None] = lambda _line: None,
        hide: Callable[[str], bool] = lambda _line: False,
    ) -> Finished:
        """Show what it prints, until it has ended or ``timeout_s`` have passed: then it is stopped.

        Args:
            timeout_s: counted from now.
            on_line: called with each whole line it prints (stdout and stderr), colours and progress bars taken out.
            hide: whole lines for which this is true do not go to the terminal.
        """
        lines = _Lines(on_line, self._shown_on.buffer if self._shown_on is not None else None, hide)
        deadline = time.monotonic() + timeout_s
        timed_out = False
        try:
            for chunk in _chunks(self._read_end, self._process, deadline):
                lines.feed(chunk)
            timed_out = self._process.poll() is None and time.monotonic() >= deadline
        finally:
            self.stop()
        lines.close()
        return Finished(self._process.returncode, tuple(lines.tail), timed_out)

    def stop(self) -> None:
        """End it and what it started, if it has not ended."""
        stop_session(self._process)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._open.close()


def stop_session(process: "subprocess.Popen[bytes]", grace_s: float = _STOP_GRACE_S) -> None:
    """End a process that leads its own session, and its group: politely, then by force. Nothing if it has ended."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        # The second round is also for those of the group that outlived the first one's end of their leader.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)


@contextlib.contextmanager
def _controlling_terminal(shown_on: TextIO | None) -> Iterator[tuple[int | None, str]]:
    """A pseudo-terminal for the command's session; (None, "-") where the system has none to give."""
    try:
        master, slave = pty.openpty()
    except OSError:
        yield None, "-"
        return
    path = os.ttyname(slave)
    if shown_on is not None and shown_on.isatty():
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(shown_on.fileno())
            _set_size(slave, size.lines, size.columns)
    try:
        yield master, path
    finally:
        os.close(slave)
        os.close(master)


def _set_size(descriptor: int, rows: int, columns: int) -> None:
    import fcntl
    import struct
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _chunks(read_end: int, process: "subprocess.Popen[bytes]", deadline: float) -> Iterator[bytes]:
    """What comes from the command until it has ended and said all, or the deadline has passed."""
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        readable, _, _ = select.select([read_end], [], [], 0.0 if ended else 0.2)
        if readable:
            try:
                chunk = os.read(read_end, 65536)
            except OSError:  # a pseudo-terminal says so when its last writer is gone
                chunk = b""
            if chunk:
                yield chunk
                continue
            if not ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, min(0.2, deadline - time.monotonic())))
                continue
        if ended:
            return


class _Lines:
    """Cuts bytes into readable lines, shows them, and keeps the last of them."""

    def __init__(self, on_line: Callable[[str], None], shown_on: BinaryIO | None, hide: Callable[[str], bool]) -> None:
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._on_line, self._shown_on, self._hide = on_line, shown_on, hide
        self._rest = b""
        self._rest_shown = 0
        self._hid_last = False

    def feed(self, chunk: bytes) -> None:
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        for raw in whole:
            self._emit(raw, b"\n")
        # A line not ended yet waits for its end, unless it moves the cursor: a progress bar is shown as it comes.
        if self._shown_on is not None and (b"\r" in self._rest[:-1] or b"\x1b" in self._rest):
            self._show(self._rest[self._rest_shown :])
            self._rest_shown = len(self._rest)

    def close(self) -> None:
        if self._rest:
            self._emit(self._rest, b"")
        self._rest = b""

    def _emit(self, raw: bytes, end: bytes) -> None:
        # A progress bar redraws its line after a carriage return: the last drawing is the line.
        text = _ANSI.sub(b"", raw).rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace").strip("\x00").rstrip()
        hidden = not self._rest_shown and (self._hide(text) or (not text and self._hid_last))
        if not hidden:
            self._show(raw[self._rest_shown :] + end)
        self._hid_last, self._rest_shown = hidden, 0
        if text:
            self.tail.append(text)
            self._on_line(text)

    def _show(self, raw: bytes) -> None:
        if self._shown_on is not None:
            self._shown_on.write(raw)
            self._shown_on.flush()
