"""The notebook of examples/ runs from top to bottom, and is stored without outputs."""

import json
import re

import pytest
from helpers import ROOT

NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def test_the_notebook_is_stored_without_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    accuracies = re.findall(r"^(ANN|quantized ANN|SNN) +([\d.]+) %", printed, re.MULTILINE)
    assert len(accuracies) == 3 and all(float(top1) > 95 for _, top1 in accuracies)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert "['net.pth', 'snn.onnx', 'snn.pth']" in printed
