"""The notebook runs from its first cell to its last, in a folder of its own."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(digits, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="notebooks need nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    book = nbformat.read(NOTEBOOK, as_version=4)
    (tmp_path / "data").symlink_to(digits[0])  # as `fusenorm digits` leaves it: nothing is trained
    run = tmp_path / "results" / "digits_resnet18_32x32_base_e16_lr0.05_default"
    run.mkdir(parents=True)
    (run / "s0").symlink_to(digits[1].parent)
    nbclient.NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(o.get("text", "") for cell in book.cells for o in cell.get("outputs", ()))
    assert "95.3% are accepted on average" in said
    assert "rejected 200 of 200 images of noise" in said
    assert said.rstrip().endswith("True")
