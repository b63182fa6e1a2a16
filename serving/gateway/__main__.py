"""``python -m serving.gateway``: REST and gRPC in one process. Settings come from ``DIGITS_*``; see settings.py."""

import asyncio
import gc
import os
import signal
import sys
import warnings

# Pictures are small: threads of numpy's algebra would cost memory and start and bring nothing.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import uvloop

from digits.errors import DigitsError
from serving.gateway.logs import Logs, take_over_library_logs
from serving.gateway.running import Running
from serving.gateway.settings import BadSettings, Settings, read_settings


def main() -> int:
    """Serve until SIGTERM or SIGINT, then drain. Returns the exit status: 0, 1 (cannot listen), 2 (bad setting)."""
    try:
        settings = read_settings()
    except BadSettings as err:
        print(f"gateway: {err}", file=sys.stderr)
        return 2
    logs = Logs(settings.log_level, settings.log_format)
    take_over_library_logs(logs.log)
    # A damaged picture makes Pillow warn on stderr; whoever sent it is told in the answer.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        uvloop.run(_serve(settings, logs))
    except DigitsError as err:
        print(f"gateway: {err}", file=sys.stderr)
        return 1
    finally:
        logs.flush()
    return 0


async def _serve(settings: Settings, logs: Logs) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    running = await Running.start(settings, logs)
    # What was made so far stays for good: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, running.rest_ended}, return_when=asyncio.FIRST_COMPLETED)
    await running.drain()


if __name__ == "__main__":
    sys.exit(main())
