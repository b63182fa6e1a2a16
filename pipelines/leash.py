"""Start a command so that it cannot outlive the process that asked for it, even when that one is killed with -9.

Run as a script, without this package and without site-packages (it starts in 15 ms)::

    python -I -S leash.py PARENT_PID TTY COMMAND...

PARENT_PID 0 takes whatever the parent is.

On Linux the kernel sends SIGTERM to the command when its parent dies. With TTY a path instead of "-", that terminal
also becomes the controlling one of the command's session: when the parent dies, the terminal's other end closes and the
kernel sends SIGHUP to the command *and to all it started* (the first way reaches the command alone).
"""

import contextlib
import os
import signal
import sys


def _die_with_parent(parent_pid: int) -> None:
    if sys.platform.startswith("linux"):
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)
    if parent_pid and os.getppid() != parent_pid:  # it died before the line above
        sys.exit(1)


def _adopt_terminal(path: str) -> None:
    import fcntl
    import termios

    terminal = os.open(path, os.O_RDWR)  # on Linux this is enough for a session leader without a terminal
    with contextlib.suppress(OSError):  # it is ours already
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    os.close(terminal)


def _hear_signals() -> None:
    """Undo what ``nohup`` and a script's ``&`` leave behind: ignored signals are inherited; a leash is made of them."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    _hear_signals()
    _die_with_parent(int(sys.argv[1]))
    if sys.argv[2] != "-":
        _adopt_terminal(sys.argv[2])
    try:
        os.execvp(sys.argv[3], sys.argv[3:])  # noqa: S606  # no shell is the point
    except OSError as err:
        sys.stderr.write(f"cannot start {sys.argv[3]}: {err.strerror}\n")
        sys.exit(127)
