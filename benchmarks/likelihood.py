"""Polar transforms beside one finufft call per image, the streamed likelihood beside the likelihood alone, and that beside the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import finufft
import numpy as np
import torch
from torch import Tensor

from cryolike_data import IndexedDataset, ParticleDataset, PolarBatch, PolarGrid
from cryolike_data.likelihood import Templates, displacement_grid, integrated_log_likelihood, stream_likelihood, viewing_directions
from cryolike_data.stream import stream
from cryolike_data.transforms import to_polar

from .data import Project
from .measure import Bound, Figure, Rounds, Settings, in_turn, per_second, rate_figure, seconds_of

POLAR_BOUND: Bound = ("at least", 5.0)
STREAM_BOUND: Bound = ("at least", 0.90)
MACHINE_BOUND: Bound = ("at least", 0.40)
_DISPLACEMENTS_A = displacement_grid(4, 2)
_BATCH = {"cpu": 128, "cuda": 512}


def likelihood(settings: Settings) -> Iterator[Figure]:
    """All figures of Fourier space and likelihood."""
    yield from _polar()
    yield from on_device(settings, torch.device("cpu"), images=256, step_deg=10)
    if torch.cuda.is_available():
        yield from on_device(settings, torch.device("cuda"), images=8192, step_deg=5)
    else:
        for case in ("stream_likelihood / likelihood alone", "likelihood / arithmetic or bandwidth"):
            yield Figure("likelihood", f"on a GPU: {case}", note="no GPU at hand")


def one_finufft_call_per_image(images: np.ndarray, grid: PolarGrid, eps: float) -> float:
    """Images a second, transformed as CryoLike does it."""
    radial = (4 * np.pi / images.shape[-1]) * grid.radii[:, None]
    x, y = (radial * np.cos(grid.angles)).ravel(), (radial * np.sin(grid.angles)).ravel()
    start = time.perf_counter()
    for image in images:
        finufft.nufft2d2(x, y, image.astype(np.complex128), eps=eps, isign=-1)
    return len(images) / (time.perf_counter() - start)


def _polar() -> Iterator[Figure]:
    images, grid = torch.randn(128, 128, 128, generator=torch.Generator().manual_seed(0)), PolarGrid.of_box(128)

    def ours(dtype: torch.dtype) -> float:
        return len(images) / seconds_of(lambda: to_polar(images, grid, eps=1e-6, dtype=dtype))

    peer = partial(one_finufft_call_per_image, images[:24].numpy(), grid, 1e-6)
    rates = in_turn([peer, partial(ours, torch.complex64), partial(ours, torch.complex128)])
    case = "128px, 129 x 256, {} / finufft per image"
    yield rate_figure("likelihood", f"to_polar {case.format('complex64')}", rates, "img/s", bound=POLAR_BOUND)
    yield rate_figure("likelihood", f"to_polar {case.format('complex128')}", rates, "img/s", ours=2)


def on_device(settings: Settings, device: torch.device, *, images: int, step_deg: float) -> Iterator[Figure]:
    """The figures of the likelihood on a device, at 128 pixels and the full grid, for as many templates as directions so far apart."""
    project = Project(settings.count(20_000), 20)
    dataset = IndexedDataset(project.make(settings.data)).select(slice(0, settings.count(images)))
    dataset.read(slice(None))  # warm
    grid = PolarGrid.of_box(dataset.box)
    references = _templates(grid, len(viewing_directions(step_deg)[0]), dataset.box * dataset.pixel_size, device)
    batches = list(_batches(dataset, grid, device))
    rates = in_turn([partial(_alone, batches, references, device), partial(_streamed, dataset, references, device)])
    where = "on a GPU: " if device.type == "cuda" else ""
    size = f"{len(references)} templates, {len(_DISPLACEMENTS_A)} displacements"
    case = f"{where}stream_likelihood, {size} / likelihood alone"
    yield rate_figure("likelihood", case, rates, "img/s", bound=STREAM_BOUND)
    yield _beside_the_machine(batches, references, device, where)


def _beside_the_machine(batches: list[PolarBatch], references: Templates, device: torch.device, where: str) -> Figure:
    """The likelihood alone, beside the larger of the times that its arithmetic and its memory traffic take at the rates of the machine.

    For each image, template and displacement: the products over shells of the spectra of image and mask at each angular frequency,
    a complex multiplication and addition (8 operations) each; and at the least, two spectra written and read by the Fourier
    transform, and two rows of numbers at all rotations written by it and read once.
    """
    grid = references.grid
    frequencies = grid.n_inplanes // 2 + 1
    count = sum(map(len, batches)) * len(references) * len(_DISPLACEMENTS_A)
    operations = count * 2 * 8 * grid.n_shells * frequencies
    moved = count * 2 * 2 * (8 * frequencies + 4 * grid.n_inplanes)
    rounds = in_turn(
        [partial(_operations_per_second, grid, device), partial(_bytes_per_second, device), partial(_alone, batches, references, device)]
    )
    arithmetic, traffic = operations / rounds.values[:, 0], moved / rounds.values[:, 1]
    images = sum(map(len, batches))
    best = images / np.maximum(arithmetic, traffic)
    larger = "arithmetic" if np.median(arithmetic) >= np.median(traffic) else "bandwidth"
    rates = Rounds(np.column_stack([best, rounds.values[:, 2]]), rounds.disturbed)
    bound = MACHINE_BOUND if device.type == "cuda" else None
    return rate_figure("likelihood", f"{where}likelihood / {larger} of the machine", rates, "img/s", bound=bound)


def _templates(grid: PolarGrid, count: int, box_A: float, device: torch.device) -> Templates:
    """Random templates: what the figures are does not depend on what they show."""
    numbers = torch.Generator().manual_seed(1)
    half = torch.randn(count, grid.n_shells, grid.n_inplanes // 2, dtype=torch.complex64, generator=numbers)
    return Templates(torch.cat([half, half.conj()], dim=-1).to(device), grid, box_A, torch.zeros(count, 3))


def _batches(dataset: ParticleDataset, grid: PolarGrid, device: torch.device) -> Iterator[PolarBatch]:
    for batch in stream(dataset, batch_size=_BATCH[device.type], polar=grid, normalize="max", unit_power=True, device=device):
        assert isinstance(batch, PolarBatch)
        yield batch


def _alone(batches: list[PolarBatch], references: Templates, device: torch.device) -> float:
    def work() -> int:
        for batch in batches:
            integrated_log_likelihood(batch, references, _DISPLACEMENTS_A)
        return sum(map(len, batches))

    return per_second(work, device)


def _streamed(dataset: ParticleDataset, references: Templates, device: torch.device) -> float:
    def work() -> int:
        return len(stream_likelihood(dataset, references, _DISPLACEMENTS_A, batch_size=_BATCH[device.type], progress=False))

    return per_second(work, device)


def _operations_per_second(grid: PolarGrid, device: torch.device) -> float:
    """Of the matrix products of the likelihood, in one call that is large enough for any machine."""
    frequencies, columns = grid.n_inplanes // 2 + 1, 64 if device.type == "cpu" else 4096
    left = torch.randn(frequencies, 512, grid.n_shells, dtype=torch.complex64, device=device)
    right = torch.randn(frequencies, grid.n_shells, columns, dtype=torch.complex64, device=device)
    return _best(lambda: torch.bmm(left, right), 8 * left.numel() * columns, device)


def _bytes_per_second(device: torch.device) -> float:
    """Of a copy that no cache holds, read and written."""
    source = torch.ones(64 << 20 if device.type == "cpu" else 1 << 30, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return _best(lambda: target.copy_(source), 2 * source.nbytes, device)


def _best(work: Callable[[], Tensor], amount: int, device: torch.device) -> float:
    """The highest of three rates."""

    def once() -> int:
        work()
        return amount

    return max(per_second(once, device) for _ in range(3))
