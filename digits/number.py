"""A picture of a whole handwritten number → where its digits may be, and which of these readings holds together.

The way of LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998), section V: the ink is cut
into more pieces than there are digits, every run of neighbouring pieces is a candidate, the classifier is asked about
all of them, and the cheapest path through the pieces is the number. ``propose`` makes the candidates, ``choose`` finds
the path.

Cuts through joined digits are seams: the way from top to bottom that crosses the least ink.
"""

import io
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from digits.contract import IMAGE_HEIGHT, IMAGE_WIDTH
from digits.errors import BadImage
from digits.image import (
    F32,
    MAX_PIXELS,
    U8,
    Components,
    Mask,
    decode,
    find_components,
    ink_map,
    normalise,
)
from digits.image import _frames as frames
from digits.image import _pool_mean as pool_mean
from digits.image import _settle_polarity as settle_polarity
from digits.image import _sheet_in as sheet_in
from digits.image import _stroke_width as stroke_width
from digits.image import _widen as widen

MAX_CANDIDATES: Final = 512
"""Most candidates of one picture: a picture that needs more is no number."""

MAX_DIGITS: Final = 32

_WORK_HEIGHT: Final = 64  # pixels of a digit's height at which seams are looked for
_WIDEST: Final = 1.45  # a candidate's width in heights of the line
_SPACING: Final = 0.11  # of the line's height, between two cuts

# Costs, in natural logarithms of probability. Chosen on numbers composed of training digits.
_CUT: Final = 1.0  # a cut through ink, at all
_CUT_STROKE: Final = 0.7  # and for each stroke's width of ink that it crosses
_JOIN: Final = 4.0  # two separate full-sized pieces taken for one digit
_SMALL: Final = 5.0  # a digit much smaller than the others
_WIDE: Final = 3.0  # a digit wider than high
_CRUMB: Final = 20.0  # a scrap of ink
_LEAST_INK: Final = 0.02  # of the line's height, squared: a thin one has 0.05
_FLOOR: Final = 1e-4  # no reading is less probable than that


@dataclass(frozen=True)
class Proposal:
    """Candidates for the digits of a number, one an entry, and the pieces of ink that each takes."""

    images_u8: U8  # (K, 28, 28), canonical
    boxes: npt.NDArray[np.intp]  # (K, 4): x, y, width, height in the picture's own pixels, upright
    first: npt.NDArray[np.intp]  # (K,): its first piece
    end: npt.NDArray[np.intp]  # (K,): one past its last
    cost: F32  # (K,): of its geometry and its cuts
    pieces: int


