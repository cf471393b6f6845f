"""The plan of an export: independent units of particles, where each goes, and a fingerprint of all that decides what is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..dataset import ParticleDataset
from ..errors import ArgumentError, MissingStackError
from ..zarr_store import is_url
from .place import Place, WrittenFile
from .state import UnitRecord

#: Rows of a column that are hashed at a time.
_HASHED = 1 << 16

#: Told of images and bytes as they are written.
Advance = Callable[[int, int], object]


class Format(Protocol):
    """One kind of output: how its units and the files around them are written.

    Attributes
    ----------
    kind : its name
    unit_images : particles in each unit but the last
    seal : the file that is written last of all and makes the export whole
    """

    kind: str
    seal: str

    @property
    def unit_images(self) -> int:
        """Particles in each unit but the last."""

    def settings(self) -> dict[str, Any]:
        """All that decides what is written besides the particles, as plain values."""

    def needed_bytes(self, particles: int) -> int:
        """Bytes that the files of so many particles take at the least."""

    def files(self, unit: int) -> tuple[str, ...]:
        """The files of a unit."""

    def write_unit(self, dataset: ParticleDataset, unit: int, rows: range, place: Place, advance: Advance) -> UnitRecord:
        """Write the files of one unit."""

    def write_rest(self, dataset: ParticleDataset, place: Place) -> list[WrittenFile]:
        """Write what belongs to no unit, but for the seal."""

    def write_seal(self, dataset: ParticleDataset, manifest: dict[str, Any], place: Place) -> None:
        """Write the manifest, for ``read_manifest``, and the file that makes the export whole last."""

    def read_manifest(self, place: Place) -> dict[str, Any] | None:
        """The manifest of a whole export of this kind, or None if there is none."""

    def leftovers(self, place: Place) -> list[str]:
        """Files and folders in the target that belong to an export of this kind, or, where nothing else may be there, to none."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes. Pickles without images, so that workers elsewhere can run its units.

    Attributes
    ----------
    dataset : the particles, in the order in which they are written
    target : folder or URL
    format : kind of output, with its settings
    about : what ``plan.json`` and the manifest say of it: two plans that differ in it must not share a target
    """

    dataset: ParticleDataset
    target: str
    format: Format
    about: dict[str, Any]

    def __len__(self) -> int:
        """Number of units."""
        return -(-len(self.dataset) // self.format.unit_images)

    @property
    def units(self) -> range:
        """Numbers of the units."""
        return range(len(self))

    def rows(self, unit: int) -> range:
        """The rows of the data set that a unit holds."""
        if unit not in self.units:
            raise ArgumentError(f"There is no unit {unit}: this export has {len(self)}, 0 to {len(self) - 1}.")
        size = self.format.unit_images
        return range(unit * size, min(len(self.dataset), (unit + 1) * size))

    def files(self, unit: int) -> tuple[str, ...]:
        """The files of a unit, below the target."""
        self.rows(unit)
        return self.format.files(unit)

    @property
    def needed_bytes(self) -> int:
        """Bytes that all files together take at the least."""
        return self.format.needed_bytes(len(self.dataset))

    def __repr__(self) -> str:
        return f"ExportPlan({len(self.dataset):,} particles as {self.format.kind} to {self.target}, {len(self)} units)"


def make_plan(dataset: ParticleDataset, target: str | os.PathLike[str], layout: Format) -> ExportPlan:
    """A plan to export particles in a format; nothing is written.

    Raises
    ------
    MissingStackError
        listing input files that are gone
    """
    if len(dataset) == 0:
        raise ArgumentError("There are no particles to export: the selection is empty.")
    from .. import __version__

    place = str(target) if is_url(target) else str(Path(target).expanduser().resolve())
    about = {
        "format": layout.kind,
        "version": __version__,
        "particles": len(dataset),
        "settings": layout.settings(),
        "inputs": fingerprint(dataset),
    }
    return ExportPlan(dataset, place, layout, about)


def fingerprint(dataset: ParticleDataset) -> dict[str, Any]:
    """What tells one set of inputs from another: paths, sizes and modification times of the files, and the columns of the table."""
    particles = dataset.particles
    files = input_files(dataset)
    columns = hashlib.blake2b(digest_size=16)
    for name, column in sorted(particles.columns().items()):
        columns.update(f"{name} {column.dtype} {column.shape}".encode())
        for start in range(0, len(column), _HASHED):
            columns.update(np.ascontiguousarray(column[start : start + _HASHED]).view(np.uint8).data)
    state = hashlib.blake2b(digest_size=16)
    gone = []
    for path in files:
        try:
            status = None if is_url(path) else os.stat(path)
        except FileNotFoundError:
            gone.append(path)
            continue
        seen = "" if status is None else f"{status.st_size} {status.st_mtime_ns}"
        state.update(os.fsencode(f"{path}\0{seen}\n"))
    if gone:
        raise MissingStackError("\n".join([f"{len(gone)} of {len(files)} stacks are gone:", *(f"  {path}" for path in gone)]))
    kind = type(dataset).__name__
    return {
        "kind": kind,
        "files": len(files),
        "table": columns.hexdigest(),
        "stacks": state.hexdigest(),
        "pixel_size_A": dataset.pixel_size,
    }


def input_files(dataset: ParticleDataset) -> list[str]:
    """The files that hold the images of a data set."""
    particles = dataset.particles
    return [particles.paths[number] for number in np.flatnonzero(np.bincount(particles.file)).tolist()]


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between the plan of an export that is there and another plan, in words."""
    meaning = {
        "inputs.table": "the particles or their order, optics or poses",
        "inputs.stacks": "the input stacks (their paths, sizes or modification times)",
    }
    told = []
    # The program's version is told, but another one that writes the same layout may go on.
    for name in sorted({*_flat(there), *_flat(here)} - {"version", "clearing"}):
        old, new = _flat(there).get(name), _flat(here).get(name)
        if old != new:
            told.append(f"{meaning[name]} differ" if name in meaning else f"{name} is {old!r} there and {new!r} here")
    return told


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
