"""The notebook runs from its first to its last cell, and is in the repository as a reader wants to see it."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import HANG_S, ROOT

NOTEBOOK = ROOT / "notebooks" / "digits.ipynb"
MOST_BYTES = 1_000_000


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: Any) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def printed(notebook: Any) -> str:
    return "".join(o.get("text", "") for cell in code_cells(notebook) for o in cell.outputs)


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_runs_in_quick_form(committed: Any, raw_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, on fewer images and a smaller network; it shows as many pictures as in full, and learns something."""
    assert raw_data == ROOT / "data"
    monkeypatch.setenv("DIGITS_NOTEBOOK_QUICK", "1")
    notebook = nbformat.from_dict(committed)
    NotebookClient(notebook, timeout=HANG_S, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert pictures(notebook) == pictures(committed)
    found = re.search(r"of 1,000 right: ([\d.]+)%", printed(notebook))
    assert found
    assert float(found[1]) > 80
    assert "WARNING" not in printed(notebook)


def test_the_committed_notebook_shows_a_full_run(committed: Any) -> None:
    """A forge shows it with its pictures: run in order, without an error, in full, and small enough to be drawn."""
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert "of 5,000 right" in printed(committed)
    assert pictures(committed) >= 10
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert not re.search(r"/(home|root|work|tmp)/", printed(committed))
