"""MRC stacks with a CryoSPARC table and a RELION star file that point at them, so that particles go back where they came from."""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import integer
from ..cryosparc.write import save_table, table_of
from ..dataset import ParticleDataset
from ..errors import ArgumentError, TableError
from ..memory import kept_tensor
from ..mrc import HEADER_BYTES
from ..particles import Particles
from ..relion import optics_block, particle_block, require_starfile, star_optics, write_star
from ..transforms import Downsample
from ..transforms.downsample import cache_sized_groups
from .folder import FolderFormat
from .pixels import Contrast, Pixels, warn_of_dark_particles
from .place import Place, WrittenFile
from .plan import Advance, ExportPlan, make_plan
from .run import run
from .state import UnitRecord

if TYPE_CHECKING:
    from distributed import Client

_MODES = {"int8": 0, "int16": 1, "float32": 2, "uint16": 6, "float16": 12}


def export_mrc(
    dataset: ParticleDataset,
    folder: str | os.PathLike[str],
    *,
    downsample: Downsample | None = None,
    dtype: str | torch.dtype | None = None,
    contrast: Contrast = "stored",
    batch_size: int = 1024,
    star: bool = True,
    overwrite: bool = False,
    executor: Client | str | None = None,
    progress: bool | None = None,
) -> Path:
    """Write the particles, in the order of the data set, as MRC stacks with the tables that point at them.

    ``particles/stack_NNNNNN.mrcs`` are the images, ``particles.cs`` is a CryoSPARC table and ``particles.star`` one for RELION 3.1
    and later. Uids, optics, poses and half sets are kept; box, pixel size, paths and shifts are those of the new images, whose centre
    pooling moves (``Downsample.centre_offset``). Paths are relative to the tables (with a leading ">" in the ``.cs``). ``export.json``
    comes last: where it is, all is whole. Until then the same call continues a run that was stopped.

    A pose of a 2-D alignment is written as that of a 3-D one, a rotation about the viewing axis. Columns that this package makes
    nothing of (``location/*``, ``pick_stats/*``) are not written.

    Parameters
    ----------
    dataset : the particles
    folder : where it all goes
    downsample : how to make the images smaller
    dtype : "float16" (MRC mode 12) or "float32"; by default that of the files, or float32 after downsampling
    contrast : "positive" multiplies the images of dark particles (``blob/sign`` of -1) by -1, as RELION wants them
    batch_size : images per stack
    star : write ``particles.star`` (extra ``star``), for which the optics have to be known
    overwrite : replace the export that is in ``folder``
    executor : a ``dask.distributed.Client`` or the address of a scheduler, whose workers write the stacks
    progress : show a progress bar; by default on a terminal only

    Returns
    -------
    The path of ``particles.cs``.

    Raises
    ------
    TableError
        if a star file is asked for and the optics are not known
    ExportExistsError
        if another export, or files with such names, are in ``folder``
    ExportError
        if another run is at work there, the disk is too small, or a file cannot be written
    """
    plan = plan_mrc(dataset, folder, downsample=downsample, dtype=dtype, contrast=contrast, batch_size=batch_size, star=star)
    run(plan, overwrite=overwrite, executor=executor, progress=progress)
    return Path(plan.target) / "particles.cs"


def plan_mrc(
    dataset: ParticleDataset,
    folder: str | os.PathLike[str],
    *,
    downsample: Downsample | None = None,
    dtype: str | torch.dtype | None = None,
    contrast: Contrast = "stored",
    batch_size: int = 1024,
    star: bool = True,
) -> ExportPlan:
    """A plan to write MRC stacks, see ``export_mrc``; what cannot be exported is found out here."""
    batch_size = integer("batch_size", batch_size, least=1)
    pixels = Pixels.of(dataset, downsample=downsample, dtype=dtype, contrast=contrast)
    if dtype is None and pixels.dtype not in _MODES:  # 8-bit pixels without a sign
        pixels = Pixels.of(dataset, downsample=downsample, dtype="float32", contrast=contrast)
    if pixels.dtype not in _MODES:
        raise ArgumentError(f"MRC stacks hold float16 or float32 pixels, not {pixels.dtype}")
    plan = make_plan(dataset, folder, MrcFormat(pixels, batch_size, star))
    if star:
        require_starfile()
        try:
            star_optics(dataset.particles.stretches())
        except TableError as error:
            raise TableError(f"{error} Or pass star=False (--no-star) to write no star file.") from error
        warn_of_dark_particles(dataset, pixels, "RELION")
    return plan


