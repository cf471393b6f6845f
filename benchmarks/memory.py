"""Anonymous memory that an epoch through ``stream`` takes, in a process of its own (``python -m benchmarks.memory TABLE``)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cryolike_data import IndexedDataset
from cryolike_data.stream import stream

from .data import Project
from .machine import anonymous_bytes
from .measure import Figure, Settings

_BATCH, _PREFETCH = 256, 3
_ALLOWED = 64e6


def memory(settings: Settings) -> Iterator[Figure]:
    """Growth of anonymous memory (peak - start) / the buffers in turn and 64 MB."""
    # Holes become pages of zeros when they are read: 2 million images of 128 pixels would fill 131 GB of page cache.
    small = Project(20_000, 20, sparse=True)
    for project in (small, Project(settings.count(2_000_000), 2000, box=32, pixels="float16", sparse=True)):
        table = project.make(settings.data)
        command = [sys.executable, "-m", "benchmarks.memory", str(table)]
        run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        grown = float(run.stdout)
        allowed = (_PREFETCH + 2) * _BATCH * project.image_bytes + _ALLOWED
        case = f"{project.images:,} images, {project.box}px {project.pixels}"
        yield Figure("memory", case, f"{allowed / 1e6:.0f} MB", f"{grown / 1e6:.0f} MB", grown / allowed, ("at most", 1.0))


def growth(table: str) -> int:
    """Bytes of anonymous memory at the peak of an epoch beyond those before it."""
    dataset = IndexedDataset(table)
    dataset.particles.columns()  # the table is read when it is first asked for; the epoch is what comes after it
    start = peak = anonymous_bytes()
    for batch in stream(dataset, batch_size=_BATCH, shuffle=True, prefetch=_PREFETCH):
        _ = batch.uid, batch.ctf, batch.pose  # columns are gathered when they are asked for
        peak = max(peak, anonymous_bytes())
    return peak - start


if __name__ == "__main__":
    print(growth(sys.argv[1]))
