"""Warm random reading: ``dataset.read`` and ``stream`` beside ``torch.index_select`` from an ordinary tensor of the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from cryolike_data import IndexedDataset, ParticleDataset
from cryolike_data.stream import ParticleStream, stream

from .data import Pixels, Project
from .measure import Figure, Settings, gigabytes_per_second, in_turn, rate_figure
from .page_cache import forget, read_through

READ_BOUND, STREAM_BOUND = 0.90, 0.80
KINDS: tuple[Pixels, ...] = ("float32", "float16", "int8")


def read(settings: Settings) -> Iterator[Figure]:
    """``dataset.read`` into a reused buffer."""
    warm = projects(settings)
    for project, ahead in [*((project, False) for project in warm), *((project, True) for project in warm if project.box > 128)]:
        images, dataset, batch = _open(project, settings, ahead=ahead)
        passes = _passes(images, batch, settings)
        buffer = torch.empty((batch, *images.shape[1:]), dtype=images.dtype)
        rows = _batches(len(images), batch, passes)
        wanted = [part.numpy() for part in rows]

        actions = [_rate(_gather, images, rows, [buffer]), _rate(_read, dataset, wanted, buffer)]
        rates = in_turn(actions)
        if ahead:
            yield rate_figure("read", f"{project.label}, after a look-ahead", rates, "GB/s")
        else:
            yield rate_figure("read", project.label, rates, "GB/s", bound=("at least", READ_BOUND))


def streaming(settings: Settings) -> Iterator[Figure]:
    """``stream`` with a consumer that does nothing."""
    for project in projects(settings):
        images, dataset, batch = _open(project, settings)
        # A stream takes a moment to start and end, so the epoch is long; and to the floor, which has to be as long.
        passes = 1 + _passes(images, batch, settings)
        rows = _batches(len(images), batch, passes)
        epoch = dataset.select(np.tile(np.arange(len(images)), passes))
        buffers = [torch.empty((batch, *images.shape[1:]), dtype=images.dtype) for _ in range(2)]
        # As in a training loop, one stream serves all epochs and keeps its buffers; the floor's are not new either.
        batches = stream(epoch, batch_size=batch, shuffle=True)
        drain(batches)
        actions = [_rate(_gather, images, rows, buffers[:1]), _rate(drain, batches), _rate(_gather, images, rows, buffers)]
        rates = in_turn(actions)
        yield rate_figure("stream", project.label, rates, "GB/s", bound=("at least", STREAM_BOUND))
        yield rate_figure("stream", f"{project.label}, floor in 2 buffers", rates, "GB/s", floor=2)


def bare_copy(project: Project, settings: Settings) -> Callable[[], float]:
    """What takes the images of a data set from an ordinary tensor with ``index_select`` alone; images a second."""
    images, _, batch = _open(project, settings)
    rows = _batches(len(images), batch, _passes(images, batch, settings))
    buffer = torch.empty((batch, *images.shape[1:]), dtype=images.dtype)
    copy = _rate(_gather, images, rows, [buffer])
    return lambda: copy() * 1e9 / project.image_bytes


def projects(settings: Settings) -> list[Project]:
    """The data sets that are read warm."""
    n = settings.count(20_000)
    large = [Project(settings.count(count), 20, box=box) for box, count in ((256, 3200), (360, 1600))]
    few = [Project(n, 20, pixels=kind) for kind in KINDS]
    many = [Project(n // 2, settings.count(5000), pixels=kind) for kind in KINDS]
    return [*few, *many, *large]


def drain(batches: ParticleStream) -> int:
    """Take one epoch from a stream; the bytes that came."""
    return sum(part.images.nbytes for part in batches)


def _rate(work: Callable[..., int], *arguments: object) -> Callable[[], float]:
    return lambda: gigabytes_per_second(lambda: work(*arguments))


def _open(project: Project, settings: Settings, *, ahead: bool = False) -> tuple[torch.Tensor, ParticleDataset, int]:
    """All images as an ordinary tensor, the data set (after a check that it gives the same), and the batch size.

    The files come into the page cache by plain reads from beginning to end or, ``ahead``, as a look-ahead asks for them, which the system
    may keep in smaller pages.
    """
    table, paths = project.make(settings.data), project.paths(settings.data)
    batch = 256 if project.box <= 128 else 64
    forget(paths)
    if not ahead:
        read_through(paths)
    dataset = IndexedDataset(table)
    for start in range(0, len(dataset) if ahead else 0, batch):
        rows = np.arange(start, min(len(dataset), start + batch))
        dataset.ask_ahead(rows)
        dataset.read(rows)
    images = torch.empty((len(dataset), dataset.box, dataset.box), dtype=dataset.dtype)
    end = 0
    for path in paths:
        stack = np.fromfile(path, project.pixels, offset=1024)
        start, end = end, end + len(stack) // project.box**2
        images[start:end] = torch.from_numpy(stack).view(-1, project.box, project.box)
    some = np.random.default_rng(1).permutation(len(images))[:500]
    if not torch.equal(dataset.read(some), images[torch.from_numpy(some)]):
        raise AssertionError(f"{project.label}: the data set gives other pixels than the files hold")
    dataset.read(slice(None))  # every page has been seen
    return images, dataset, batch


def _gather(images: torch.Tensor, batches: list[torch.Tensor], buffers: list[torch.Tensor]) -> int:
    for step, rows in enumerate(batches):
        torch.index_select(images, 0, rows, out=buffers[step % len(buffers)])
    return len(batches) * buffers[0].nbytes


def _read(dataset: ParticleDataset, batches: list[np.ndarray], buffer: torch.Tensor) -> int:
    for rows in batches:
        dataset.read(rows, buffer)
    return len(batches) * buffer.nbytes


def _batches(n: int, batch: int, passes: int) -> list[torch.Tensor]:
    """Row numbers of full batches, in random order, over and over."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(n)[: n // batch * batch].reshape(-1, batch) for _ in range(passes)]
    return [torch.from_numpy(part) for part in np.concatenate(orders)]


def _passes(images: torch.Tensor, batch: int, settings: Settings) -> int:
    """Over all images for one repetition of about the wanted length."""
    once = _batches(len(images), batch, 1)
    buffer = torch.empty((batch, *images.shape[1:]), dtype=images.dtype)
    rate = float(np.median([gigabytes_per_second(lambda: _gather(images, once, [buffer])) for _ in range(4)]))
    return max(1, math.ceil(settings.seconds * rate * 1e9 / images.nbytes))
