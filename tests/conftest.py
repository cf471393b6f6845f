"""Fixtures that several test modules use: the demo project and the reference files beside the project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import SHARED

from cryolike_data import IndexedDataset
from cryolike_data.demo import DemoProject, write_project


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoProject:
    """A small demo project, written once; tests read it only."""
    return write_project(tmp_path_factory.mktemp("demo") / "project", n_particles=60, box=32, seed=1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference files, or a skip that names it."""
    if not SHARED.is_dir():
        pytest.skip(f"reference files are not beside the project ({SHARED.name}/)")
    return SHARED


@pytest.fixture(scope="session")
def likelihood_demo(shared: Path) -> dict[str, np.ndarray]:
    """Inputs and results of CryoLike's likelihood, with the exact ones beside them."""
    with np.load(shared / "golden/likelihood_demo.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture
def ds(written: tuple[Path, np.ndarray]) -> IndexedDataset:
    """The data set of the table that a module's own fixture ``written`` names."""
    return IndexedDataset(written[0])


@pytest.fixture
def images(written: tuple[Path, np.ndarray]) -> np.ndarray:
    """The images of the rows of that table."""
    return written[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
