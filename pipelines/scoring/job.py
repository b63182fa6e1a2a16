"""A scoring job on the disk: its manifest, its part files, and the one file they become.

Beside the output lies ``<output>.job/`` until it is done. Each shard's part is written whole by a rename, so whoever
scores a shard twice, a killed run's successor or a second worker, replaces it by the same.
"""

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from digits.errors import DigitsError
from pipelines.arrays import BadInput
from pipelines.disk import disk_errors, fsync_folder, write_json_atomically
from pipelines.scoring.inputs import Arrays, Pictures, Rows, identity_of, list_pictures, open_images
from pipelines.scoring.scorers import BATCH, Spec, open_scorer

ARRAY_SHARD: Final = 8192
PICTURE_SHARD: Final = 512
"""Rows of a shard: a second's work or a few, so that a kill loses little and a scheduler's overhead does not show."""

FORMATS: Final = (".csv", ".jsonl")
MAX_INK_SHARE: Final = 0.5

_COLUMNS: Final = ("row", "name", "digit", "confidence", "model_version", "error")


class JobError(DigitsError):
    """The job cannot begin, or its files do not belong together."""

    code = "scoring_job"


@dataclass(frozen=True)
class Tally:
    """Rows, those with an error among them, and how many images were read as each class."""

    rows: int
    failed: int
    by_digit: tuple[int, ...]
    mean_confidence: float
    versions: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """What a shard holds, before anyone is asked: rows, unusable rows, and the usable images' mean of pixel / 255."""

    rows: int
    unusable: int
    ink_share: float


@dataclass(frozen=True)
class Job:
    """A job under way, as its manifest says."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """The job that lies in a folder. Raises ``JobError`` when there is none."""
        try:
            return cls(folder, json.loads((folder / "manifest.json").read_bytes()))
        except (OSError, ValueError) as err:
            raise JobError(f"expected a scoring job in {folder}: {err}") from err

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return int(self.manifest["rows"])

    @property
    def is_of_pictures(self) -> bool:
        """Whether the input is a folder of pictures."""
        return bool(self.manifest["pictures"])

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(-(-self.rows // self.manifest["shard_rows"]))

    def missing(self) -> list[int]:
        """The shards that have no part yet."""
        return [shard for shard in self.shards if not self.part(shard).is_file()]

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the one after its last."""
        size = int(self.manifest["shard_rows"])
        return shard * size, min((shard + 1) * size, self.rows)

    def part(self, shard: int) -> Path:
        """Where a shard's rows are, once it is scored."""
        return self.folder / "parts" / f"{shard:06d}.csv"

    def read(self, shard: int) -> Rows:
        """A shard's images."""
        start, stop = self.bounds(shard)
        if self.is_of_pictures:
            names = json.loads((self.folder / "names" / f"{shard:06d}.json").read_bytes())
            return Pictures(Path(self.manifest["input"]["path"]), tuple(names)).read()
        array = self.manifest["array"]
        return Arrays(Path(array["path"]), array["offset"], self.rows).read(start, stop)


