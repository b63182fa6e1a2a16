"""``python -m serving.gateway``: REST and gRPC. Settings come from ``DIGITS_*``; see settings.py, or ``--help``."""

import argparse
import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import textwrap
import warnings

# Pictures are small: threads of numpy's algebra would cost memory and start and bring nothing.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import uvloop

from digits.errors import DigitsError
from serving.gateway.logs import Logs, take_over_library_logs
from serving.gateway.preflight import await_upstream
from serving.gateway.settings import BadSettings, Settings, read_settings


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, then drain. Returns the exit status: 0, 1 (cannot start), 2 (bad setting)."""
    asked = _parse(arguments)
    try:
        return _make_key(asked.name, asked.stdin) if asked.command == "make-key" else _run(asked.worker)
    except BadSettings as err:
        print(f"gateway: {err}", file=sys.stderr)
        return 2
    except DigitsError as err:
        print(f"gateway: {err}", file=sys.stderr)
        return 1


def _run(worker: tuple[int, int, int] | None) -> int:
    settings = read_settings()
    several = settings.workers > 1
    logs = Logs(settings.log_level, settings.log_format, shared=several)
    take_over_library_logs(logs.log)
    # A damaged picture makes Pillow warn on stderr; whoever sent it is told in the answer.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    _allow_many_connections()
    try:
        if worker is None:
            await_upstream(settings)
        if several and worker is None:
            from serving.gateway.supervisor import Supervisor  # here only: it loads nothing that answers requests

            return asyncio.run(Supervisor(settings, logs).run())
        uvloop.run(_serve(settings, logs) if worker is None else _serve_as_worker(settings, logs, *worker))
    finally:
        logs.flush()
    return 0


async def _serve(settings: Settings, logs: Logs) -> None:
    from serving.gateway.running import Running  # late: a supervisor does without

    stop = _told_to_stop()
    _take_hangups(stop, logs)
    running = await Running.start(settings, logs)
    _settle()
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, running.rest_ended}, return_when=asyncio.FIRST_COMPLETED)
    await running.drain()


async def _serve_as_worker(settings: Settings, logs: Logs, line: int, rest: int, grpc: int) -> None:
    """One of several. The supervisor hands down descriptors: its line, and the listening sockets of REST and gRPC."""
    from serving.gateway.running import Running
    from serving.gateway.worker import Control

    stop = _told_to_stop()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the supervisor's business, though a terminal tells all
    control = await Control.open(line)
    listeners = socket.socket(fileno=rest), socket.socket(fileno=grpc)
    running = await Running.start(settings, logs, listeners, control)
    _settle()
    with contextlib.suppress(TimeoutError):  # a model server that says nothing is no reason not to start
        await asyncio.wait_for(running.gateway.upstream.looked.wait(), 2.5)
    control.ready()
    ends = [asyncio.create_task(event.wait()) for event in (stop, control.retire, control.orphaned)]
    await asyncio.wait({*ends, running.rest_ended}, return_when=asyncio.FIRST_COMPLETED)
    await (running.retire() if control.retire.is_set() else running.drain())
    await control.close()


def _told_to_stop() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _take_hangups(stop: asyncio.Event, logs: Logs) -> None:
    """A terminal that closes ends this like Ctrl-C. Without one SIGHUP asks for new files: that takes two workers."""

    def told() -> None:
        logs.log.warning("hangup_ignored", hint="restart to read new files; with DIGITS_WORKERS=2 SIGHUP loses no call")

    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, told)
    else:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, stop.set)


def _settle() -> None:
    """What was made so far stays for good: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def _allow_many_connections() -> None:
    """A shell's usual 1,024 descriptors are fewer than the idle connections that a gateway should bear."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _make_key(name: str, from_stdin: bool) -> int:
    from serving.gateway.auth import key_line, make_key

    key = sys.stdin.readline().strip() if from_stdin else make_key()
    if len(key) < 20:
        raise BadSettings(f"expected a key of at least 20 characters on standard input, came {len(key)}")
    print(key_line(name, key))
    if not from_stdin:
        print(f"the key, shown this once: {key}", file=sys.stderr)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m serving.gateway",
        usage="python -m serving.gateway [-h] [make-key NAME [--stdin]]",
        description="The online front: REST and gRPC before a model server, until SIGTERM or Ctrl-C.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)  # the supervisor's word to a worker
    commands = parser.add_subparsers(dest="command", title="other commands")
    key = commands.add_parser(
        "make-key", help="make an API key: the key on standard error, its line for the file on standard output"
    )
    key.add_argument("name", help="whose key it is; the log names it")
    key.add_argument("--stdin", action="store_true", help="read the key from standard input instead of making one")
    if arguments is None and {"-h", "--help"} & set(sys.argv[1:]):
        parser.epilog = "settings, as environment variables:\n\n" + _settings_help()
    return parser.parse_args(arguments)


def _settings_help() -> str:
    lines = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f" (default {field.default!s})" if field.default != "" else ""
        text = f"{' '.join((field.description or '').split())}{default}"
        lines += [f"  DIGITS_{name.upper()}", textwrap.indent(textwrap.fill(text, 94), " " * 6)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
