"""A request to stop is heard wherever the main thread is when it comes."""

import subprocess
import sys

from tests.conftest import HANG_S

# The signal arrives while an object is being destroyed, where Python drops what a handler raises.
PROGRAM = """
import os, signal, sys, time
from pipelines.stopping import never_lost

class Stop(BaseException): pass
class Unlucky:
    def __del__(self): os.kill(os.getpid(), signal.{number}); time.sleep(0.01)
class Broken:
    def __del__(self): raise ValueError("of its own")
def stop(*_): raise Stop
{handle}
before = sys.unraisablehook
try:
    with never_lost({kind}):
        Broken()
        Unlucky()
        print("went on", flush=True)
        time.sleep(60)
        print("never heard")
except {kind}:
    print("heard")
print(sys.unraisablehook is before)
"""


def outcome(number: str, kind: str, handle: str = "") -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(number=number, kind=kind, handle=handle)
    return subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=HANG_S, check=False)


def test_a_signal_that_came_in_a_destructor_is_sent_again() -> None:
    """SIGTERM with a handler of ours, Ctrl-C with Python's; other dropped errors are told as ever."""
    for done in (
        outcome("SIGTERM", "Stop", "signal.signal(signal.SIGTERM, stop)"),
        outcome("SIGINT", "KeyboardInterrupt"),
    ):
        assert done.stdout.splitlines() == ["went on", "heard", "True"], done.stderr
        assert "ValueError: of its own" in done.stderr
        assert "Stop" not in done.stderr
        assert "KeyboardInterrupt" not in done.stderr