def propose(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Proposal:
    """Where the digits of a number may be.

    Args:
        data: an encoded picture, as ``digits.image.read_digit`` takes it, of one number on one line.
        max_pixels: width times height allowed.

    Raises:
        BadImage: not a picture, nothing drawn on it, or far more than a number.
        TooLarge: more than ``max_pixels``.
    """
    grey = decode(data, max_pixels=max_pixels)
    if grey.shape == (IMAGE_HEIGHT, IMAGE_WIDTH):
        return _one(settle_polarity(grey))
    with Image.open(io.BytesIO(data)) as picture:
        scale = max(picture.size) / max(grey.shape)
    ink = ink_map(grey)
    sheet = sheet_in(ink, grey)
    if sheet is not None and sheet.shape == grey.shape:
        ink = ink_map(sheet)
    return propose_in(ink, scale)


def propose_in(ink: F32, scale: float = 1.0) -> Proposal:
    """The same for ink float32 (H, W), 1 on 0; ``scale``: the picture's pixels to one of these."""
    pieces = find_components(ink >= 0.45)
    keep, height = _line(pieces)
    ink, factor = _resampled(ink, height)
    pieces = find_components(ink >= 0.45)
    keep, height = _line(pieces)
    labels, cuts, atoms = _atoms(ink, pieces, keep, height)
    return _candidates(ink, labels, cuts, atoms, height, scale * factor)


def choose(proposal: Proposal, probabilities: F32) -> list[int]:
    """The candidates that make the most probable number, left to right.

    Args:
        proposal: From ``propose``.
        probabilities: float32 (K, 10) of its images.
    """
    confidence = np.clip(probabilities.max(axis=1), _FLOOR, 1)
    cost = proposal.cost - np.log(confidence)
    best = np.full(proposal.pieces + 1, np.inf)
    best[0] = 0
    through = np.full(proposal.pieces + 1, -1)
    for at in np.argsort(proposal.end, kind="stable"):
        total = best[proposal.first[at]] + cost[at]
        if total < best[proposal.end[at]]:
            best[proposal.end[at]] = total
            through[proposal.end[at]] = at
    path: list[int] = []
    end = proposal.pieces
    while end:
        path.append(int(through[end]))
        end = int(proposal.first[path[-1]])
    return path[::-1]


def _one(image_u8: U8) -> Proposal:
    rows, columns = np.flatnonzero(image_u8.any(axis=1)), np.flatnonzero(image_u8.any(axis=0))
    box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    zero = np.zeros(1, np.intp)
    return Proposal(image_u8[None], np.array([box], np.intp), zero, zero + 1, np.zeros(1, np.float32), 1)


def _line(pieces: Components) -> tuple[Mask, float]:
    """Which pieces are of the number's line (bool, one a piece), and the height of its digits in pixels."""
    wide, high = pieces.right - pieces.left, pieces.bottom - pieces.top
    extent = np.maximum(wide, high)
    keep = extent >= max(5, 0.02 * max(pieces.shape))
    if keep.sum() > 1:
        keep &= ~frames(pieces, wide, high)
    if not keep.any():
        raise BadImage("a number was expected, but the picture is blank but for specks: draw it larger")
    # The height that half of the ink's pieces, weighed by their size, reach: specks and commas have no say.
    order = np.argsort(np.where(keep, high, 0))
    weight = np.cumsum(np.where(keep, pieces.area, 0)[order])
    height = float(high[order[np.searchsorted(weight, weight[-1] / 2)]])
    middle = (pieces.top + pieces.bottom) / 2
    main = keep & (high >= 0.6 * height)
    line = float(np.median(middle[main])) if main.any() else float(np.median(middle[keep]))
    keep &= (np.abs(middle - line) <= 0.9 * height) & (extent >= 0.2 * height)
    keep &= (high >= 0.35 * height) | (wide >= 0.25 * height)
    if not keep.any():
        raise BadImage("a number was expected, but there are no digits of one size on one line")
    return keep, height


def _resampled(ink: F32, height: float) -> tuple[F32, float]:
    """At a scale where digits are about ``_WORK_HEIGHT`` high, and the pixels of before to one of now."""
    if height >= 2 * _WORK_HEIGHT:
        factor = int(height // _WORK_HEIGHT)
        return pool_mean(ink, factor), float(factor)
    if height < 0.7 * _WORK_HEIGHT:
        grow = _WORK_HEIGHT / height
        size = (max(1, round(ink.shape[1] * grow)), max(1, round(ink.shape[0] * grow)))
        if size[0] * size[1] > 4_000_000:
            raise BadImage("a number was expected, but what is drawn is tiny: send a picture of the number alone")
        larger = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BICUBIC))
        return np.clip(larger, 0, 1), 1 / grow
    return ink, 1.0


@dataclass(frozen=True)
class _Atom:
    """A piece of ink that is never divided. ``cut``: what the cut at its left costs, or None after a gap."""

    left: int
    right: int
    top: int
    bottom: int
    cut: float | None


