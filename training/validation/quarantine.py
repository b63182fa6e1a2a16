"""The rows that somebody should look at, each with its reasons, as a table and as pictures. Nothing is removed."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from training.data import SPLITS
from training.validation.expectations import Offence
from training.validation.frames import Frames
from training.workspace import Split, whole_file

SHEET_IMAGES = 120
"""At most so many pictures on the contact sheet."""

_COLUMNS = 12
_PICTURE_PX = 112
_TILE_PX = (132, 180)
_MARGIN_PX, _HEAD_PX = 12, 40
_LINE_CHARACTERS, _LINES = 21, 3


def list_offences(frames: Frames, offences: list[Offence]) -> pd.DataFrame:
    """One line for each offending row: ``split``, ``row``, ``label`` and ``reasons``, joined by "; "."""
    parts = []
    for split in SPLITS:
        about = [offence for offence in offences if offence.split == split]
        rows = np.unique(np.concatenate([o.rows for o in about])) if about else np.zeros(0, np.int64)
        facts: dict[Any, Any] = frames[split].iloc[rows].to_dict(orient="index")
        reasons: dict[int, list[str]] = {int(row): [] for row in rows}
        for offence in about:
            for row in offence.rows.tolist():
                reasons[row].append(offence.reason.format(**facts[row]))
        labels = frames[split]["label"].to_numpy()[rows]
        joined = ["; ".join(reasons[row]) for row in rows.tolist()]
        parts.append(pd.DataFrame({"split": split, "row": rows, "label": labels, "reasons": joined}))
    return pd.concat(parts, ignore_index=True)


def write_quarantine(path: Path, listed: pd.DataFrame) -> None:
    """The list as CSV; rows count from 0, as they lie in the raw files."""
    with whole_file(path) as part:
        listed.to_csv(part, index=False, lineterminator="\n")


def choose_pictures(listed: pd.DataFrame, offences: list[Offence], limit: int = SHEET_IMAGES) -> pd.DataFrame:
    """At most ``limit`` of the listed rows, of each reason as many as of any other while there are, evenly spread."""
    queues = [
        [(offence.split, row) for row in _spread(offence.rows, limit).tolist()]
        for offence in sorted(offences, key=lambda o: len(o.rows))
    ]
    chosen: dict[tuple[str, int], None] = {}
    for place in range(limit):
        for queue in queues:
            if place < len(queue) and len(chosen) < limit:
                chosen[queue[place]] = None
    keys = pd.MultiIndex.from_frame(listed[["split", "row"]])
    return listed[keys.isin(list(chosen))] if chosen else listed.iloc[:0]


def _spread(rows: np.ndarray, limit: int) -> np.ndarray:
    return rows if len(rows) <= limit else rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]


def draw_contact_sheet(path: Path, splits: dict[str, Split], shown: pd.DataFrame, listed: int) -> None:
    """A tile for each row of ``shown``: ink black on white, split and row, label, reasons; the same is the same bytes.

    Args:
        path: the PNG to write.
        splits: the images.
        shown: rows as ``list_offences`` gives them.
        listed: how many the quarantine lists in all.
    """
    columns = min(_COLUMNS, max(5, len(shown)))  # room for the title
    lines = -(-len(shown) // columns)
    size = (2 * _MARGIN_PX + columns * _TILE_PX[0], _HEAD_PX + _MARGIN_PX + lines * _TILE_PX[1])
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    some = f"{len(shown):,} of {listed:,} rows" if len(shown) < listed else f"{listed:,} rows"
    title = f"Raw data to look at: {some} in quarantine.csv" if listed else "Raw data: no row to look at"
    draw.text((_MARGIN_PX, 10), title, fill="black", font=ImageFont.load_default(18))
    small = ImageFont.load_default(12)
    for number, (split, row, label, reasons) in enumerate(shown.itertuples(index=False)):
        left = _MARGIN_PX + number % columns * _TILE_PX[0]
        top = _HEAD_PX + number // columns * _TILE_PX[1]
        picture = Image.fromarray(255 - splits[split].images[row])
        sheet.paste(picture.resize((_PICTURE_PX, _PICTURE_PX), Image.Resampling.NEAREST), (left, top))
        draw.rectangle((left, top, left + _PICTURE_PX - 1, top + _PICTURE_PX - 1), outline="#c8c8c8")
        caption = "\n".join([f"{split} {row}, label {label}", *_wrap(reasons)])
        draw.text((left, top + _PICTURE_PX + 4), caption, fill="black", font=small, spacing=2)
    with whole_file(path) as part:
        sheet.save(part, format="PNG", optimize=True)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _LINE_CHARACTERS, max_lines=_LINES, placeholder=" …")
