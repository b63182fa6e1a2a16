"""Cutting a number into candidates, and choosing among them: with a judge who knows in the model's place."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from digits.image import normalise
from digits.number import MAX_CANDIDATES, choose, propose_in

HEIGHT = 60


def digit(rng: np.random.Generator) -> np.ndarray:
    """A ring or a bar, a little uneven: float32 (h, w)."""
    h = int(HEIGHT * rng.uniform(0.9, 1.1))
    if rng.random() < 0.3:
        return np.ones((h, 8), np.float32)
    w = int(h * rng.uniform(0.6, 0.8))
    y, x = np.mgrid[:h, :w]
    radius = np.hypot((x - w / 2 + 0.5) / (w / 2), (y - h / 2 + 0.5) / (h / 2))
    return ((radius <= 1) & (radius >= 0.72)).astype(np.float32)


def number(parts: list[np.ndarray], gap: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Parts side by side → ink float32 (H, W), and where each begins and ends."""
    ink = np.zeros((2 * HEIGHT, 40 + sum(part.shape[1] + gap for part in parts)), np.float32)
    x, spans = 20, []
    for part in parts:
        top = HEIGHT - part.shape[0] // 2
        window = ink[top : top + part.shape[0], x : x + part.shape[1]]
        np.maximum(window, part, out=window)
        spans.append((x, x + part.shape[1]))
        x += part.shape[1] + gap
    return ink, spans


def judge(parts: list[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Sure of what looks like one of the parts, unsure of the rest: uint8 (K, 28, 28) → (K, 10)."""
    known = np.stack([normalise(np.pad(part, 2)) for part in parts]).astype(np.float32)

    def probabilities(images_u8: np.ndarray) -> np.ndarray:
        off = np.abs(images_u8[:, None].astype(np.float32) - known).mean(axis=(2, 3)).min(axis=1)
        rows = np.full((len(images_u8), 10), 0.0, np.float32)
        rows[:, 0] = np.where(off < 14, 0.99, 0.01)
        return rows

    return probabilities


def test_separate_digits_are_told_apart() -> None:
    """The boxes that are chosen are the digits' own, to a few pixels."""
    rng = np.random.default_rng(1)
    for _ in range(15):
        parts = [digit(rng) for _ in range(int(rng.integers(1, 7)))]
        ink, spans = number(parts, 4)
        proposal = propose_in(ink)
        boxes = proposal.boxes[choose(proposal, judge(parts)(proposal.images_u8))]
        assert len(boxes) == len(parts)
        np.testing.assert_allclose(boxes[:, 0], [left for left, _ in spans], atol=2)
        np.testing.assert_allclose(boxes[:, 0] + boxes[:, 2], [right for _, right in spans], atol=2)


def test_the_right_cuts_are_among_the_candidates_of_joined_digits() -> None:
    """Digits joined by a stroke of the pen are one piece of ink: a candidate begins and ends where each digit does."""
    rng = np.random.default_rng(2)
    for _ in range(15):
        ink, spans = number([digit(rng) for _ in range(int(rng.integers(2, 7)))], 4)
        for _, right in spans[:-1]:
            ink[HEIGHT - 2 : HEIGHT + 2, right - 2 : right + 6] = 1
        boxes = propose_in(ink).boxes
        for span in spans:
            ends = np.stack((boxes[:, 0], boxes[:, 0] + boxes[:, 2]), axis=1)
            assert (np.abs(ends - span).max(axis=1) <= 7).any()


def test_every_path_takes_all_pieces_once() -> None:
    """Whatever the model says: random answers still give a number that covers the ink, left to right."""
    rng = np.random.default_rng(5)
    ink, _ = number([digit(rng) for _ in range(5)], -2)
    proposal = propose_in(ink)
    assert 5 <= len(proposal.images_u8) <= MAX_CANDIDATES
    assert proposal.images_u8.shape[1:] == (28, 28)
    for _ in range(20):
        chosen = choose(proposal, rng.dirichlet(np.ones(10), len(proposal.images_u8)).astype(np.float32))
        assert proposal.first[chosen[0]] == 0
        assert proposal.end[chosen[-1]] == proposal.pieces
        assert all(proposal.end[a] == proposal.first[b] for a, b in pairwise(chosen))
