"""A Zarr v3 store of particles: images in large shards, one array per column, units and provenance beside them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from ..arguments import integer
from ..dataset import ParticleDataset
from ..errors import ArgumentError, ExportExistsError
from ..shard import index_bytes
from ..transforms import Downsample
from ..zarr_store import FORMAT, is_url
from .pixels import NOT_FINITE, Pixels, rounded
from .place import STATE, LocalPlace, Place, WrittenFile, explained
from .plan import Advance, ExportPlan, make_plan
from .run import run
from .state import PLAN, Manifest, UnitRecord, read_json, read_plan
from .zarr_arrays import Compression, column_array, compressor, encode, group_metadata

if TYPE_CHECKING:
    from distributed import Client

#: An inner chunk is what other readers fetch at a time; a shard is one file, written whole.
_CHUNK_BYTES = 2 << 20
#: Dask makes a task of each, and its schedulers are made for some ten thousand of them.
_CHUNK_IMAGES = 24
SHARD_BYTES = 256 << 20


def export_zarr(
    dataset: ParticleDataset,
    store: str | os.PathLike[str],
    *,
    downsample: Downsample | None = None,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    compression: Compression | None = None,
    keep_bits: int | None = None,
    overwrite: bool = False,
    executor: Client | str | None = None,
    progress: bool | None = None,
) -> Path | str:
    """Write the particles, in the order of the data set, as a Zarr v3 group.

    ``images`` is (N, D, D) in shards; ``uid``, ``row``, ``pose``, ``shift_A``, ``half_set`` and ``sign`` are arrays beside it,
    optics are in the group ``ctf``, and where each image came from is in the group ``source``. Shifts are those of the new images,
    whose centre pooling moves (``Downsample.centre_offset``). Until all of it is there, the store cannot be opened; the same call
    continues a run that was stopped. ``ZarrDataset`` reads the store back; so do zarr-python, xarray and any other reader of Zarr v3.

    Parameters
    ----------
    dataset : the particles
    store : the folder to write, by custom ending in ``.zarr``, or a URL that fsspec or obstore knows (``s3://...``)
    downsample : how to make the images smaller
    dtype : "float16", "float32" or "float64"; by default that of the files, or float32 after downsampling
    shard_bytes : size of one file before compression, about
    compression : "zstd", or "blosc" (zstd over shuffled bits); by default none, because noise does not compress and because only
        uncompressed images are read at the speed of memory
    keep_bits : round floating pixels to so many bits of their mantissa, so that they compress
    overwrite : replace an export that is there
    executor : a ``dask.distributed.Client`` or the address of a scheduler, whose workers write the shards
    progress : show a progress bar; by default on a terminal only

    Returns
    -------
    The path of the store, or its URL.

    Raises
    ------
    ExportExistsError
        if something else is in the place
    ExportError
        if another run is at work there, the disk is too small, or a file cannot be written
    """
    plan = plan_zarr(
        dataset, store, downsample=downsample, dtype=dtype, shard_bytes=shard_bytes, compression=compression, keep_bits=keep_bits
    )
    run(plan, overwrite=overwrite, executor=executor, progress=progress)
    return plan.target if is_url(store) else Path(plan.target)


@dataclass(frozen=True)
class ZarrFormat:
    """A Zarr store as the output of an export; a unit is a shard. See ``export_zarr``.

    Attributes
    ----------
    pixels : the images
    particles : how many
    chunk, unit_images : images per inner chunk and per shard
    compression, keep_bits : see ``export_zarr``
    """

    pixels: Pixels
    particles: int
    chunk: int
    unit_images: int
    compression: Compression | None
    keep_bits: int | None

    kind = "zarr"
    seal = "zarr.json"

    @classmethod
    def of(
        cls,
        dataset: ParticleDataset,
        *,
        downsample: Downsample | None = None,
        dtype: str | torch.dtype | None = None,
        shard_bytes: int = SHARD_BYTES,
        compression: Compression | None = None,
        keep_bits: int | None = None,
    ) -> ZarrFormat:
        """The store that ``export_zarr`` writes with these arguments."""
        pixels = Pixels.of(dataset, downsample=downsample, dtype=dtype)
        if compression is not None and compression not in get_args(Compression):
            raise ArgumentError(f"compression is one of {', '.join(get_args(Compression))}, or None, not {compression!r}")
        keep_bits = None if keep_bits is None else integer("keep_bits", keep_bits)
        kept = np.finfo(pixels.dtype).nmant if np.dtype(pixels.dtype).kind == "f" else 0
        if keep_bits is not None and not kept:
            raise ArgumentError(f"keep_bits rounds floating pixels, and these are {pixels.dtype}: leave it out, or ask for a floating one.")
        if keep_bits is not None and not 1 <= keep_bits <= kept:
            raise ArgumentError(f"keep_bits is from 1 to {kept}, the bits of a {pixels.dtype} mantissa, not {keep_bits}")
        chunk, shard = _sizes(max(1, len(dataset)), pixels.image_bytes, integer("shard_bytes", shard_bytes, least=1))
        return cls(pixels, len(dataset), chunk, shard, compression, keep_bits)

    def settings(self) -> dict[str, Any]:
        """See ``Format``."""
        sizes = {"layout": FORMAT, "chunk": self.chunk, "shard": self.unit_images}
        return self.pixels.settings() | self.pixels.recentring() | sizes | {"compression": self.compression, "keep_bits": self.keep_bits}

    def needed_bytes(self, particles: int) -> int:
        """See ``Format``."""
        return 0 if self.compression is not None else particles * self.pixels.image_bytes

    def files(self, unit: int) -> tuple[str, ...]:
        """See ``Format``."""
        return (f"images/c/{unit}/0/0",)

    def write_unit(self, dataset: ParticleDataset, unit: int, rows: range, place: Place, advance: Advance) -> UnitRecord:
        """See ``Format``."""
        notes = Counter[str]()
        images = self._images(dataset, rows, notes, advance)
        # Encoded before the file is begun: what has not grown for long is taken for abandoned.
        parts = self._packed(images, len(rows)) if self.compression is None else list(self._encoded(images, len(rows)))
        with place.create(self.files(unit)[0], room=self.needed_bytes(len(rows))) as file:
            for part in parts:
                file.write(part)
        return UnitRecord(unit, (file.written,), dict(notes))

    def write_rest(self, dataset: ParticleDataset, place: Place) -> list[WrittenFile]:
        """See ``Format``."""
        made = self._array(self.particles) | {"attributes": {"pixel_size_A": self.pixels.pixel_size}}
        files = [place.write(name, content) for name, content in encode("images", made)]
        columns = self.pixels.as_written(dataset.particles.apart()).columns()
        columns = {name: columns[name] for name in columns if name not in ("box", "pixel_size", "file", "slice")}
        columns |= {"source/file": dataset.particles.file, "source/image": dataset.particles.slice}
        names = list(columns)
        for name in names:
            column = columns.pop(name)  # and let go of with the next one
            files += [place.write(key, content) for key, content in encode(name, column_array(name, column), column)]
        if any(name.startswith("ctf/") for name in names):
            files.append(place.write("ctf/zarr.json", group_metadata({})))
        return files

    def write_seal(self, dataset: ParticleDataset, manifest: Manifest, place: Place) -> None:
        """See ``Format``."""
        particles = dataset.particles
        names = {"paths": list(particles.paths), "blob_paths": None if particles.blob_paths is None else list(particles.blob_paths)}
        place.write("source/zarr.json", group_metadata(names | {"export": manifest.to_json()}))
        place.write(self.seal, group_metadata(self._attributes(dataset, manifest)))

    def mend_seal(self, dataset: ParticleDataset, manifest: Manifest, place: Place) -> None:
        """See ``Format``: others may have added attributes to it, or the metadata of the arrays."""
        content, found = group_metadata(self._attributes(dataset, manifest)), read_json(place, self.seal)
        ours = json.loads(content)
        try:
            whole = found == found | ours | {"attributes": found["attributes"] | ours["attributes"]}
        except (KeyError, TypeError):
            whole = False
        if not whole:
            place.write(self.seal, content)

    def read_manifest(self, place: Place) -> Manifest | None:
        """See ``Format``."""
        if (content := place.read("source/zarr.json")) is None:
            return None
        # Written right before the seal. A run was stopped between the two, or the seal was lost later, when no run was at work.
        if place.read(self.seal) is None and place.read(PLAN) is not None:
            return None
        try:
            found = json.loads(content)["attributes"]["export"]
        except (KeyError, TypeError, ValueError):
            return None
        return Manifest.from_json(found)

    def leftovers(self, place: Place) -> list[str]:
        """See ``Format``: all that is in the place, which has to be a store."""
        if isinstance(place, LocalPlace):
            if place.root.exists() and not place.root.is_dir():
                raise ExportExistsError(f"{place.root} is a file and no store; choose another place.")
            with explained(place.root, "listed"):
                found = set(os.listdir(place.root) if place.root.is_dir() else ())
        else:
            found = set(place.names(""))
        others = found - {STATE}
        # A folder may hold an export of another kind that was stopped, and whatever else its owner put there.
        if others and "zarr.json" not in found and (read_plan(place) or {}).get("format") != self.kind:
            raise ExportExistsError(
                f"{place} holds something that was not written by an export and is never replaced; choose another place."
            )
        return sorted(others)

    def _images(self, dataset: ParticleDataset, rows: range, notes: Counter[str], advance: Advance) -> Iterator[np.ndarray]:
        for images in self.pixels.pieces(dataset, rows, notes):
            pixels = images.numpy()
            if self.keep_bits is not None:
                pixels = rounded(pixels, self.keep_bits, finite=not notes[NOT_FINITE])
            yield pixels
            advance(len(pixels), pixels.nbytes)

    def _packed(self, images: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray | bytes]:
        """A shard of uncompressed chunks: images one after the other, the last chunk filled up with zeros, and the index."""
        yield from images
        chunks = -(-count // self.chunk)
        if missing := chunks * self.chunk - count:
            yield np.zeros(missing * self.pixels.image_bytes, np.uint8)
        length = self.chunk * self.pixels.image_bytes
        places = np.arange(self.unit_images // self.chunk)
        yield index_bytes(np.where(places < chunks, places * length, -1), np.where(places < chunks, length, -1))

    def _encoded(self, images: Iterator[np.ndarray], count: int) -> Iterator[bytes]:
        """A shard through the codecs of zarr."""
        pixels = np.concatenate([piece.copy() for piece in images])
        for name, content in encode("images", self._array(count), pixels):
            if name != "images/zarr.json":
                yield content

    def _array(self, count: int) -> dict[str, Any]:
        """How zarr makes the array of so many images."""
        box = self.pixels.box
        return {
            "shape": (count, box, box),
            "dtype": self.pixels.dtype,
            "chunks": (self.chunk, box, box),
            "shards": (self.unit_images, box, box),
            "compressors": compressor(self.compression, np.dtype(self.pixels.dtype).itemsize),
            "dimension_names": ("particle", "y", "x"),
        }

    def _attributes(self, dataset: ParticleDataset, manifest: Manifest) -> dict[str, Any]:
        pixels = self.pixels
        return {
            "cryolike_data": {
                "format": FORMAT,
                "version": manifest.about["version"],
                "box": pixels.box,
                "pixel_size_A": pixels.pixel_size,
                "source": {"kind": type(dataset).__name__, "box": dataset.box, "pixel_size_A": dataset.pixel_size},
                "downsample": None if pixels.downsample is None else asdict(pixels.downsample),
            }
        }


def plan_zarr(dataset: ParticleDataset, store: str | os.PathLike[str], **settings: Any) -> ExportPlan:
    """A plan to write a Zarr store, see ``export_zarr``."""
    return make_plan(dataset, store, ZarrFormat.of(dataset, **settings))


def _sizes(n: int, image_bytes: int, shard_bytes: int) -> tuple[int, int]:
    """Images per inner chunk and per shard; a shard holds whole chunks, and never more of them than there are images."""
    chunk = max(1, min(max(_CHUNK_BYTES // image_bytes, _CHUNK_IMAGES), shard_bytes // image_bytes))
    # Evened out over the images, because the last chunk is stored at full size.
    chunk = -(-n // -(-n // chunk))
    chunks = max(1, min(shard_bytes // (chunk * image_bytes), -(-n // chunk)))
    return chunk, chunk * chunks
