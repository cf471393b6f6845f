"""What holds a loader up: the floors of this machine on the user's own data, and how much of each ``stream`` reaches."""

from __future__ import annotations

import mmap
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from .dataset import ParticleDataset, human_bytes
from .pages import is_resident
from .sampler import ParticleSampler
from .stacks import Stacks
from .stream import ParticleStream, stream

_REPEATS = 5
_READ_BYTES = 4 << 20
_COPIED_BYTES = 256 << 20
#: Of fewer images, rates say little.
_LEAST_BYTES = 100_000_000


@dataclass(frozen=True)
class Figure:
    """One measured rate: bytes of images per second, and the floor it is compared with."""

    name: str
    bytes_per_second: float
    floor: str | None = None
    share: float | None = None

    def __str__(self) -> str:
        line = f"{self.name:<34} {self.bytes_per_second / 1e9:8.2f} GB/s"
        return line if self.share is None else f"{line}   {self.share:6.0%} of {self.floor}"


def diagnose(dataset: ParticleDataset, *, batch_size: int = 256, max_bytes: int = 1 << 30, cold: bool = True) -> tuple[list[Figure], str]:
    """Measure floors and what ``stream`` reaches, and say in a sentence what holds it up.

    Parameters
    ----------
    dataset : the particles; they are read, nothing is written
    batch_size : particles per batch
    max_bytes : how many bytes of images to use at the most: those of a few whole files, and not a few of each file
    cold : also read from the disk, after asking the system to forget the files (which takes nothing from anybody but the speed
        of the next reader); not of a store that is read through zarr

    Returns
    -------
    figures : medians of at least five runs each; two for cold reading
    sentence : where the bottleneck is, or that there are too few data to tell
    """
    particles = dataset.particles
    # In runs, so that what is read of the files one after the other is what is read of them at random.
    chosen = dataset.select(np.lexsort((particles.slice, particles.file))[: max(1, max_bytes // dataset.image_bytes)])
    size, batch_size = len(chosen) * chosen.image_bytes, min(batch_size, len(chosen))
    figures = _warm(_with_own_maps(chosen), batch_size, size)
    files = [chosen.particles.paths[k] for k in np.unique(chosen.particles.file)]
    if cold and isinstance(chosen.source, Stacks) and _forget(files):
        on_disk = min(sum(map(os.path.getsize, files)), max(max_bytes, dataset.image_bytes))
        sequential = _rate(lambda _: _read_through(files, on_disk), on_disk, before=lambda: _forget(files), repeats=2)
        random = _rate(lambda again: _drain(_batches(again, batch_size)), size, before=lambda: _forgotten(chosen, files), repeats=2)
        floor = Figure("sequential read, cold (floor)", sequential)
        figures += [floor, _compared("stream, cold, random order", random, floor)]
    if size < _LEAST_BYTES:
        return figures, f"These {human_bytes(size)} of images are too few to tell what the bottleneck is: starting an epoch takes as long."
    return figures, _sentence(figures)


def _warm(dataset: ParticleDataset, batch_size: int, size: int) -> list[Figure]:
    batches = _batches(dataset, batch_size)
    _drain(batches)
    copied = Figure("copy in memory (floor)", _rate(_copies(dataset, batch_size), size))
    figures = [copied, _compared("stream, warm, random order", _rate(lambda _: _drain(batches), size), copied)]
    if torch.cuda.is_available():
        pinned = Figure("pinned copy to the device (floor)", _rate(_device_copies(dataset, batch_size), size))
        batches = _batches(dataset, batch_size, "cuda")
        _drain(batches)
        figures += [pinned, _compared("stream to the device, warm", _rate(lambda _: _drain(batches), size), pinned)]
    return figures


def _forgotten(dataset: ParticleDataset, files: Sequence[str]) -> ParticleDataset:
    """The data set with nothing of it in memory; a file that is mapped would stay there, so each run has maps of its own."""
    _forget(files)
    return _with_own_maps(dataset)


def _with_own_maps(dataset: ParticleDataset) -> ParticleDataset:
    again: ParticleDataset = pickle.loads(pickle.dumps(dataset))
    return again


def _sentence(figures: Sequence[Figure]) -> str:
    by_name = {figure.name: figure for figure in figures}
    warm, cold = by_name["stream, warm, random order"], by_name.get("stream, cold, random order")
    device = by_name.get("stream to the device, warm")
    if cold is not None and cold.bytes_per_second < 0.5 * warm.bytes_per_second:
        times = warm.bytes_per_second / cold.bytes_per_second
        return f"The disk is the bottleneck: data that are in memory come {times:.1f} times as fast. A local copy or more memory helps."
    if device is not None and device.bytes_per_second < 0.8 * warm.bytes_per_second:
        return "The bus to the device is the bottleneck: float16 stacks would halve what has to cross it."
    if warm.share is not None and warm.share < 0.5:
        return "Small images or batches are the bottleneck: each batch costs more than the copying of its pixels. Larger batches help."
    return "Memory is the bottleneck: images come about as fast as this machine can copy them."


def _compared(name: str, rate: float, floor: Figure) -> Figure:
    return Figure(name, rate, floor.name.removesuffix(" (floor)"), rate / floor.bytes_per_second)


def _rate(run: Callable[[Any], None], size: int, *, before: Callable[[], Any] | None = None, repeats: int = _REPEATS) -> float:
    """Bytes per second, the median over some runs; ``run`` is given what ``before`` made."""
    seconds = []
    for _ in range(repeats):
        prepared = None if before is None else before()
        start = time.perf_counter()
        run(prepared)
        seconds.append(time.perf_counter() - start)
        prepared = None  # its maps, before the next run is prepared
    return size / median(seconds)


def _batches(dataset: ParticleDataset, batch_size: int, device: str | None = None) -> ParticleStream:
    return stream(dataset, sampler=ParticleSampler(dataset, batch_size), device=device)


def _drain(batches: ParticleStream) -> None:
    for _ in batches:
        continue
    if batches.device is not None:
        torch.cuda.synchronize()


def _copies(dataset: ParticleDataset, batch_size: int) -> Callable[[Any], None]:
    """Copying batches from all over a memory larger than the caches into one buffer."""
    images = max(batch_size, _COPIED_BYTES // dataset.image_bytes)
    source = torch.zeros((images, dataset.box, dataset.box), dtype=dataset.dtype, device="cpu")
    target = torch.zeros_like(source[:batch_size])

    def run(_: Any) -> None:
        for k in range(-(-len(dataset) // batch_size)):
            count = min(batch_size, len(dataset) - k * batch_size)
            start = k * batch_size % (images - count + 1)
            target[:count].copy_(source[start : start + count])

    return run


def _device_copies(dataset: ParticleDataset, batch_size: int) -> Callable[[Any], None]:
    source = torch.zeros((batch_size, dataset.box, dataset.box), dtype=dataset.dtype, device="cpu").pin_memory()
    target = torch.empty_like(source, device="cuda")

    def run(_: Any) -> None:
        for start in range(0, len(dataset), batch_size):
            count = min(batch_size, len(dataset) - start)
            target[:count].copy_(source[:count], non_blocking=True)
        torch.cuda.synchronize()

    return run


def _read_through(files: Sequence[str], size: int) -> None:
    """Read so many bytes of the files, one after the other."""
    buffer = memoryview(bytearray(_READ_BYTES))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while size and (got := file.readinto(buffer[:size])):
                size -= got


def _forget(files: Sequence[str]) -> bool:
    """Ask the system to drop the files from its cache; whether it did, by a sample of them."""
    if not hasattr(os, "posix_fadvise"):  # as on macOS
        return False
    for path in files:
        with _opened(path) as descriptor:
            # Only what is on the disk can be dropped.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return not any(_is_cached(path) for path in files[:: max(1, len(files) // 8)])


def _is_cached(path: str) -> bool:
    size = os.path.getsize(path)
    with _opened(path) as descriptor:
        if size:
            with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
                if not is_resident(np.frombuffer(mapped, np.uint8).ctypes.data + size // 2, 1):
                    return False
        # Linux says of files that this user may not write to that all is there. To ask in this way begins to read what is not, which
        # on a busy machine may be there by the time of the answer.
        try:
            return os.preadv(descriptor, [bytearray(1)], size // 2, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
        except OSError:  # a file system that cannot say
            return True


@contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
