"""Folders of pictures are read as the gateway reads pictures, or refused with what is wrong and where."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from digits.image import read_digit
from training.folders import read_folder
from training.workspace import BadRawData, Split, load_split, save_split

CLASSES = ("ring", "bar")


def draw(kind: str, side: int, number: int) -> Image.Image:
    """A ring or a bar on paper, of several widths."""
    sheet = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(sheet)
    box = (side * 0.25, side * 0.2, side * 0.75, side * 0.8)
    if kind == "ring":
        pen.ellipse(box, outline=0, width=3 + number)
    else:
        pen.line((side * 0.4, side * 0.2, side * 0.6, side * 0.8), fill=0, width=3 + number)
    return sheet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of each class: PNG, JPEG, and one inverted, one of them in a folder below."""
    for kind in CLASSES:
        of = tmp_path / "train" / kind
        (of / "more").mkdir(parents=True)
        draw(kind, 60, 1).save(of / "a.png")
        draw(kind, 90, 4).convert("RGB").save(of / "b.jpg")
        Image.fromarray(255 - np.asarray(draw(kind, 28, 0))).save(of / "more" / "c.png")
        (of / ".hidden").write_text("left out")
    return tmp_path / "train"


def test_pictures_are_read_as_the_gateway_reads_them(folder: Path) -> None:
    """Class by class in the order of params.yaml, whatever the folders' own; a picture's label is its class's place."""
    told: list[tuple[int, int]] = []
    split = read_folder(folder, CLASSES, lambda done, total: told.append((done, total)))
    names = [f"{kind}/{name}" for kind in CLASSES for name in ("a.png", "b.jpg", "more/c.png")]
    assert np.array_equal(split.images, [read_digit((folder / name).read_bytes()) for name in names])
    assert split.images.dtype == np.uint8
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert read_folder(folder, ("bar", "ring")).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert told == [(6, 6)]


def remove(folder: Path) -> None:
    (folder / "bar").rename(folder.parent / "away")


def add(folder: Path) -> None:
    (folder / "star").mkdir()


def empty(folder: Path) -> None:
    for path in sorted((folder / "bar").rglob("*")):
        if path.is_file():
            path.unlink()


def damage(folder: Path) -> None:
    (folder / "ring" / "a.png").write_bytes((folder / "ring" / "a.png").read_bytes()[:60])
    stream = io.BytesIO()
    Image.new("L", (28, 28), 255).save(stream, "PNG")
    (folder / "bar" / "blank.png").write_bytes(stream.getvalue())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove, r"train: expected a folder for each name of data\.classes .*; missing: 'bar'$"),
        (add, r"train: expected a folder .* nothing else; unknown: 'star'$"),
        (empty, r"train: no picture in: 'bar'$"),
        (
            damage,
            r"ring/a\.png: this PNG file is damaged .* \(and 1 more\)\. Replace or remove it, then `dvc add",
        ),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_one_line(
    folder: Path, change: Callable[[Path], None], said: str
) -> None:
    change(folder)
    with pytest.raises(BadRawData, match=said):
        read_folder(folder, CLASSES)


def test_no_folder_at_all_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(BadRawData, match=r"test is missing: with data\.format folder it holds a folder of pictures"):
        read_folder(tmp_path / "test", CLASSES)


def test_more_classes_than_a_byte_counts_are_kept(tmp_path: Path) -> None:
    """And a set of up to 256 is the same bytes as ever."""
    labels = np.array([3, 299, 0])
    split = Split(np.zeros((3, 28, 28), np.uint8), labels)
    save_split(tmp_path / "x.npz", split)
    assert load_split(tmp_path / "x.npz").labels.tolist() == labels.tolist()
    assert split.sha256() != Split(split.images, labels % 256).sha256()
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["labels"].dtype == np.uint16
