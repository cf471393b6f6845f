"""Exports into a folder that may hold other things too: which files are theirs, and the manifest that makes them whole."""

from __future__ import annotations

from ..dataset import ParticleDataset
from ..errors import ExportError, ExportExistsError
from ..on_disk import is_file
from .place import LocalPlace, Place
from .state import Manifest, read_json, read_plan, write_json

#: The last file of an export: what it was made of, and size and checksum of each of its files.
MANIFEST = "export.json"
#: Names, by the format, that belong to an export and to nobody else.
_OWN = {
    "cryolike": (
        *("phys/particles_*_stack_*.*", "fft/particles_*_stack_*.*", "plots/*_stack_*.png"),
        *("phys/image_descriptor.npz", "fft/image_descriptor.npz"),
    ),
    "mrc": ("particles/stack_*.mrcs", "particles.cs", "particles.star"),
}


class FolderFormat:
    """What formats share whose files lie in a folder beside those of others: how they are sealed, found and told apart. See ``Format``."""

    kind: str
    seal = MANIFEST

    def write_seal(self, dataset: ParticleDataset, manifest: Manifest, place: Place) -> None:
        """See ``Format``."""
        write_json(place, MANIFEST, manifest.to_json())

    def mend_seal(self, dataset: ParticleDataset, manifest: Manifest, place: Place) -> None:
        """See ``Format``: a seal that holds its manifest is whole."""

    def read_manifest(self, place: Place) -> Manifest | None:
        """See ``Format``."""
        return Manifest.from_json(read_json(place, MANIFEST))

    def leftovers(self, place: Place) -> list[str]:
        """See ``Format``: files with names of the kind that is to be written, or of the one that is there."""
        if not isinstance(place, LocalPlace):
            raise ExportError("Only Zarr stores can be written to a URL; choose a folder.")
        root = place.root
        if root.exists() and not root.is_dir():
            raise ExportError(f"{root} is a file; choose a folder.")
        manifest = self.read_manifest(place)
        kinds = {self.kind, *(str(plan["format"]) for plan in (manifest and manifest.about, read_plan(place)) if plan)}
        if "zarr" in kinds or (root / "zarr.json").is_file():
            raise ExportExistsError(f"{root} holds a Zarr store; choose another folder.")
        own = [pattern for known in kinds for pattern in _OWN.get(known, ())]
        found = {path.relative_to(root).as_posix() for pattern in own for path in root.glob(pattern) if is_file(path)}
        found |= {MANIFEST} if (root / MANIFEST).exists() else set()  # it may be anybody's
        if manifest is not None:
            named = {file.name for record in manifest.units for file in record.files}
            found |= {name for name in named if is_file(root / name)}
        return sorted(found)
