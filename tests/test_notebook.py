"""The example notebook runs from top to bottom, learns, and is kept without its outputs."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture
def short_tmpdir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the notebook puts into temporary folders goes when the test ends.

    Ray's sockets lie there too, and a socket's path has 107 bytes at most: pytest's is too long.
    """
    folder = Path(tempfile.mkdtemp(prefix="nb", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_notebook_is_kept_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(code) > 3
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_notebook_trains(short_tmpdir: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(new_code_cell("import json\nprint(json.dumps(callback.losses))"))

    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(NOTEBOOK.parent))

    losses = json.loads(notebook.cells[-1].outputs[0].text)
    assert len(losses) == 60
    assert losses[-1] < 0.8 * losses[0]
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [o for o in shown if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    reports = [p for p in short_tmpdir.rglob("report.html") if p.parent.name == "notebook"]
    assert len(reports) == 1
