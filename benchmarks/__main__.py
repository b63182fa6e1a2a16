"""`python -m benchmarks [NAME …]`: without a name, all of them."""

import argparse

from benchmarks import gateway

BENCHMARKS = {"gateway": gateway.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--seconds", type=float, default=4.0, help="load per measurement, in seconds (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats; the median is shown (default 5)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    for name in arguments.names or BENCHMARKS:
        BENCHMARKS[name](seconds=arguments.seconds, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
