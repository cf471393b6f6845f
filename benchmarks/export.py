"""Exports beside plain writing of the same bytes, beside the slowest of their parts, and beside what CryoLike does."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from cryolike_data import (
    Downsample,
    ImageDescriptor,
    IndexedDataset,
    ParticleDataset,
    ZarrDataset,
    export_cryolike,
    export_mrc,
    export_zarr,
)

from .data import Project
from .likelihood import one_finufft_call_per_image
from .machine import anonymous_bytes
from .measure import ROUNDS, Bound, Figure, Rounds, Settings, in_turn, rate_figure

PLAIN_BOUND: Bound = ("at least", 0.80)
PARTS_BOUND: Bound = ("at least", 0.80)
PHYSICAL_BOUND: Bound = ("at least", 0.70)
FOURIER_BOUND: Bound = ("at least", 5.0)
READING_BOUND: Bound = ("at least", 0.95)
GROWTH_BOUND: Bound = ("at most", 1.10)
MEMORY_BOUND: Bound = ("at most", 1.0)
SIZE_BOUND: Bound = ("at most", 1.02)
_FILE_BYTES, _PIECE_BYTES = 256 << 20, 4 << 20
_ALLOWED = 1e9
#: Rounds where files are written: pages that the host of a virtual machine has yet to find slow down a few of them.
_ROUNDS = 9
_BATCH = 256


def export(settings: Settings) -> Iterator[Figure]:
    """All figures of exports."""
    out = settings.data / "exported"
    shutil.rmtree(out, ignore_errors=True)
    try:
        for figures in (_zarr, _downsampled, _physical, _fourier, _reading, _memory, _sizes):
            yield from figures(settings, out)
            shutil.rmtree(out, ignore_errors=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _zarr(settings: Settings, out: Path) -> Iterator[Figure]:
    dataset, project = _dataset(settings, Project(20_000, 20))
    dataset = _evened(dataset, settings.count(24_576))  # 6 files
    rates = in_turn([partial(_plain, out, _FILE_BYTES, _payload(dataset)), partial(_rate, dataset, out, _to_zarr)], _ROUNDS)
    yield rate_figure("export", f"Zarr, {project.label} / plain writing", rates, "GB/s", bound=PLAIN_BOUND, scale=_gigabytes(dataset))


def _downsampled(settings: Settings, out: Path) -> Iterator[Figure]:
    dataset, project = _dataset(settings, Project(3_200, 20, box=256))
    dataset = _evened(dataset, 4 * settings.count(2_560))  # 10 files
    crop = Downsample(box=128)
    images = dataset.read(np.arange(min(len(dataset), 512)))
    small = len(dataset) * 128 * 128 * 4

    def reading() -> float:
        buffer = torch.empty((64, dataset.box, dataset.box))
        start = time.perf_counter()
        for first in range(0, len(dataset) - 63, 64):
            dataset.read(np.arange(first, first + 64), buffer)
        return (len(dataset) // 64 * 64) / (time.perf_counter() - start)

    def cropping() -> float:
        start = time.perf_counter()
        for first in range(0, len(images), 64):
            crop(images[first : first + 64])
        return len(images) / (time.perf_counter() - start)

    writing = partial(_plain, out, _FILE_BYTES, small, of=len(dataset))
    ours = partial(_rate, dataset, out, partial(_to_zarr, downsample=crop, shard_bytes=64 << 20))
    rates = in_turn([reading, cropping, writing, ours])
    slowest = np.column_stack([rates.values[:, :3].min(axis=1), rates.values[:, 3]])
    yield rate_figure(
        "export", f"Zarr, {project.label}, to 128px / slowest part", Rounds(slowest, rates.disturbed), "img/s", bound=PARTS_BOUND
    )


def _physical(settings: Settings, out: Path) -> Iterator[Figure]:
    dataset, project = _dataset(settings, Project(20_000, 20))
    dataset = _evened(dataset, settings.count(20_480))  # 20 files
    per_file = 1024 * dataset.image_bytes
    ours = partial(_rate, dataset, out, partial(_to_cryolike, fourier=False))
    rates = in_turn([partial(_plain, out, per_file, _payload(dataset)), ours], _ROUNDS)
    name = f"CryoLike, no Fourier, {project.label} / plain writing"
    yield rate_figure("export", name, rates, "GB/s", bound=PHYSICAL_BOUND, scale=_gigabytes(dataset))


def _fourier(settings: Settings, out: Path) -> Iterator[Figure]:
    dataset, project = _dataset(settings, Project(20_000, 20), images=settings.count(4096))
    grid = ImageDescriptor.from_individual_values(dataset.box, dataset.pixel_size)
    polar = grid.polar_grid
    one_by_one = partial(one_finufft_call_per_image, dataset.read(np.arange(24)).numpy(), polar, grid.eps)
    transform = 8 * polar.n_shells * polar.n_inplanes
    rates = in_turn([one_by_one, partial(_rate, dataset, out, _to_cryolike, more=transform)])
    yield rate_figure("export", f"CryoLike, {project.box}px / finufft per image", rates, "img/s", bound=FOURIER_BOUND)


def _reading(settings: Settings, out: Path) -> Iterator[Figure]:
    dataset, project = _dataset(settings, Project(20_000, 20))
    _to_zarr(dataset, out / "read")
    store = ZarrDataset(out / "read")
    rows = np.random.default_rng(3).permutation(len(dataset))
    batches = [rows[start : start + _BATCH] for start in range(0, len(rows) - _BATCH + 1, _BATCH)]
    buffer = torch.empty((_BATCH, dataset.box, dataset.box))
    if not torch.equal(store.read(batches[0]), dataset.read(batches[0])):
        raise SystemExit("the store does not hold the images of the stacks")

    def rate(particles: ParticleDataset) -> float:
        start = time.perf_counter()
        for batch in batches:
            particles.read(batch, buffer)
        return len(batches) * _BATCH * dataset.image_bytes / (time.perf_counter() - start) / 1e9

    rates = in_turn([partial(rate, dataset), partial(rate, store)])
    yield rate_figure("export", f"reading our Zarr, {project.label} / MRC", rates, "GB/s", bound=READING_BOUND)


def _memory(settings: Settings, out: Path) -> Iterator[Figure]:
    for name in _WRITERS:
        few, many = (float(np.median([_peak_of(name, images, settings, out) for _ in range(ROUNDS)])) for images in (20_000, 200_000))
        told = f"{few / 1e6:.0f} MB", f"{many / 1e6:.0f} MB"
        yield Figure("export", f"peak memory, 200,000 / 20,000 images, {name}", *told, many / few, GROWTH_BOUND)
        yield Figure("export", f"peak memory, 200,000 images / 1 GB, {name}", "1000 MB", told[1], many / _ALLOWED, MEMORY_BOUND)


def _peak_of(name: str, images: int, settings: Settings, out: Path) -> float:
    """Bytes at the peak of an export in a process of its own."""
    # Sparse files: 64 pixels, because 200,000 images of 128 would fill the disk with 13 GB.
    table = Project(images, images // 1000, box=64, sparse=True).make(settings.data)
    command = [sys.executable, "-m", "benchmarks.export", name, str(table), str(out / "memory")]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    shutil.rmtree(out, ignore_errors=True)
    return float(run.stdout)


def _sizes(settings: Settings, out: Path) -> Iterator[Figure]:
    dataset, _ = _dataset(settings, Project(20_000, 20), images=settings.count(4_000))
    polar = ImageDescriptor.from_individual_values(dataset.box, dataset.pixel_size).polar_grid
    transform = 8 * polar.n_shells * polar.n_inplanes
    writers: dict[str, tuple[Callable[[ParticleDataset, Path], object], int]] = {
        "Zarr": (_to_zarr, 0),
        "MRC": (export_mrc, 0),
        "CryoLike": (partial(_to_cryolike, rows=512), transform),
    }
    for name, (write, more) in writers.items():
        place = out / name
        write(dataset, place)
        images = min(len(dataset), 512) if more else len(dataset)
        payload = images * (dataset.image_bytes + more)
        found = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
        yield Figure(
            "export", f"bytes on disk / payload, {name}", f"{payload / 1e6:.1f} MB", f"{found / 1e6:.1f} MB", found / payload, SIZE_BOUND
        )


def _dataset(settings: Settings, project: Project, images: int | None = None) -> tuple[ParticleDataset, Project]:
    """The images, all of them in the page cache."""
    sized = Project(settings.count(project.images), project.stacks, box=project.box)
    dataset = IndexedDataset(sized.make(settings.data))
    if images is not None:
        dataset = dataset.select(slice(0, images))
    for start in range(0, len(dataset), 1024):
        dataset.read(slice(start, start + 1024))
    return dataset, sized


def _evened(dataset: ParticleDataset, images: int) -> ParticleDataset:
    """So many images, some of them more than once: for files that are all of a size and that two cores share evenly."""
    return dataset.select(np.resize(np.arange(len(dataset)), images))


def _payload(dataset: ParticleDataset) -> int:
    return len(dataset) * dataset.image_bytes


def _gigabytes(dataset: ParticleDataset) -> float:
    """What makes gigabytes a second of images a second."""
    return dataset.image_bytes / 1e9


def _plain(out: Path, file_bytes: int, total: int, *, of: int | None = None) -> float:
    """Write so many bytes to files of a size, from memory; images a second, of ``of`` images or of 64 KiB each."""
    _fill_in(out, total)
    return _write(out, file_bytes, total, of)


def _fill_in(out: Path, total: int) -> None:
    """Write twice as many bytes and remove them: what is measured next finds pages that the host of a virtual machine has."""
    _write(out, _FILE_BYTES, 2 * total, None)


def _write(out: Path, file_bytes: int, total: int, of: int | None) -> float:
    out.mkdir(parents=True, exist_ok=True)
    source = _bytes(file_bytes)
    start = time.perf_counter()
    for number, first in enumerate(range(0, total, file_bytes)):
        size = min(file_bytes, total - first)
        with open(out / f"{number}.bin", "wb", buffering=0) as file:
            for done in range(0, size, _PIECE_BYTES):
                file.write(source[done : min(size, done + _PIECE_BYTES)])
    taken = time.perf_counter() - start
    shutil.rmtree(out)
    return (total // 65536 if of is None else of) / taken


@lru_cache(maxsize=2)
def _bytes(size: int) -> memoryview:
    """As many bytes as a file has: were they fewer, they would come from the cache of the CPU, as no images do."""
    return memoryview(np.random.default_rng(0).bytes(size))


def _rate(dataset: ParticleDataset, out: Path, write: Callable[[ParticleDataset, Path], object], *, more: int = 0) -> float:
    """Images a second of an export, which writes as many bytes as the images have, and so many more for each."""
    _fill_in(out, _payload(dataset) + more * len(dataset))
    start = time.perf_counter()
    write(dataset, out)
    taken = time.perf_counter() - start
    shutil.rmtree(out)
    return len(dataset) / taken


def _to_zarr(dataset: ParticleDataset, out: Path, downsample: Downsample | None = None, shard_bytes: int = _FILE_BYTES) -> None:
    export_zarr(dataset, out, downsample=downsample, shard_bytes=shard_bytes, progress=False)


def _to_cryolike(dataset: ParticleDataset, out: Path, *, fourier: bool = True, rows: int | None = None) -> None:
    grid = ImageDescriptor.from_individual_values(dataset.box, dataset.pixel_size)
    export_cryolike(dataset.select(slice(0, rows)), out, descriptor=grid, fourier=fourier, progress=False)


_WRITERS: dict[str, Callable[[ParticleDataset, Path], object]] = {
    "Zarr": _to_zarr,
    "CryoLike, no Fourier": partial(_to_cryolike, fourier=False),
    "MRC": partial(export_mrc, progress=False),
}


def peak(name: str, table: str, out: str) -> int:
    """Bytes of anonymous memory at the peak of an export, sampled beside it."""
    import threading

    highest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    _WRITERS[name](IndexedDataset(table), Path(out))
    done.set()
    thread.join()
    return highest


if __name__ == "__main__":
    print(peak(*sys.argv[1:]))