def plan(
    source: Path,
    output: Path,
    spec: Spec,
    *,
    probabilities: bool = False,
    overwrite: bool = False,
    shard_rows: int | None = None,
    on_unpacked: Callable[[int, int], None] = lambda _done, _total: None,
) -> Job:
    """The job for this input and output: a new one, or the unfinished one that lies there.

    Args:
        source: a folder of pictures, or an IDX, IDX .gz, .npy or .npz file of images.
        output: the file to make, .csv or .jsonl.
        spec: who answers.
        probabilities: also a column for each class.
        overwrite: replace a finished output, and throw away an unfinished job with other settings.
        shard_rows: rows of a shard, for tests and unusual inputs.
        on_unpacked: told how many bytes of a packed file are unpacked, of how many.

    Raises:
        BadInput: the input cannot be read.
        JobError: the output is there already, or an unfinished job with other settings is.
        DiskError: there is no room.
    """
    if output.suffix not in FORMATS:
        raise JobError(f"{output} ends in {output.suffix or 'nothing'}; expected one of {', '.join(FORMATS)}")
    if not source.exists():
        raise BadInput(f"{source} is not there; expected a folder of pictures or an array file")
    folder = output.with_name(output.name + ".job")
    wanted = {"input": identity_of(source), "scorer": asdict(spec), "probabilities": probabilities}
    if overwrite and folder.exists() and not _same(folder, wanted, shard_rows):
        shutil.rmtree(folder)
    if (folder / "manifest.json").is_file():
        if not _same(folder, wanted, shard_rows):
            raise JobError(
                f"{folder} holds an unfinished job with another input or other settings. Finish that one, or say "
                "--overwrite to throw it away"
            )
        return Job.load(folder)
    if output.exists() and not overwrite:
        raise JobError(f"{output} is there already; name another file, or say --overwrite")
    with disk_errors("the scoring job", folder.parent, "nothing was scored"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "parts").mkdir(exist_ok=True)
        manifest = {**wanted, **_layout(source, folder, shard_rows, on_unpacked)}
        write_json_atomically(folder / "manifest.json", manifest)
    return Job(folder, manifest)


def _same(folder: Path, wanted: dict[str, Any], shard_rows: int | None) -> bool:
    """Whether the unfinished job is this one; the gateway may have moved meanwhile."""
    try:
        found = Job.load(folder).manifest
    except JobError:
        return False
    if shard_rows not in (None, found["shard_rows"]) or found["scorer"]["through"] != wanted["scorer"]["through"]:
        return False
    is_model = wanted["scorer"]["through"] == "model"
    return all(found[key] == wanted[key] for key in wanted if key != "scorer" or is_model)


def _layout(
    source: Path, folder: Path, shard_rows: int | None, on_unpacked: Callable[[int, int], None]
) -> dict[str, Any]:
    """How many rows there are, and where to find those of a shard."""
    if not source.is_dir():
        array = open_images(source, folder / "images.u8", on_unpacked)
        where = {"path": str(array.path.absolute()), "offset": array.offset}
        return {"rows": array.count, "shard_rows": shard_rows or ARRAY_SHARD, "pictures": False, "array": where}
    names, size = list_pictures(source), shard_rows or PICTURE_SHARD
    (folder / "names").mkdir(exist_ok=True)
    for shard, start in enumerate(range(0, len(names), size)):
        (folder / "names" / f"{shard:06d}.json").write_text(json.dumps(names[start : start + size]), encoding="utf-8")
    return {"rows": len(names), "shard_rows": size, "pictures": True}


def profile_shard(folder: Path, shard: int) -> Profile:
    """Look at a shard of arrays before anything is scored."""
    rows = Job.load(folder).read(shard)
    good = np.array([error is None for error in rows.errors], bool)
    ink_share = float(rows.images[good].mean() / 255) if good.any() else 0.0
    return Profile(len(good), int((~good).sum()), ink_share)


def require_plausible(profiles: list[Profile]) -> None:
    """Stop before the first answer when the images as a whole cannot be ink 255 on paper 0.

    Raises:
        BadInput: no row is usable, or most of the pixels are ink.
    """
    usable = sum(one.rows - one.unusable for one in profiles)
    if profiles and not usable:
        raise BadInput(f"none of the {sum(one.rows for one in profiles):,} images has anything drawn on it")
    ink_share = sum(one.ink_share * (one.rows - one.unusable) for one in profiles) / max(usable, 1)
    if ink_share > MAX_INK_SHARE:
        raise BadInput(
            f"images are ink 255 on paper 0, but {ink_share:.0%} of these pixels are ink: they look inverted. Score "
            "255 - images"
        )


def score_shard(folder: Path, shard: int) -> int:
    """Score one shard and write its part; the number of rows. Done again, it makes the same part again."""
    job = Job.load(folder)
    rows = job.read(shard)
    part = job.part(shard)
    own = part.with_name(f".{part.name}.{os.getpid()}.part")
    try:
        with own.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows(_answered(job, rows, job.bounds(shard)[0]))
            stream.flush()
            os.fsync(stream.fileno())
        own.replace(part)
    finally:
        own.unlink(missing_ok=True)
    return len(rows.names)


