"""``ParticleBatch``: the images of some particles with everything known about each, row by row."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .arguments import SAME, device_here
from .columns import Columns, concatenate, concatenate_tensors, rows_of
from .ctf import Ctf
from .errors import ArgumentError, MixedParticlesError, RowIndexError
from .particles import resolve_rows


@dataclass(frozen=True, eq=False, repr=False)
class ParticleBatch:
    """A batch of particles; all tensors share the first axis.

    ``index``, ``uid``, ``ctf``, ``pose`` and ``shift_A`` are gathered from the table when the first of them is asked for.

    Attributes
    ----------
    images : (B, H, W) tensor, rows are y and columns are x
    pixel_size : pixel size of these images, angstrom
    columns : what is known about each particle, by name
    pending : work that is left for the main process (see ``Collate``); ``finish()`` does it
    """

    images: Tensor
    pixel_size: float
    columns: Columns
    pending: Callable[[ParticleBatch], ParticleBatch] | None = None

    @property
    def index(self) -> Tensor:
        """(B,) int64, row of each particle in the data set it came from."""
        return self.columns.tensors["index"]

    @property
    def uid(self) -> Tensor:
        """(B,) int64 bit view of CryoSPARC's uint64 uid; ``batch.uid.numpy().view("uint64")`` gives it back."""
        return self.columns.tensors["uid"]

    @property
    def ctf(self) -> Ctf[Tensor] | None:
        """Optics as (B, ...) tensors, or None where the table has no ctf columns."""
        return self.columns.ctf

    @property
    def pose(self) -> Tensor | None:
        """(B, 3) rotation vectors taking the particle frame to the volume frame, radian, or None."""
        return self.columns.tensors.get("pose")

    @property
    def shift_A(self) -> Tensor | None:
        """(B, 2) translation (x, y) to apply to the image to centre the particle, angstrom, or None."""
        return self.columns.tensors.get("shift_A")

    @property
    def shift(self) -> Tensor | None:
        """The same as ``shift_A``."""
        return self.shift_A

    @property
    def box(self) -> int:
        """Box size, pixels."""
        return int(self.images.shape[-1])

    @property
    def device(self) -> torch.device:
        """The device of the images."""
        return self.images.device

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def __iter__(self) -> Iterator[Particle]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        """One particle for an integer; a smaller batch for a slice (which shares memory), a mask, or row numbers.

        Raises
        ------
        RowIndexError
            if a row is out of range or a mask has the wrong length
        """
        row = single_row(key, len(self))
        if row is not None:
            return Particle(self, row)
        forwards = isinstance(key, slice) and (key.step is None or key.step > 0)
        return self.map(lambda tensor: tensor[key]) if forwards else self.batch(key)

    def batch(self, rows: Any) -> ParticleBatch:
        """The given rows (numbers, or a mask) as a batch of their own (the same call as ``ParticleDataset.batch``)."""
        chosen = torch.from_numpy(resolve_rows(rows, len(self))).to(self.device)
        return self.map(lambda tensor: rows_of(tensor, chosen))

    def describe(self, rows: Sequence[int]) -> ParticleBatch:
        """The same as ``batch``; a data set has this to give columns without reading images."""
        return self.batch(rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A batch with ``function`` applied to every tensor in it."""
        return self.map_images(function, self.columns.map(function))

    def map_images(self, function: Callable[[Tensor], Tensor], columns: Columns) -> Self:
        """A batch with ``function`` applied to the images and to what was computed of them, and other columns."""
        return replace(self, images=function(self.images), columns=columns)

    def to(self, device: torch.device | str | None = None, *, non_blocking: bool = False) -> Self:
        """The batch on another device; dtypes stay as they are. ArgumentError if there is no such device."""
        if device is None or device_here(device) == self.device:
            return self
        columns = self.columns.to(device, non_blocking=non_blocking)
        return self.map_images(lambda tensor: tensor.to(device=device, non_blocking=non_blocking), columns)

    def pin_memory(self) -> ParticleBatch:
        """The batch in page-locked memory (``DataLoader(pin_memory=True)`` calls this)."""
        return self.map(lambda tensor: tensor.pin_memory())

    def joined(self, parts: Sequence[Self]) -> Self:
        """The rows of several batches, this one and others like it, one after the other."""
        images = concatenate_tensors([part.images for part in parts])
        return replace(self, images=images, columns=concatenate([part.columns for part in parts]))

    def finish(self) -> ParticleBatch:
        """Do what a ``Collate`` in a worker process left for the main process; the batch itself where nothing is left."""
        return self if self.pending is None else self.pending(replace(self, pending=None))

    def __repr__(self) -> str:
        shape = " x ".join(str(n) for n in self.images.shape)
        groups = {name.split("/")[0] for name in self.columns.names}
        known = [name for name in ("ctf", "pose", "shift_A") if name in groups]
        left = ", unfinished: call .finish()" if self.pending is not None else ""
        return (
            f"ParticleBatch({shape} {str(self.images.dtype).removeprefix('torch.')} on {self.device}, "
            f"{self.pixel_size:.4g} A/pixel, with {', '.join(known) or 'no optics or poses'}{left})"
        )


class Particle:
    """One particle of a data set or batch. It reads nothing until a property is asked for.

    A list of particles collates through one batched read, which is how a plain ``DataLoader`` stays fast.

    Attributes
    ----------
    uid, ctf, pose, shift_A, shift : as in ``ParticleBatch``, without the first axis
    pixel_size, box : of the image, angstrom and pixels
    """

    __slots__ = ("row", "source")
    uid: Tensor
    ctf: Ctf[Tensor] | None
    pose: Tensor | None
    shift_A: Tensor | None
    shift: Tensor | None
    pixel_size: float
    box: int

    def __init__(self, source: Any, row: int) -> None:
        self.source = source
        self.row = row

    @property
    def batch(self) -> ParticleBatch:
        """The particle as a batch of one."""
        one: ParticleBatch = self.source.batch([self.row])
        return one

    @property
    def image(self) -> Tensor:
        """(H, W) image in the dtype of the file."""
        return self.batch.images[0]

    @property
    def index(self) -> int:
        """Row in the data set."""
        return int(self.batch.index[0]) if isinstance(self.source, ParticleBatch) else self.row

    def __getattr__(self, name: str) -> Any:
        if name in Particle.__annotations__:
            value = getattr(self.source.describe([self.row]), name)
            if isinstance(value, Tensor):
                return value[0]
            return value.map(lambda tensor: tensor[0]) if isinstance(value, Ctf) else value
        raise AttributeError(f"a Particle has no {name!r}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *Particle.__annotations__]

    def __reduce__(self) -> tuple[type[Particle], tuple[ParticleBatch, int]]:
        # Another process gets the particle itself, not the data set that it comes from.
        return Particle, (self.batch, 0)

    def __repr__(self) -> str:
        source = type(self.source).__name__
        article = "an" if source[0] in "AEIOU" else "a"
        return f"Particle({self.row} of the {len(self.source)} in {article} {source}, {self.box} px of {self.pixel_size:.4g} A)"


def merge_particles(items: Sequence[Particle] | ParticleBatch) -> ParticleBatch:
    """One batch from what a ``DataLoader`` hands to a collate function, in its order.

    Particles of one data set are read in one call; a ``ConcatDataset`` costs one call per data set.

    Raises
    ------
    MixedParticlesError
        if the data sets differ in box size, pixel size or in which columns they have
    ArgumentError
        if they are no particles
    """
    if isinstance(items, ParticleBatch):
        return items
    if isinstance(items, Particle):
        raise ArgumentError("A batch is made of a list of particles, such as [particle], and not of one.")
    items = list(items)
    others = sorted({type(item).__name__ for item in items if not isinstance(item, Particle)})
    if others or not items:
        raise ArgumentError(
            f"A batch is made of particles, such as dataset[0], and not of {', '.join(others) or 'none at all'}. Where something "
            "else comes with each particle, collate the particles alone: collate([particle for particle, label in items])."
        )
    of_source: dict[int, list[int]] = {}
    for position, item in enumerate(items):
        of_source.setdefault(id(item.source), []).append(position)
    parts = [items[positions[0]].source.batch([items[p].row for p in positions]) for positions in of_source.values()]
    if len(parts) == 1:
        only: ParticleBatch = parts[0]
        return only
    order = torch.as_tensor([p for positions in of_source.values() for p in positions], device="cpu").argsort()
    return _concatenate(parts).map(lambda tensor: rows_of(tensor, order))


def single_row(key: Any, n: int) -> int | None:
    """The row (not negative) that an integer of any kind names among ``n``, or None for a key that is no single integer.

    Raises
    ------
    RowIndexError
        if it is out of range
    """
    if isinstance(key, bool | np.bool_) or getattr(key, "ndim", 0) != 0 or getattr(key, "dtype", None) == torch.bool:
        return None
    try:
        number = operator.index(key)
    except TypeError:
        return None
    if not -n <= number < n:
        raise RowIndexError(f"particle {number} is out of range: there are {n}")
    return number + n if number < 0 else number


def _concatenate(parts: list[ParticleBatch]) -> ParticleBatch:
    kinds = list(dict.fromkeys((tuple(p.images.shape[1:]), p.columns.names, p.pixel_size) for p in parts))
    *first, pixel_size = kinds[0]
    if any([*kind[:2]] != first or not math.isclose(kind[2], pixel_size, rel_tol=SAME) for kind in kinds):
        told = "\n".join(f"  {shape[-1]} px, {size} A/pixel, columns {', '.join(names)}" for shape, names, size in sorted(kinds))
        raise MixedParticlesError(f"These data sets cannot share a batch:\n{told}\nUse one DataLoader for each kind.")
    if len({type(part) for part in parts}) > 1:
        raise MixedParticlesError("Batches with polar transforms and without them cannot share a batch; use one DataLoader for each.")
    return parts[0].joined(parts)


def _register_default_collate() -> None:
    """Teach torch's own collate function our items, so that a plain ``DataLoader`` gives a ``ParticleBatch``."""
    from torch.utils.data._utils.collate import default_collate_fn_map

    def collate(batch: Any, *, collate_fn_map: Any = None) -> ParticleBatch:
        return merge_particles(batch)

    default_collate_fn_map[Particle] = collate


_register_default_collate()
