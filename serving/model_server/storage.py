"""What lies in a model's base path: version folders, complete ones only."""

from pathlib import Path

MAX_VERSION = 2**63 - 1
SAVED_MODEL_FILES = ("saved_model.pb", "saved_model.pbtxt")
LITE_FILE = "model.tflite"


def versions(base_path: Path) -> dict[int, Path]:
    """Complete versions under ``base_path``: folders named by a decimal integer that hold a graph.

    A version that is still being written has another name, and gets its number by a rename.

    Raises:
        OSError: the folder is missing or cannot be read.
    """
    found: dict[int, Path] = {}
    for entry in sorted(base_path.iterdir()):
        name = entry.name
        if not (name.isascii() and name.isdigit()) or int(name) > MAX_VERSION:
            continue
        # Of 7 and 007 the plain spelling wins: it sorts later.
        if has_saved_model(entry) or has_lite_model(entry):
            found[int(name)] = entry
    return found


def has_saved_model(folder: Path) -> bool:
    """Whether the version has a SavedModel."""
    return any((folder / graph).is_file() for graph in SAVED_MODEL_FILES)


def has_lite_model(folder: Path) -> bool:
    """Whether the version has a TF Lite model."""
    return (folder / LITE_FILE).is_file()


def fingerprint(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files of a version: a change is a reason to try a failed one again."""
    try:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return tuple(sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))
    except OSError:
        return ()
