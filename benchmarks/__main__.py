"""`python -m benchmarks [NAME …]`: without a name, gateway and limits."""

import argparse
import signal
import sys

from benchmarks import gateway, limits, release, training, validation
from benchmarks.peers import run as peers

BENCHMARKS = {
    "gateway": gateway.run,
    "limits": limits.run,
    "peers": peers.run,
    "release": release.run,
    "training": training.run,
    "validation": validation.run,
}
"""``peers`` needs environments that only `make bench-peers` makes."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: gateway and limits"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="load per measurement, in seconds (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats; the median is shown (default 5)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that what was started is ended too
    for name in arguments.names or ("gateway", "limits"):
        BENCHMARKS[name](seconds=arguments.seconds, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
