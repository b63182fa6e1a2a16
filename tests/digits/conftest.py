"""Pictures for the tests of ``digits``: encoded files made here, real test digits when the data is there."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def encode(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def mnist_test() -> np.ndarray:
    """All 10,000 test images, uint8 (10000, 28, 28)."""
    path = ROOT / "data" / "t10k-images-idx3-ubyte"
    if not path.exists():
        pytest.skip("the data is not there: python -m pipelines ingest")
    return np.fromfile(path, np.uint8)[16:].reshape(-1, 28, 28)
