"""Several files replaced as one: after a crash at any moment, all of them or none, once ``complete`` has run.

New contents are written into a folder of their own. The journal, written by an atomic rename, is the moment of
decision: without it the folder is thrown away, with it the renames are carried through, however often that takes.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pipelines.disk import fsync_folder, fsync_tree, write_json_atomically

_JOURNAL: Final = "journal.json"


class Transaction:
    """A set of files on their way to their places.

    Args:
        folder: where new contents are kept meanwhile.
        root: what the places are relative to.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self._root = root

    def begin(self) -> None:
        """An empty folder to write new contents into."""
        self.close()
        self.folder.mkdir(parents=True)

    def decide(self, places: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """From here on it will be carried through.

        Args:
            places: name in the folder -> path below the root that it goes to.
            facts: kept for whoever completes it.
        """
        fsync_tree(self.folder)
        write_json_atomically(self.folder / _JOURNAL, {"places": dict(places), "facts": dict(facts)})

    def decided(self) -> dict[str, Any] | None:
        """The facts of a transaction that is to be carried through; None when there is none."""
        try:
            journal = json.loads((self.folder / _JOURNAL).read_bytes())
            return dict(journal["facts"])
        except FileNotFoundError:
            return None

    def move(self) -> None:
        """Move what has not been moved yet."""
        journal = json.loads((self.folder / _JOURNAL).read_bytes())
        for name, place in journal["places"].items():
            if (self.folder / name).exists():
                _move(self.folder / name, self._root / place)

    def close(self) -> None:
        """Forget it: done, or never decided."""
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(target)
    except OSError as err:
        if err.errno != errno.EXDEV:
            raise
        # Another file system, such as a container's volume. Cut off in here, it is simply done again.
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
        source.unlink()
    fsync_folder(target.parent)
