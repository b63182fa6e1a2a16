"""Whole numbers, read through the running gateway."""

import io
from typing import Any

import httpx
import numpy as np
from PIL import Image

NUMBERS = 60
LEAST_RIGHT = 48  # 80 %: a sixth of the gaps between these digits are none


def test_numbers_of_unseen_digits_are_read(stack: Any) -> None:
    """Numbers of two to six MNIST test digits, apart or just touching."""
    images = np.fromfile(stack.data_dir / "t10k-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
    labels = np.fromfile(stack.data_dir / "t10k-labels-idx1-ubyte", np.uint8)[8:]
    rng = np.random.default_rng(3)
    wrong = []
    with httpx.Client(base_url=stack.rest_url, timeout=30) as client:
        for _ in range(NUMBERS):
            chosen = rng.integers(0, len(images), int(rng.integers(2, 7)))
            body = io.BytesIO()
            compose(images[chosen], rng).save(body, "PNG")
            answer = client.post("/read", content=body.getvalue(), headers={"Content-Type": "image/png"}).json()
            truth = "".join(str(label) for label in labels[chosen])
            if answer.get("number") != truth:
                wrong.append((truth, answer.get("number", answer)))
    assert len(wrong) <= NUMBERS - LEAST_RIGHT, wrong


def compose(images: np.ndarray, rng: np.random.Generator, grow: int = 3) -> Image.Image:
    """Digits uint8 (N, 28, 28) side by side, dark on white, -1 to 5 of their pixels apart."""
    canvas = np.zeros((40 * grow, (34 * len(images) + 10) * grow), np.uint8)
    x = 5 * grow
    for image in images:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        cut = Image.fromarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        part = np.asarray(cut.resize((cut.width * grow, cut.height * grow), Image.Resampling.BICUBIC))
        y = (canvas.shape[0] - part.shape[0]) // 2 + int(rng.integers(-2 * grow, 2 * grow + 1))
        window = canvas[y : y + part.shape[0], x : x + part.shape[1]]
        np.maximum(window, part, out=window)
        x += part.shape[1] + round(rng.uniform(-1, 5) * grow)
    return Image.fromarray(255 - canvas[:, : x + 5 * grow])
