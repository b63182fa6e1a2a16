"""Drawings that are not MNIST, read through the running gateway: how many of them it gets right."""

import io
from typing import Any

import httpx
import numpy as np
import pytest

from tests.stack import strokes

CONDITIONS: dict[str, dict[str, Any]] = {
    "a pen on the page": {"side": 280, "width": 18},
    "a hairline": {"side": 280, "width": 1},
    "a marker": {"side": 280, "width": 44},
    "small, in a corner": {"side": 280, "width": 5, "size": 0.2, "centre": (0.2, 0.8)},
    "filling the sheet": {"side": 280, "width": 24, "size": 1.0},
    "light on dark": {"side": 280, "width": 18, "ink": 255, "paper": 0},
    "pale on grey": {"side": 280, "width": 14, "ink": 175, "paper": 190},
    "a large canvas": {"side": 900, "width": 3},
    "an icon": {"side": 40, "width": 2},
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_drawings_are_read(stack: Any, condition: str) -> None:
    """50 drawings a condition, five hands a digit: at least 48 are read right (some sevens are anyone's guess)."""
    options = dict(CONDITIONS[condition])
    size, centre = options.pop("size", 0.75), options.pop("centre", (0.5, 0.5))
    rng = np.random.default_rng(11)
    wrong = []
    with httpx.Client(base_url=stack.rest_url, timeout=30) as client:
        for digit, styles in strokes.STYLES.items():
            for style, paths in styles.items():
                picture = strokes.render(strokes.place(strokes.wobble(paths, rng), size, centre), **options)
                body = io.BytesIO()
                picture.save(body, "PNG")
                answer = client.post("/classify", content=body.getvalue(), headers={"Content-Type": "image/png"}).json()
                if answer.get("digit") != digit:
                    wrong.append((digit, style, answer))
    assert len(wrong) <= 2, wrong
