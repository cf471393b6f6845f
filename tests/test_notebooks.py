"""The notebooks run from top to bottom in an empty folder, and what is stored of them names no path of any machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|private|var|opt|mnt)/|[A-Z]:\\")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_are_three_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == ["export.ipynb", "likelihood.ipynb", "training.ipynb"]


# jupyter_client and its parts announce changes of their own; nothing else is let through.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(nbclient|jupyter_client|jupyter_core|zmq|tornado).*")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    stored = path.read_bytes()
    place = tmp_path / "place"
    place.mkdir()
    NotebookClient(read(path), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    assert path.read_bytes() == stored
    assert list(place.iterdir()) == []  # everything went into the notebook's own temporary folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook_is_small_whole_and_of_no_machine(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    assert MACHINE_PATH.findall(path.read_text("utf-8")) == []
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
