"""The notebooks run from top to bottom, made smaller."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SHORTER = {  # notebook -> what a test makes smaller, and how many pictures there must be
    "01_quickstart": ("STEPS, PER_CAPTION = 300, 2", "STEPS, PER_CAPTION = 3, 1", 3),
    "02_attention_jvp": ("LENGTHS = [128, 256, 512, 1024, 2048]", "LENGTHS = [64, 600]", 3),
    "03_convert_and_sample": ('SIZE, FRAMES = "96x64", 9', 'SIZE, FRAMES = "32x16", 5', 3),
    "04_causal_streaming": ("CHUNKS = 8", "CHUNKS = 5", 4),
}

IN_CI = "02_attention_jvp"  # all of them: make test-full


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.long if p.stem == IN_CI else pytest.mark.slow) for p in NOTEBOOKS],
    ids=lambda p: p.stem,
)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    whole, smaller, expected_pictures = SHORTER[path.stem]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(cell.source.count(whole) for cell in code) == 1, "its size is set in one place"
    for cell in code:
        cell.source = cell.source.replace(whole, smaller)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == expected_pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not any(c.outputs or c.execution_count for c in cells if c.cell_type == "code")
