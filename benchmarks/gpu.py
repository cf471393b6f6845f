"""On a GPU: ``stream`` with Fourier downsampling beside a bare copy from pinned memory, and what shorter pixels are worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cryolike_data import Downsample, IndexedDataset, ParticleDataset
from cryolike_data.stream import stream

from .data import Project
from .measure import Figure, Settings, in_turn, per_second, rate_figure

COPY_BOUND, FLOAT16_BOUND = 0.90, 1.8
_BATCH = 256


def gpu(settings: Settings) -> Iterator[Figure]:
    """``stream`` to the device / the copy alone; float16 files / float32 files."""
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        for case in ("Fourier downsampling / pinned copy", "float16 files / float32 files"):
            yield Figure("gpu", case, note="no GPU at hand")
        return
    yield from on_device(settings, device)


def on_device(settings: Settings, device: torch.device) -> Iterator[Figure]:
    """The figures, on any device (on a CPU they mean nothing)."""
    single, half = (Project(settings.count(20_000), 20, pixels=kind) for kind in ("float32", "float16"))
    epochs = [_epoch(project, settings) for project in (single, half)]
    rates = in_turn(
        [
            lambda: _copied(epochs[0], device),
            lambda: _streamed(epochs[0], device),
            lambda: _streamed(epochs[1], device),
            lambda: _read(epochs[0], device),
        ]
    )
    scale = single.image_bytes / 1e9
    yield rate_figure("gpu", f"{single.label} to 64px / pinned copy", rates, "GB/s", bound=("at least", COPY_BOUND), scale=scale)
    yield rate_figure("gpu", f"{single.label}, reading alone / pinned copy", rates, "GB/s", ours=3, scale=scale)
    case = "float16 files / float32 files, to 64px"
    yield rate_figure("gpu", case, rates, "img/s", floor=1, ours=2, bound=("at least", FLOAT16_BOUND))


def _epoch(project: Project, settings: Settings) -> ParticleDataset:
    dataset = IndexedDataset(project.make(settings.data))
    dataset.read(slice(None))  # warm
    return dataset.select(np.tile(np.arange(len(dataset)), 10))


def _copied(dataset: ParticleDataset, device: torch.device) -> float:
    """Images a second of a bare copy of as many batches, from two pinned buffers in turn."""
    shape = (_BATCH, dataset.box, dataset.box)
    sources = [torch.ones(shape, dtype=dataset.dtype, pin_memory=device.type == "cuda") for _ in range(2)]
    targets = [torch.empty(shape, dtype=dataset.dtype, device=device) for _ in range(2)]
    steps = -(-len(dataset) // _BATCH)

    def work() -> int:
        for step in range(steps):
            targets[step % 2].copy_(sources[step % 2], non_blocking=True)
        return steps * _BATCH

    return per_second(work, device)


def _read(dataset: ParticleDataset, device: torch.device) -> float:
    """Images a second that ``read`` alone brings into pinned buffers, with all processors: about the most that can come of a stream."""
    shape = (2 * _BATCH, dataset.box, dataset.box)
    buffers = [torch.empty(shape, dtype=dataset.dtype, pin_memory=device.type == "cuda") for _ in range(3)]
    rows = np.random.default_rng(3).permutation(len(dataset))
    units = [rows[start : start + 2 * _BATCH] for start in range(0, len(rows) - 2 * _BATCH, 2 * _BATCH)]

    def work() -> int:
        for step, unit in enumerate(units):
            dataset.read(unit, buffers[step % 3])
        return len(units) * 2 * _BATCH

    return per_second(work, device)


def _streamed(dataset: ParticleDataset, device: torch.device) -> float:
    """Images a second through ``stream``, downsampled on the device."""
    options: dict[str, Any] = {"batch_size": _BATCH, "shuffle": True, "downsample": Downsample(box=64), "device": device}
    return per_second(lambda: sum(len(batch.images) for batch in stream(dataset, **options)), device)
