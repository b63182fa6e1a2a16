"""Where the stages read and write, and how they write: whole files or none."""

import hashlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from digits.errors import DigitsError


class BadArtifact(DigitsError):
    """A file that an earlier stage should have left is missing, damaged or altered."""

    code = "bad_artifact"


class BadRawData(DigitsError):
    """A raw file is missing or is not what it should be."""

    code = "bad_raw_data"


@dataclass(frozen=True)
class Workspace:
    """A checkout: raw data in ``data/``, what is made from it in ``artifacts/STAGE/``."""

    root: Path

    @property
    def params_file(self) -> Path:
        """What changes the model."""
        return self.root / "params.yaml"

    @property
    def raw_dir(self) -> Path:
        """The raw files, tracked by data.dvc."""
        return self.root / "data"

    @property
    def champion_file(self) -> Path:
        """The record of the version now published; absent before the first release."""
        return self.root / "models" / "champion" / "champion.json"

    def stage_dir(self, stage: str) -> Path:
        """The folder of a stage's outputs, made if absent."""
        folder = self.root / "artifacts" / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def artifact(self, stage: str, name: str) -> Path:
        """An output of an earlier stage.

        Raises:
            BadArtifact: it is not there.
        """
        path = self.root / "artifacts" / stage / name
        if not path.exists():
            raise BadArtifact(f"{path} is missing: run `dvc repro`, or `python -m training {stage}` first")
        return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to beside ``path``; it takes its name when the block ends well, and goes away otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write sorted, indented JSON; numbers that JSON does not know (NaN) are refused."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BadArtifact: the file cannot be read, is not JSON, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise BadArtifact(f"{path} cannot be read as JSON: {err}") from err
    if not isinstance(content, dict):
        raise BadArtifact(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


@dataclass(frozen=True)
class Split:
    """Images and their classes."""

    images: np.ndarray
    """uint8 (N, 28, 28), ink 255 on paper 0."""
    labels: np.ndarray
    """int64 (N,), 0 to C - 1 for C classes."""

    def sha256(self) -> str:
        """One hash over images and labels: the identity of a test set."""
        digest = hashlib.sha256()
        digest.update(np.ascontiguousarray(self.images, np.uint8).tobytes())
        digest.update(np.ascontiguousarray(_packed(self.labels)).tobytes())
        return digest.hexdigest()


def save_split(path: Path, split: Split) -> None:
    """Write a split as an uncompressed npz (DVC hashes it faster than zlib packs it)."""
    with whole_file(path) as part:
        np.savez(part, images=split.images, labels=_packed(split.labels))


def _packed(labels: np.ndarray) -> np.ndarray:
    """Labels as bytes, or as two bytes each where there are more than 256 classes."""
    return labels.astype(np.uint16 if len(labels) and labels.max() > 255 else np.uint8)


def load_split(path: Path) -> Split:
    """Read a split written by ``save_split``.

    Raises:
        BadArtifact: the file is no such npz.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Split(arrays["images"], arrays["labels"].astype(np.int64))
    except (OSError, ValueError, KeyError, EOFError) as err:
        raise BadArtifact(f"{path} cannot be read as a split of images: {err}. Run `dvc repro prepare`.") from err
    except Exception as err:  # zipfile.BadZipFile and zlib.error share no base
        raise BadArtifact(f"{path} is damaged: {err}. Run `dvc repro prepare`.") from err


def import_tensorflow_quietly(with_keras: bool = True) -> None:
    """Import TensorFlow without the lines it writes to the terminal while it loads; they are shown if it fails.

    Its C++ libraries write them before they read any setting, so the file descriptor itself is turned away meanwhile.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    if not with_keras:
        # TensorFlow then looks for the old Keras, which is not installed, goes without, and loads in half the time.
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
    with chatter_held_back():
        importlib.import_module("tensorflow")
        if with_keras:
            importlib.import_module("keras")


@contextmanager
def chatter_held_back() -> Iterator[None]:
    """Keep what C++ writes to the terminal off it; it is shown after all when the block fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 2)
        try:
            yield
        except BaseException:
            chatter.seek(0)
            os.write(kept, chatter.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
