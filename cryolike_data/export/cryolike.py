"""CryoLike's own files: stacks of centred images and their polar Fourier transforms, with the metadata its likelihood reads."""

from __future__ import annotations

import io
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import integer
from ..dataset import ParticleDataset
from ..descriptor import ImageDescriptor
from ..errors import ArgumentError
from ..memory import kept_tensor
from ..on_disk import expanded
from ..transforms import Downsample, Normalize, PolarTransform, normalize_polar
from ..transforms.finufft_plan import require_finufft
from ..transforms.polar_grid import describe_aliases
from .cryolike_optics import require_stack_optics, stack_optics
from .folder import FolderFormat
from .pixels import Contrast, Pixels, warn_of_dark_particles
from .place import Output, Place, WrittenFile
from .plan import Advance, ExportPlan, make_plan
from .run import run
from .state import UnitRecord
from .tensor_file import around_tensor

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)

#: Bytes of images that are normalised at a time: what is made of them is still in the cache when it is written.
_PIECE_BYTES = 4 << 20
#: Images that are transformed at a time.
_CHUNK = 16


def export_cryolike(
    dataset: ParticleDataset,
    folder: str | os.PathLike[str],
    *,
    descriptor: ImageDescriptor | str | os.PathLike[str],
    batch_size: int = 1024,
    n_stacks_max: int = -1,
    downsample: Downsample | None = None,
    contrast: Contrast = "stored",
    fourier: bool = True,
    plots: bool = False,
    overwrite: bool = False,
    executor: Client | str | None = None,
    progress: bool | None = None,
) -> list[Path]:
    """Write the particles, in the order of the data set, as CryoLike image stacks.

    Each stack is ``phys/particles_phys_stack_NNNNNN.pt`` (images with mean 0 and largest magnitude 1),
    ``fft/particles_fourier_stack_NNNNNN.pt`` (their polar Fourier transforms, of norm 1) and the ``.npz`` of the same name
    with the grids, optics, ``uid`` and ``row``. The descriptor of the grid that was written is saved as
    ``fft/image_descriptor.npz``, for the later steps of CryoLike. ``export.json`` comes last: where it is, all is whole. Until
    then the same call continues a run that was stopped.

    Parameters
    ----------
    dataset : the particles
    folder : where ``phys/``, ``fft/`` and ``plots/`` go
    descriptor : grid and precision, or a CryoLike params file. It describes either the images as stored, and is then
        reduced together with them, or the images after downsampling, and is then used as it is. Transforms are computed in its
        precision: see ``PolarTransform`` for how accurate they are in single precision.
    batch_size : images per stack
    n_stacks_max : stop after so many stacks; -1 means no limit
    downsample : how to make the images smaller
    contrast : "positive" multiplies the images of dark particles (``blob/sign`` of -1) by -1, as CryoLike's cross-correlation wants
        them; its converter leaves them as they are
    fourier : write the transforms; without them the metadata lie beside the images in ``phys/``
    plots : also draw CryoLike's three pictures of each stack into ``plots/`` (extra ``plot``)
    overwrite : replace the export that is in ``folder``
    executor : a ``dask.distributed.Client`` or the address of a scheduler, whose workers write the stacks
    progress : show a progress bar; by default on a terminal only

    Returns
    -------
    The ``.npz`` files, one per stack.

    Raises
    ------
    ArgumentError
        if the descriptor fits neither grid
    MixedParticlesError
        if rows of one stack differ in voltage, spherical aberration or amplitude contrast, of which CryoLike keeps one each
    ExportExistsError
        if another export, or stacks of another program, are in ``folder``
    ExportError
        if another run is at work there, the disk is too small, or a file cannot be written
    """
    plan = plan_cryolike(
        dataset,
        folder,
        descriptor=descriptor,
        batch_size=batch_size,
        n_stacks_max=n_stacks_max,
        downsample=downsample,
        contrast=contrast,
        fourier=fourier,
        plots=plots,
    )
    run(plan, overwrite=overwrite, executor=executor, progress=progress)
    return [Path(plan.target, plan.files(unit)[-1]) for unit in plan.units]


def plan_cryolike(
    dataset: ParticleDataset,
    folder: str | os.PathLike[str],
    *,
    descriptor: ImageDescriptor | str | os.PathLike[str],
    batch_size: int = 1024,
    n_stacks_max: int = -1,
    downsample: Downsample | None = None,
    contrast: Contrast = "stored",
    fourier: bool = True,
    plots: bool = False,
) -> ExportPlan:
    """A plan to write CryoLike stacks, see ``export_cryolike``; what cannot be exported is found out here."""
    batch_size, n_stacks_max = integer("batch_size", batch_size, least=1), integer("n_stacks_max", n_stacks_max)
    if n_stacks_max < 1 and n_stacks_max != -1:
        raise ArgumentError(f"n_stacks_max is at least 1, or -1 for no limit, not {n_stacks_max}")
    pixels = Pixels.of(dataset, downsample=downsample, dtype="float32", contrast=contrast)
    if not isinstance(descriptor, ImageDescriptor | str | os.PathLike):
        kind = f"{type(descriptor).__module__}.{type(descriptor).__qualname__}"
        raise ArgumentError(
            f"descriptor is an ImageDescriptor of this package or the path of a params file, not a {kind}; CryoLike's own writes such a "
            "file by its save()."
        )
    given = descriptor if isinstance(descriptor, ImageDescriptor) else ImageDescriptor.load(expanded(descriptor))
    grid = given.for_images(source_box=dataset.box, source_pixel_size=dataset.pixel_size, box=pixels.box, pixel_size=pixels.pixel_size)
    if n_stacks_max != -1:
        dataset = dataset.select(slice(0, n_stacks_max * batch_size))
    plan = make_plan(dataset, folder, CryoLikeFormat(pixels, grid, batch_size, fourier, plots))
    require_stack_optics(dataset.particles, batch_size)
    if fourier and (told := describe_aliases(grid.polar_grid, pixels.box)):
        log.warning("%s They are written, as CryoLike does; give a descriptor that ends at Nyquist if they are not wanted.", told)
    warn_of_dark_particles(dataset, pixels, "The cross-correlation of CryoLike")
    if plots:
        from ..plots import require_matplotlib

        require_matplotlib()
    if fourier or plots:
        require_finufft(or_else=f", or write the images alone with fourier=False{' and plots=False' if plots else ''}")
    return plan