@dataclass(frozen=True)
class MrcFormat(FolderFormat):
    """MRC stacks as the output of an export; a unit is a stack. See ``export_mrc``.

    Attributes
    ----------
    pixels : the images
    unit_images : images per stack
    star : write a star file too
    """

    pixels: Pixels
    unit_images: int
    star: bool

    kind = "mrc"

    def settings(self) -> dict[str, Any]:
        """See ``Format``."""
        return self.pixels.settings() | self.pixels.recentring() | {"stack": self.unit_images, "star": self.star}

    def needed_bytes(self, particles: int) -> int:
        """See ``Format``."""
        return particles * self.pixels.image_bytes

    def files(self, unit: int) -> tuple[str, ...]:
        """See ``Format``."""
        return (f"particles/stack_{unit:06d}.mrcs",)

    def write_unit(self, dataset: ParticleDataset, unit: int, rows: range, place: Place, advance: Advance) -> UnitRecord:
        """See ``Format``."""
        statistics, notes = _Statistics(), Counter[str]()
        room = HEADER_BYTES + self.needed_bytes(len(rows))
        with place.create(self.files(unit)[0], head_bytes=HEADER_BYTES, room=room) as file:
            for images in self.pixels.pieces(dataset, rows, notes):
                statistics.add(images)
                file.write(images.numpy())
                advance(len(images), images.numpy().nbytes)
            file.write_head(_header(self.pixels, len(rows), statistics))
        return UnitRecord(unit, (file.written,), dict(notes))

    def write_rest(self, dataset: ParticleDataset, place: Place) -> list[WrittenFile]:
        """See ``Format``."""
        names = [self.files(unit)[0] for unit in range(-(-len(dataset) // self.unit_images))]
        # With a leading ">" CryoSPARC takes a path from the folder of its table on.
        paths = [f">{name}" for name in names]
        box, pixel_size = self.pixels.box, self.pixels.pixel_size
        tables = (
            table_of(part, paths=paths, file=stack, image=image, box=box, pixel_size=pixel_size)
            for part, stack, image in self._placed(dataset)
        )
        with place.create("particles.cs") as file:
            save_table(tables, len(dataset), file)
        files = [file.written]
        if self.star:
            groups = star_optics(dataset.particles.stretches())
            pieces = (
                particle_block(part, groups, image_names=_image_names(names, stack, image)) for part, stack, image in self._placed(dataset)
            )
            with place.create("particles.star") as file:
                write_star({"optics": optics_block(groups, box=box, pixel_size=pixel_size), "particles": pieces}, file)
            files.append(file.written)
        return files

    def _placed(self, dataset: ParticleDataset) -> Iterator[tuple[Particles, np.ndarray, np.ndarray]]:
        """All particles as they are in the new images, stretch by stretch, and the new stack of each and its place in there."""
        start = 0
        for part in dataset.particles.stretches():
            yield self.pixels.as_written(part), *np.divmod(np.arange(start, start + len(part)), self.unit_images)
            start += len(part)


def _image_names(files: list[str], stack: np.ndarray, image: np.ndarray) -> list[str]:
    """As RELION writes them."""
    return [f"{z + 1:06d}@{files[k]}" for k, z in zip(stack.tolist(), image.tolist(), strict=True)]


class _Statistics:
    """Smallest, largest and mean pixel and the deviation from the mean, over pieces."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._middle = 0.0  # near the mean: squares of the distance from it lose no digits
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, images: Tensor) -> None:
        """Take in a piece."""
        flat = images.flatten(1)
        for group in cache_sized_groups(flat):
            self._add(flat[group].to(torch.float32))

    def _add(self, pixels: Tensor) -> None:
        self.low, self.high = min(self.low, float(pixels.amin())), max(self.high, float(pixels.amax()))
        if not self._count:
            self._middle = float(pixels[0].mean())
        # In memory that is kept: what many threads ask for and give back adds up.
        away = torch.sub(pixels, self._middle, out=kept_tensor("distances", pixels.shape, pixels.dtype))
        self._count += pixels.numel()
        # In double precision, and not of ``away``: mrcfile.validate wants two digits even of a mean that is little but rounding.
        self._sum += float(pixels.sum(dtype=torch.float64))
        # In single precision within an image, double between images.
        self._squares += float(torch.linalg.vecdot(away, away).double().sum())

    @property
    def mean(self) -> float:
        """Mean pixel."""
        return self._sum / self._count

    @property
    def rms(self) -> float:
        """Root mean square deviation from the mean."""
        away = self.mean - self._middle
        return math.sqrt(max(0.0, self._squares / self._count - away * away))


_LABEL = b"cryolike_data"


def _header(pixels: Pixels, count: int, statistics: _Statistics) -> bytes:
    """The header of a stack of images (MRC2014: https://www.ccpem.ac.uk/mrc_format/mrc2014.php)."""
    header = bytearray(HEADER_BYTES)
    struct.pack_into("<4i", header, 0, pixels.box, pixels.box, count, _MODES[pixels.dtype])
    # A stack of images, not a volume: one section in the cell, and space group 0.
    struct.pack_into("<3i", header, 28, pixels.box, pixels.box, 1)
    side = pixels.box * pixels.pixel_size
    struct.pack_into("<6f", header, 40, side, side, pixels.pixel_size, 90, 90, 90)
    struct.pack_into("<3i", header, 64, 1, 2, 3)
    low, high, mean, rms = _told_statistics(pixels, statistics)
    struct.pack_into("<3f", header, 76, low, high, mean)
    struct.pack_into("<i", header, 108, 20141)
    header[208:216] = b"MAP \x44\x44\0\0"
    struct.pack_into("<fi", header, 216, rms, 1)
    header[224 : 224 + len(_LABEL)] = _LABEL
    return bytes(header)


def _told_statistics(pixels: Pixels, statistics: _Statistics) -> tuple[float, float, float, float]:
    """Smallest, largest and mean pixel and deviation as a header tells them; MRC2014 has values that mean "not determined"."""
    found = statistics.low, statistics.high, statistics.mean, statistics.rms
    if not all(map(math.isfinite, found)):
        return 0, -1, -2, -1
    # mrcfile.validate compares the deviation with one that it sums up in float16, which overflows.
    return (*found[:3], -1) if pixels.dtype == "float16" else found
