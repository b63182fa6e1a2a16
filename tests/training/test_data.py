"""IDX files are read exactly or refused with the reason; the split is stratified and repeatable."""

import struct
from pathlib import Path

import numpy as np
import pytest

from digits.contract import DIGITS
from tests.training.conftest import write_idx, write_raw
from training.data import BadRawData, read_idx, read_raw_split, split_stratified
from training.workspace import BadArtifact, Split, load_split, save_split


def test_idx_comes_back_as_it_was_written(tmp_path: Path) -> None:
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "x", array)
    assert np.array_equal(read_idx(tmp_path / "x", dimensions=3), array)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\0\0\x08", "fewer than its header"),
        (b"\x1f\x8b\x08\0" + bytes(20), "0x1f8b0800"),
        (struct.pack(">2I", 0x0803, 1) + bytes(20), "0x00000803"),
        (struct.pack(">2I", 0x0801, 9) + bytes(8), "cut short"),
        (struct.pack(">2I", 0x0801, 9) + bytes(10), "too long"),
        (struct.pack(">2I", 0x0801, 2**32 - 1) + bytes(10), "4294967295"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_the_mend(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(BadRawData) as caught:
        read_idx(path, dimensions=1)
    assert said in str(caught.value)
    assert path.name in str(caught.value)
    assert "python -m pipelines ingest" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRawData, match="train-images-idx3-ubyte is missing"):
        read_raw_split(tmp_path, "train")


def test_images_and_labels_must_be_as_many(tmp_path: Path) -> None:
    some = Split(np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.int64))
    write_raw(tmp_path, Split(some.images, some.labels[:4]), some)
    with pytest.raises(BadRawData, match="5 images but 4 labels"):
        read_raw_split(tmp_path, "train")


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    odd = Split(np.zeros((5, 32, 28), np.uint8), np.zeros(5, np.int64))
    write_raw(tmp_path, odd, odd)
    with pytest.raises(BadRawData, match="32 x 28"):
        read_raw_split(tmp_path, "test")


def test_the_real_files_have_their_known_shapes(real: dict[str, Split]) -> None:
    assert real["train"].images.shape == (60000, 28, 28)
    assert real["test"].images.shape == (10000, 28, 28)
    assert real["train"].labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_the_split_holds_every_index_once_and_every_digit_in_its_share(real: dict[str, Split]) -> None:
    labels = real["train"].labels
    kept, held_out = split_stratified(labels, 5000, DIGITS, seed=7)
    assert len(held_out) == 5000
    assert np.array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(60000))
    exact = np.bincount(labels) * 5000 / 60000
    assert np.abs(np.bincount(labels[held_out]) - exact).max() < 1


def test_the_split_repeats_for_a_seed_and_changes_with_it(real: dict[str, Split]) -> None:
    labels = real["train"].labels
    first, again, other = (split_stratified(labels, 5000, DIGITS, seed)[1] for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("held_out", [100, 200])
def test_holding_out_everything_is_refused(held_out: int) -> None:
    with pytest.raises(BadRawData, match=r"prepare\.validation_images"):
        split_stratified(np.arange(100) % 10, held_out, DIGITS, seed=0)


def test_a_class_too_rare_to_split_is_named() -> None:
    labels = np.array([0] * 50 + [1] * 49 + [2])
    with pytest.raises(BadRawData, match="class 2 has 1"):
        split_stratified(labels, 50, DIGITS, seed=0)


def test_a_saved_split_is_the_same_bytes_each_time(tmp_path: Path, real: dict[str, Split]) -> None:
    """So that DVC does not train anew because the same split was written again."""
    split = Split(real["test"].images[:10], real["test"].labels[:10])
    for name in ("a.npz", "b.npz"):
        save_split(tmp_path / name, split)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert load_split(tmp_path / "a.npz").sha256() == split.sha256()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"words"])
def test_a_damaged_split_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(BadArtifact, match=r"x\.npz"):
        load_split(tmp_path / "x.npz")