def _answered(job: Job, rows: Rows, first: int) -> Iterator[list[Any]]:
    """One line for each row, in the rows' order."""
    scorer = open_scorer(Spec(**job.manifest["scorer"]))
    with_all = job.manifest["probabilities"]
    good = [row for row, error in enumerate(rows.errors) if error is None]
    answers: dict[int, tuple[np.ndarray, str]] = {}
    for start in range(0, len(good), BATCH):
        chosen = good[start : start + BATCH]
        probabilities, version = scorer.score(rows.images[chosen])
        answers.update(zip(chosen, ((one, version) for one in probabilities), strict=True))
    for row, (name, error) in enumerate(zip(rows.names, rows.errors, strict=True)):
        if error is not None:
            yield [first + row, name, "", "", "", error]
            continue
        one, version = answers[row]
        digit = int(one.argmax())
        more = [f"{p:.6g}" for p in one.tolist()] if with_all else []
        yield [first + row, name, digit, f"{one[digit]:.6f}", version, "", *more]


def finish(job: Job, output: Path, class_count: int) -> Tally:
    """Join the parts into the output, every row once and in order, and remove the job.

    Args:
        job: all of whose shards are scored.
        output: the file to make.
        class_count: how many classes the model tells apart.

    Raises:
        JobError: a part is missing or holds other rows than it should. The output is as it was.
        DiskError: there is no room; the parts stay.
    """
    of_classes = [f"p{label}" for label in range(class_count)] if job.manifest["probabilities"] else []
    columns = [*_COLUMNS, *of_classes]
    part = output.with_name(f".{output.name}.part")
    counts: Counter[int] = Counter()
    failed, confidence = 0, 0.0
    versions: dict[str, None] = {}
    aftermath = f"what was scored is kept in {job.folder}"
    with disk_errors("the scores", output.parent, aftermath), part.open("w", encoding="utf-8", newline="") as stream:
        write = _writer(stream, output.suffix, columns)
        for line in _lines(job, len(columns)):
            write(line)
            if line[5]:
                failed += 1
            else:
                counts[int(line[2])] += 1
                confidence += float(line[3])
                versions[line[4]] = None
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(output)
    fsync_folder(output.parent)
    shutil.rmtree(job.folder)
    scored = job.rows - failed
    return Tally(
        job.rows,
        failed,
        tuple(counts[label] for label in range(class_count)),
        confidence / max(scored, 1),
        tuple(versions),
    )


def _lines(job: Job, columns: int) -> Iterator[list[str]]:
    """All parts' lines, each checked to be the row that is due."""
    due = 0
    for shard in job.shards:
        try:
            with job.part(shard).open(encoding="utf-8", newline="") as stream:
                for line in csv.reader(stream):
                    if len(line) == len(_COLUMNS) and line[5]:  # an error, which has no probabilities
                        line += [""] * (columns - len(line))
                    if len(line) != columns or line[0] != str(due):
                        raise JobError(
                            f"{job.part(shard)} holds {line[:1]} where row {due} is due: remove it and run this again"
                        )
                    yield line
                    due += 1
        except FileNotFoundError as err:
            raise JobError(f"{job.part(shard)} is missing: run this again") from err
        if due != job.bounds(shard)[1]:
            raise JobError(f"{job.part(shard)} is cut short at row {due}: remove it and run this again")


def _writer(stream: TextIO, suffix: str, columns: list[str]) -> Callable[[list[str]], object]:
    if suffix == ".csv":
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        return writer.writerow
    return lambda line: stream.write(json.dumps(_object(columns, line), ensure_ascii=False) + "\n")


def _object(columns: list[str], line: list[str]) -> dict[str, Any]:
    kinds: dict[str, Callable[[str], Any]] = {"row": int, "digit": int, "confidence": float}
    kinds |= dict.fromkeys(columns[len(_COLUMNS) :], float)
    return {name: kinds.get(name, str)(value) for name, value in zip(columns, line, strict=True) if value != ""}
