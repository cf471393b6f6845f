"""A program that has set torch's default device to another one reads and works on the CPU as before, unless it asks for something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cryolike_data import (
    Collate,
    Downsample,
    ImageDescriptor,
    IndexedDataset,
    PolarGrid,
    ZarrDataset,
    export_cryolike,
    export_mrc,
    export_zarr,
    stream,
)
from cryolike_data.demo import DemoProject
from cryolike_data.likelihood import Templates, displacement_grid, stream_likelihood

GRID = PolarGrid(8.0, 0.25, 32)


@pytest.fixture(autouse=True)
def another_default() -> Iterator[None]:
    torch.set_default_device("meta")  # which holds no numbers, so that whatever came to lie there would show
    yield
    torch.set_default_device(None)


def likelihoods(demo: DemoProject, folder: Path) -> np.ndarray:
    templates = Templates.from_volume(demo.volume, GRID, step_deg=60)
    return stream_likelihood(
        IndexedDataset(demo.indexed), templates, displacement_grid(5, 2.5), batch_size=8, dtype=torch.float64, output=folder / "out"
    )["log_likelihood"]


def through_zarr(demo: DemoProject, folder: Path) -> torch.Tensor:
    export_zarr(IndexedDataset(demo.indexed), folder / "out.zarr", downsample=Downsample(box=16))
    return ZarrDataset(folder / "out.zarr").read([1, 0])


def through_mrc(demo: DemoProject, folder: Path) -> torch.Tensor:
    export_mrc(IndexedDataset(demo.indexed), folder, downsample=Downsample(box=16))
    return IndexedDataset(folder / "particles.cs").read([1, 0])


def through_cryolike(demo: DemoProject, folder: Path) -> torch.Tensor:
    one_group = IndexedDataset(demo.indexed).select(lambda p: p.ctf.voltage_kv == 300)
    export_cryolike(one_group, folder, descriptor=ImageDescriptor(32, 2.0, 8.0, 0.25, 32))
    return torch.load(next(folder.glob("fft/*.pt")), map_location="cpu", weights_only=True)[:2]


WORK: dict[str, Callable[[DemoProject, Path], Any]] = {
    "batch": lambda demo, folder: IndexedDataset(demo.indexed).batch([1, 0]).ctf.defocus_u,
    "stream": lambda demo, folder: [batch.images for batch in stream(IndexedDataset(demo.indexed), batch_size=7)],
    "cropping": lambda demo, folder: Collate(Downsample(box=15), "background")(IndexedDataset(demo.indexed).batch(range(9))).images,
    "joining": lambda demo, folder: Collate()([IndexedDataset(demo.indexed)[1], IndexedDataset(demo.indexed)[0]]).images,
    "polar": lambda demo, folder: next(iter(stream(IndexedDataset(demo.indexed), batch_size=7, polar=GRID, unit_power=True))).fourier,
    "likelihood": likelihoods,
    "Zarr": through_zarr,
    "MRC": through_mrc,
    "CryoLike": through_cryolike,
}


@pytest.mark.parametrize("name", WORK)
def test_the_same_comes_out(demo: DemoProject, tmp_path: Path, name: str) -> None:
    found = WORK[name](demo, tmp_path / "found")
    torch.set_default_device(None)
    expected = WORK[name](demo, tmp_path / "expected")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