@dataclass(frozen=True)
class CryoLikeFormat(FolderFormat):
    """CryoLike stacks as the output of an export; a unit is a stack. See ``export_cryolike``.

    Attributes
    ----------
    pixels : the images
    grid : the grids of images and transforms
    unit_images : images per stack
    fourier, plots : see ``export_cryolike``
    """

    pixels: Pixels
    grid: ImageDescriptor
    unit_images: int
    fourier: bool
    plots: bool

    kind = "cryolike"

    def settings(self) -> dict[str, Any]:
        """See ``Format``."""
        grid = {name: value.tolist() for name, value in self.grid.to_npz_dict().items()}
        return self.pixels.settings() | {"stack": self.unit_images, "fourier": self.fourier, "plots": self.plots, "descriptor": grid}

    def needed_bytes(self, particles: int) -> int:
        """See ``Format``."""
        polar = self.grid.polar_grid
        transform = polar.n_shells * polar.n_inplanes * self.grid.complex_dtype.itemsize
        return particles * (self.pixels.image_bytes + self.fourier * transform)

    def files(self, unit: int) -> tuple[str, ...]:
        """See ``Format``."""
        phys, transforms = f"phys/particles_phys_stack_{unit:06d}", f"fft/particles_fourier_stack_{unit:06d}"
        return (f"{phys}.pt", f"{transforms}.pt", f"{transforms}.npz") if self.fourier else (f"{phys}.pt", f"{phys}.npz")

    def write_unit(self, dataset: ParticleDataset, unit: int, rows: range, place: Place, advance: Advance) -> UnitRecord:
        """See ``Format``."""
        names, polar = self.files(unit), self.grid.polar_grid
        normalize, notes = Normalize("max"), Counter(constant=0)
        shown: list[Tensor] = []
        drawn: list[Tensor] = []
        # With pairs of images in each transform, a chunk is one call of finufft, whose numbers stay in the cache.
        transform = (
            PolarTransform(polar, self.grid.n_pixels, n_trans=_CHUNK // 2, dtype=self.grid.complex_dtype)
            if self.fourier or self.plots
            else None
        )
        phys_shape = (len(rows), self.grid.n_pixels, self.grid.n_pixels)
        fourier_shape = (len(rows), polar.n_shells, polar.n_inplanes)
        with ExitStack() as stack:
            phys = stack.enter_context(_tensor(place, names[0], phys_shape, torch.float32))
            fourier = stack.enter_context(_tensor(place, names[1], fourier_shape, self.grid.complex_dtype)) if self.fourier else None
            for read in self.pixels.pieces(
                dataset, rows, notes, images=max(1, _PIECE_BYTES // dataset.image_bytes) if transform is None else _CHUNK
            ):
                # The pictures need all images, and they may be written over otherwise.
                room = torch.empty_like(read) if self.plots else kept_tensor("normalised", read.shape, read.dtype)
                images, constant_here = normalize.apply(read, out=room)
                notes["constant"] += constant_here
                phys.write(images.numpy())
                size = images.numpy().nbytes
                if transform is not None:
                    transforms = transform(images)
                    normalize_polar(transforms, polar, out=transforms)
                    if fourier is not None:
                        fourier.write(transforms.numpy())
                        size += transforms.numpy().nbytes
                    if self.plots:
                        shown.append(images)
                        drawn.append(transforms)
                advance(len(images), size)
        files = [phys.written] + ([] if fourier is None else [fourier.written])
        if self.plots:
            files += self._draw(torch.cat(shown), torch.cat(drawn), unit, place)
        particles = dataset.particles.part(rows)
        metadata = self.grid.to_npz_dict() | stack_optics(particles) | {"uid": particles.uid, "row": particles.row}
        metadata["downsampling"] = np.str_("none" if self.pixels.downsample is None else repr(self.pixels.downsample))
        files.append(place.write(names[-1], _npz(metadata)))
        return UnitRecord(unit, tuple(files), dict(notes))

    def write_rest(self, dataset: ParticleDataset, place: Place) -> list[WrittenFile]:
        """See ``Format``."""
        return [place.write(f"{'fft' if self.fourier else 'phys'}/image_descriptor.npz", _npz(self.grid.to_npz_dict()))]

    def _draw(self, images: Tensor, transforms: Tensor, unit: int, place: Place) -> Iterator[WrittenFile]:
        from .. import plots

        with TemporaryDirectory() as drawn:
            plots.plot_stack(images, transforms, self.grid, Path(drawn), unit)
            for path in sorted(Path(drawn).iterdir()):
                yield place.write(f"plots/{path.name}", path.read_bytes())


@contextmanager
def _tensor(place: Place, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Output]:
    """A file that ``torch.load`` reads as one tensor, whose numbers are to be written."""
    before, after = around_tensor(shape, dtype)
    with place.create(name, room=len(before) + math.prod(shape) * dtype.itemsize + len(after)) as file:
        file.write(before)
        yield file
        file.write(after)


def _npz(arrays: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)  # not compressed, which would save little beside the images and take long
    return content.getvalue()