def _atoms(
    ink: F32, pieces: Components, keep: Mask, height: float
) -> tuple[npt.NDArray[np.int32], list[float | None], list[_Atom]]:
    """Pixels' atoms (-1: none), the cost of the cut before each (None: a gap), and the atoms, left to right."""
    labels = np.full(ink.shape, -1, np.int32)
    parts: list[tuple[float, Mask, tuple[slice, slice], float | None]] = []
    for piece in np.flatnonzero(keep):
        window = (
            slice(max(0, pieces.top[piece] - 2), pieces.bottom[piece] + 2),
            slice(max(0, pieces.left[piece] - 2), pieces.right[piece] + 2),
        )
        mask = pieces.mask_of(np.arange(len(keep)) == piece)[window]
        soft = widen(widen(mask))
        seams, costs = _seams(np.where(mask, ink[window], np.float32(0)), height)
        # Which side of how many seams each pixel lies on.
        columns = np.arange(mask.shape[1])
        side = (columns[None, :, None] >= seams[:, None, :]).sum(axis=2)  # (h, w)
        cut: float | None = None
        for number, next_cut in enumerate([*costs, None]):
            part = soft & (side == number)
            solid = part & mask
            if solid.sum() >= 4:
                centre = window[1].start + float(np.flatnonzero(solid.any(axis=0)).mean())
                parts.append((centre, part, window, cut))
                cut = next_cut
            elif cut is not None and next_cut is not None:  # nothing between two seams: they are one
                cut = min(cut, next_cut)
    parts.sort(key=lambda part: part[0])
    atoms: list[_Atom] = []
    for number, (_, part, window, cut) in enumerate(parts):
        labels[window] = np.where(part & (labels[window] < 0), number, labels[window])
        rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        atoms.append(
            _Atom(
                window[1].start + int(columns[0]),
                window[1].start + int(columns[-1]) + 1,
                window[0].start + int(rows[0]),
                window[0].start + int(rows[-1]) + 1,
                cut,
            )
        )
    return labels, [atom.cut for atom in atoms], atoms


