"""DVC, imported and waiting: ``python -P waiting_dvc.py`` reads a stage's name from stdin and brings it up to date.

Nothing happens when stdin ends without a name. The exit code is that of ``dvc repro``.
"""

import os
import sys


def main() -> int:
    """Import what the command needs, wait, run it."""
    import dvc.cli.parser
    import dvc.commands.repro
    import dvc.repo.reproduce  # so that it is there when its turn comes

    name = sys.stdin.readline().strip()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())  # as for any command that a pipeline runs
    return int(dvc.cli.main(["repro", "--single-item", name])) if name else 0


if __name__ == "__main__":
    sys.exit(main())
