"""The notebooks run from beginning to end, with trainings of a few seconds."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 3


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_it_was_saved_with(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(path, 4)
    kept = [[output.output_type for output in cell.get("outputs", [])] for cell in book.cells]
    for cell in book.cells:
        cell.source = re.sub(r"max_seconds=\d+", f"max_seconds={SECONDS}", cell.source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter about itself
        nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [[output.output_type for output in cell.get("outputs", [])] for cell in book.cells]
    assert all(set(before) == set(after) for before, after in zip(kept, shown, strict=True))
    assert any(kept)
