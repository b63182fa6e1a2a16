"""The data that the tests of ``digits`` read."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def mnist_test(raw_data: Path) -> np.ndarray:
    """All 10,000 test images, uint8 (10000, 28, 28)."""
    return np.fromfile(raw_data / "t10k-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
