"""The plan of an export: independent units of particles, where each goes, and a fingerprint of all that decides what is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from ..dataset import ParticleDataset
from ..errors import ArgumentError, ExportError
from ..fingerprint import fingerprint, fingerprint_of_names
from ..on_disk import expanded
from ..zarr_store import is_url
from .place import Place, WrittenFile
from .state import Manifest, UnitRecord, to_bytes

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

    def write_seal(self, dataset: ParticleDataset, manifest: Manifest, place: Place) -> None:
        """Write the manifest, for ``read_manifest``, and the file that makes the export whole last."""

    def mend_seal(self, dataset: ParticleDataset, manifest: Manifest, place: Place) -> None:
        """Write the seal of a whole export, which has this manifest, once more if it is damaged."""

    def read_manifest(self, place: Place) -> Manifest | None:
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

    @cached_property
    def about_bytes(self) -> bytes:
        """What ``plan.json`` holds while this plan is at work."""
        return to_bytes(self.about)

    def __repr__(self) -> str:
        return f"ExportPlan({len(self.dataset):,} particles as {self.format.kind} to {self.target}, {len(self)} units)"


def make_plan(dataset: ParticleDataset, target: str | os.PathLike[str], layout: Format) -> ExportPlan:
    """A plan to export particles in a format; nothing is written.

    Raises
    ------
    ExportError
        if no folder can be meant by the target
    MissingStackError
        listing input files that are gone
    """
    if len(dataset) == 0:
        raise ArgumentError("There are no particles to export: the selection is empty.")
    from .. import __version__

    if os.fspath(target).startswith("local://"):  # fsspec would make no folders in it
        raise ArgumentError(f"{os.fspath(target)} is a local folder; pass its path without local:// in front.")
    try:
        place = str(target) if is_url(target) else str(expanded(target).resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ExportError(f"{os.fspath(target)} cannot be found: {error}; choose another place.") from error
    about = {
        "format": layout.kind,
        "version": __version__,
        "particles": len(dataset),
        "settings": layout.settings(),
        "inputs": fingerprint(dataset),
        "names": fingerprint_of_names(dataset.particles),
    }
    return ExportPlan(dataset, place, layout, about)
