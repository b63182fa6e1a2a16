"""Work that is killed -9 just before its n-th file operation."""

import os
import signal
import sys
from collections.abc import Callable

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "subprocess.Popen", "sqlite3.connect"}


def die_at(operation: int, work: Callable[[], object]) -> bool:
    """Do the work in a child process that is killed just before its n-th file operation. False: it finished."""
    child = os.fork()
    if child == 0:
        try:
            seen = 0

            def count(event: str, arguments: tuple) -> None:
                nonlocal seen
                writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if writes or event in _CHANGES:
                    seen += 1
                    if seen == operation:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001  # whatever it is, the child must end here
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"the work failed: {status}"
    return status != 0
