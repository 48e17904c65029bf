"""The notebook: it runs from its first cell to its last, in a kernel, and shows what it says."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "retro.ipynb"


@pytest.mark.slow
def test_the_notebook_goes_from_text_to_the_colored_page(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "4")
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    said = ["".join(o["text"] for o in cell.outputs if o.get("name") == "stdout") for cell in cells]
    results = [next((o["data"] for o in cell.outputs if o.output_type == "execute_result"), {}) for cell in cells]
    assert "held out: as-you-like-it.md the-tempest.md" in said[1]
    assert said[2].count("distance") == 3
    assert "'leaking_neighbors': 0" in results[3]["text/plain"]
    assert "bits per byte of held-out text" in said[4]
    assert "chunk 1 found " in said[5]
    assert "retrieval off" in said[6] and "random neighbors" in said[6]
    assert "notebook/report.html" in results[7]["text/html"]
    assert "What retrieval did" in (tmp_path / "notebook" / "report.html").read_text()
