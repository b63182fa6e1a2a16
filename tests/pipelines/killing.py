"""Work that is killed -9 just before its n-th file operation."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "subprocess.Popen", "sqlite3.connect"}

# The tests' own process cannot be forked safely: other tests leave threads in it (gRPC's, TensorFlow's), and the child
# of such a process may find their locks held, or crash. The fork server has imported what is needed and nothing else.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pipelines.publish", "pipelines.promotion", "pipelines.prune"])


def die_at(operation: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that is killed just before its n-th file operation. False: it finished.

    The work is pickled on its way there: `functools.partial(publish, settings)`, not a lambda.
    """
    child = _processes.Process(target=_count_and_die, args=(operation, work, Path.cwd(), dict(os.environ)))
    child.start()
    child.join()
    status = child.exitcode
    child.close()
    assert status in (0, -signal.SIGKILL), f"the work failed: {status}"
    return status != 0


def _count_and_die(operation: int, work: Callable[[], object], folder: Path, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
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
