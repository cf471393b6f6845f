"""``ParticleDataset``: a lazy ``torch.utils.data.Dataset`` over ``Particles``, read in batches into one buffer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batch import Particle, ParticleBatch, single_row
from .columns import Columns, torch_dtype
from .errors import ArgumentError, TableError
from .particles import Particles, Selection, choose_rows, resolve_rows, shortest
from .repeated import once
from .stacks import Images, ImageSource

_INT64 = np.dtype(np.int64)


class ParticleDataset(Dataset[Particle]):
    """Particles of one box and pixel size with their images, which stay on disk until they are asked for.

    Item i is row i of ``particles``. ``ds[i]`` is a lazy ``Particle``, ``ds[3:9]`` a smaller data set, ``ds[[4, 1, 7]]`` a
    ``ParticleBatch``. A plain ``DataLoader(ds, batch_size=32, shuffle=True)`` gives a ``ParticleBatch`` each time, read in one
    call; so do ``Subset``, ``random_split`` and ``ConcatDataset`` of such data sets. Pickles without open files.

    Parameters
    ----------
    particles : the table; every row has to have the same box and pixel size
    source : where the images are
    select : which rows to take (mask, row numbers, slice, or a function of the particles), before that is checked

    Raises
    ------
    MixedParticlesError
        if boxes or pixel sizes differ; names the groups and how to select one
    TableError
        if a pixel size is not known
    """

    #: Files, besides those of the images, that its columns are read from.
    tables: tuple[str, ...] = ()

    def __init__(self, particles: Particles, source: ImageSource, *, select: Selection = None) -> None:
        self._particles = particles if select is None else particles[choose_rows(select, particles)]
        if len(self.particles) == 0:
            raise ArgumentError(f"select= leaves none of the {len(particles)} particles")
        if np.isnan(once(self.particles.pixel_size)).any():
            unknown = np.isnan(self.particles.pixel_size).sum()
            raise TableError(
                f"The pixel size of {unknown} of {len(self)} particles is not known: neither blob/psize_A of their table nor the stack "
                "headers that were read say it. Pass pixel_size= in angstrom, or leave them out with select=."
            )
        self.source = source
        self._located: Images | None = None
        #: The dtype in which images are read: that of the files.
        self.dtype: torch.dtype = torch_dtype(source.dtype)
        self.box: int = int(self.particles.one_value("box"))
        self.pixel_size: float = float(shortest(self.particles.one_value("pixel_size")))

    @property
    def particles(self) -> Particles:
        """The table; ``ParticleDataset(others, dataset.source)`` is a data set of another one over the same files."""
        # Not to be exchanged: where the images of these lie was found out once.
        return self._particles

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.box * self.box * self.source.dtype.itemsize

    def __len__(self) -> int:
        return len(self.particles)

    def __getitem__(self, key: Any) -> Any:
        """A particle (int), a data set (slice), or a batch (list, array or tensor of row numbers, or a mask)."""
        row = single_row(key, len(self))
        if row is not None:
            return Particle(self, row)
        return self.select(key) if isinstance(key, slice) else self.batch(key)

    def __getitems__(self, indices: Sequence[int]) -> ParticleBatch:
        """What ``DataLoader`` calls with the row numbers of a whole batch."""
        return self.batch(indices)

    def read(self, indices: Selection, out: Tensor | None = None) -> Tensor:
        """Read images in one call.

        Parameters
        ----------
        indices : row numbers (negative ones count from the end), a mask or a slice
        out : (B, H, W) contiguous CPU tensor in the dtype of the files, to be filled; a new one if not given

        Returns
        -------
        (B, H, W) tensor in the dtype of the files, in the order of ``indices``

        Raises
        ------
        RowIndexError
            if a row is out of range
        ArgumentError
            if ``out`` does not fit
        """
        plain = type(indices) is np.ndarray and indices.dtype is _INT64 and indices.ndim == 1
        try:
            return self.read_rows(indices if plain else resolve_rows(indices, len(self), self.particles), out)
        except IndexError:
            # Looking the rows up is the fastest check of them; what is wrong with which is found out here.
            resolve_rows(indices, len(self), self.particles)
            raise

    def batch(self, indices: Selection) -> ParticleBatch:
        """The same as ``read`` with everything known about each particle."""
        rows = resolve_rows(indices, len(self), self.particles)
        return self.batch_of(rows, self.read_rows(rows))

    def describe(self, rows: Sequence[int]) -> ParticleBatch:
        """The same as ``batch`` without reading: the images are on torch's "meta" device, which holds no pixels."""
        chosen = resolve_rows(rows, len(self), self.particles)
        return self.batch_of(chosen, torch.empty((len(chosen), self.box, self.box), dtype=self.dtype, device="meta"))

    def batch_of(self, rows: np.ndarray, images: Tensor) -> ParticleBatch:
        """Images that were read for these rows (int64, none negative), with their columns."""
        return ParticleBatch(images, self.pixel_size, Columns(partial(_gather, self.particles, rows)))

    def in_memory(self, rows: np.ndarray) -> bool:
        """Whether there is nothing to be asked for ahead of reading these rows (int64, none negative), as far as a look can tell."""
        return self._images().in_memory(rows)

    def ask_ahead(self, rows: np.ndarray) -> bool:
        """Start to bring the images of these rows (int64, none negative) into the page cache; False if they were there."""
        return self._images().ask_ahead(rows)

    def select(self, selection: Selection) -> Self:
        """A data set of the chosen rows (mask, row numbers, slice, or a function of ``particles``) over the same files."""
        chosen = copy.copy(self)
        chosen._particles = self.particles[choose_rows(selection, self.particles)]
        chosen._located = None
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_located": None}

    def read_rows(self, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """The same as ``read`` for row numbers that are int64 and in range, as a sampler gives them."""
        shape, dtype = (len(rows), self.box, self.box), self.dtype
        if out is None:
            out = torch.empty(shape, dtype=dtype, device="cpu")
        elif not isinstance(out, Tensor):
            raise ArgumentError(f"out has to be a tensor, such as torch.from_numpy(array), not a {type(out).__name__}")
        elif out.shape != shape or out.dtype != dtype or not out.is_cpu or not out.is_contiguous() or out.requires_grad:
            given = f"{out.dtype} {tuple(out.shape)} on {out.device}{', which needs a gradient' if out.requires_grad else ''}"
            raise ArgumentError(f"out has to be a contiguous {dtype} CPU tensor of shape {shape}, not {given}")
        images = self._located or self._images()
        images.reading(rows, images.target(out.numpy()))()
        return out

    def places(self, rows: np.ndarray) -> Iterable[Tensor | None]:
        """What ``reading`` takes as the places of each of some batches, (batches, size) of int64 in range: found out for all at once."""
        return self._images().places(rows)

    def target(self, out: np.ndarray) -> Any:
        """Memory for (B, H, W) images, contiguous, in the dtype of the files, as ``reading`` takes it."""
        return self._images().target(out)

    def reading(self, rows: np.ndarray, target: Any, places: Tensor | None = None) -> Callable[[], object]:
        """What is left to be called to read these rows (int64, in range) into a target for as many."""
        return (self._located or self._images()).reading(rows, target, places)

    def view_rows(self, rows: np.ndarray) -> Tensor | None:
        """The images of these rows (int64, none negative) without a copy, for reading only.

        None where they do not lie one after the other in mapped files. Writing into the tensor ends the process.
        """
        return (self._located or self._images()).view(rows)

    def _images(self) -> Images:
        if self._located is None:
            self._located = self.source.locate(self.particles.file, self.particles.slice)
        return self._located

    def __repr__(self) -> str:
        particles = self.particles
        size = len(self) * self.image_bytes
        lines = [
            f"{type(self).__name__}: {len(self):,} particles in {len(np.unique(particles.file)):,} files",
            f"  images     {self.box} x {self.box} px, {self.pixel_size:g} A/pixel, {self.source.dtype}, {human_bytes(size)} in all",
            f"  optics     {_describe_optics(particles)}",
            f"  poses      {_describe_poses(particles)}",
            f"  first file {particles.paths[int(particles.file[0])] if len(self) else '-'}",
        ]
        return "\n".join(lines)


def _gather(particles: Particles, rows: np.ndarray) -> dict[str, Tensor]:
    """The columns that travel in a batch."""
    optics = [] if particles.ctf is None else particles.ctf.items()
    columns = {"pose": particles.pose, "shift_A": particles.shift_A} | {f"ctf/{name}": column for name, column in optics}
    gathered = {name: torch.from_numpy(column[rows]) for name, column in columns.items() if column is not None}
    return {"index": torch.from_numpy(rows), "uid": torch.from_numpy(particles.uid[rows].view(np.int64))} | gathered


def human_bytes(size: float) -> str:
    """A number of bytes in the unit that reads best."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _describe_optics(particles: Particles) -> str:
    ctf = particles.ctf
    if ctf is None or len(particles) == 0:
        return "none"
    parts = []
    if ctf.exposure_group is not None:
        parts.append(f"{len(np.unique(ctf.exposure_group))} exposure groups")
    if ctf.voltage_kv is not None:
        parts.append("/".join(f"{v:g}" for v in np.unique(ctf.voltage_kv)) + " kV")
    if ctf.defocus_u is not None:
        parts.append(f"defocus {ctf.defocus_u.min() / 1e4:.2f} to {ctf.defocus_u.max() / 1e4:.2f} um")
    return ", ".join(parts) or "incomplete"


def _describe_poses(particles: Particles) -> str:
    present = [name for name in ("pose", "shift_A", "half_set") if getattr(particles, name) is not None]
    return ", ".join(present) or "none"