def _seams(ink: F32, height: float) -> tuple[npt.NDArray[np.intp], list[float]]:
    """Ways to cut one connected piece: column of each seam in each row, (h, S), left to right, and what each costs."""
    h, w = ink.shape
    none: tuple[npt.NDArray[np.intp], list[float]] = (np.zeros((h, 0), np.intp), [])
    if w < 0.5 * height:
        return none
    stroke = max(1.0, stroke_width(ink >= 0.45))
    band = max(2, round(0.22 * height))
    step = max(1, round(_SPACING * height))
    # Least ink on the way down to each pixel: a step aside costs a little, so that seams run straight through paper.
    found: dict[int, tuple[float, npt.NDArray[np.intp]]] = {}
    centres = range(round(0.12 * height), w - round(0.12 * height), max(1, step // 2))
    for centre in centres:
        low, high = max(0, centre - band), min(w, centre + band + 1)
        columns, cost = _seam(ink[:, low:high], centre - low)
        mean = round(float(columns.mean())) + low
        if mean not in found or cost < found[mean][0]:
            found[mean] = (cost, columns + low)
    chosen: list[tuple[int, float, npt.NDArray[np.intp]]] = []
    for mean, (cost, columns) in sorted(found.items(), key=lambda item: item[1][0]):
        # One that crosses no ink has all of it on one side.
        if 0.4 <= cost <= 4.5 * stroke and all(abs(mean - other) >= step for other, _, _ in chosen):
            chosen.append((mean, cost, columns))
    if not chosen:
        return none
    chosen.sort(key=lambda one: one[0])
    seams = np.sort(np.stack([columns for _, _, columns in chosen], axis=1), axis=1)  # never crossing
    return seams, [_CUT + _CUT_STROKE * cost / stroke for _, cost, _ in chosen]


def _seam(ink: F32, start: int) -> tuple[npt.NDArray[np.intp], float]:
    """The way from top to bottom through a band that crosses the least ink, and how much that is."""
    h, w = ink.shape
    away = np.abs(np.arange(w) - start).astype(np.float32) * np.float32(0.002)
    total = ink[0] + away
    came = np.zeros((h, w), np.int8)
    padded = np.full(w + 2, np.inf, np.float32)
    for row in range(1, h):
        padded[1:-1] = total
        ways = np.stack((padded[:-2] + 0.05, padded[1:-1], padded[2:] + 0.05))
        came[row] = ways.argmin(axis=0) - 1
        total = ways.min(axis=0) + ink[row] + away
    columns = np.empty(h, np.intp)
    columns[-1] = int(total.argmin())
    for row in range(h - 1, 0, -1):
        columns[row - 1] = columns[row] + came[row, columns[row]]
    return columns, float(ink[np.arange(h), columns].sum())


def _candidates(
    ink: F32,
    labels: npt.NDArray[np.int32],
    cuts: list[float | None],
    atoms: list[_Atom],
    height: float,
    scale: float,
) -> Proposal:
    images: list[U8] = []
    boxes: list[list[int]] = []
    firsts: list[int] = []
    ends: list[int] = []
    costs: list[float] = []
    for first in range(len(atoms)):
        join = 0.0
        left, top, right, bottom = atoms[first].left, atoms[first].top, atoms[first].right, atoms[first].bottom
        for end in range(first + 1, len(atoms) + 1):
            atom = atoms[end - 1]
            if end > first + 1:
                if atom.cut is None:
                    join += _join_cost(atom, left, right, top, bottom, height)
                left, right = min(left, atom.left), max(right, atom.right)
                top, bottom = min(top, atom.top), max(bottom, atom.bottom)
                if right - left > _WIDEST * height:
                    break
            cost = join + (cuts[first] or 0) / 2 + ((cuts[end] or 0) / 2 if end < len(atoms) else 0)
            tall = (bottom - top) / height
            if tall < 0.6:
                cost += _SMALL * (0.6 - tall) / 0.3
            cost += _WIDE * max(0.0, (right - left) / max(bottom - top, 1) - 1.0)
            if len(images) >= MAX_CANDIDATES:
                raise BadImage("a number was expected, but there is far more in the picture: send the number alone")
            window = (slice(top, bottom), slice(left, right))
            mine = (labels[window] >= first) & (labels[window] < end)
            part = np.where(mine, ink[window], np.float32(0))
            if int((part >= 0.5).sum()) >= _LEAST_INK * height**2 and max(bottom - top, right - left) >= 0.2 * height:
                images.append(normalise(part))
            else:
                images.append(np.zeros((IMAGE_HEIGHT, IMAGE_WIDTH), np.uint8))
                cost += _CRUMB
            boxes.append([round(value * scale) for value in _box(part, left, top)])
            firsts.append(first)
            ends.append(end)
            costs.append(cost)
    return Proposal(
        np.stack(images),
        np.array(boxes, np.intp),
        np.array(firsts, np.intp),
        np.array(ends, np.intp),
        np.array(costs, np.float32),
        len(atoms),
    )


def _box(part: F32, left: int, top: int) -> tuple[int, int, int, int]:
    """x, y, width and height of the ink in a window that begins at ``left`` and ``top``, without its soft edge."""
    solid = part >= 0.5
    if not solid.any():
        return left, top, part.shape[1], part.shape[0]
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    return left + int(columns[0]), top + int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def _join_cost(atom: _Atom, left: int, right: int, top: int, bottom: int, height: float) -> float:
    """What it costs to take a separate atom for a part of the digit before it."""
    overlap = (min(right, atom.right) - max(left, atom.left)) / max(1, min(right - left, atom.right - atom.left))
    smaller = min(bottom - top, atom.bottom - atom.top) / height
    if smaller < 0.6 or overlap > 0.6:
        return 1.0 - min(max(overlap, 0.0), 1.0)
    gap = (atom.left - right) / height
    return _JOIN * (1 - max(overlap, 0.0)) + 8 * max(gap, 0.0)
