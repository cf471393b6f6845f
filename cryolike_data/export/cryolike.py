"""CryoLike's own files: stacks of centred images and their polar Fourier transforms, with the metadata its likelihood reads."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..collate import Collate
from ..dataset import ParticleDataset
from ..descriptor import ImageDescriptor, read_npz_without_pickles
from ..errors import ArgumentError, ExportError, ExportExistsError, MixedParticlesError, TableError
from ..files import whole_file
from ..transforms import Downsample, Normalize, PolarTransform, normalize_polar

log = logging.getLogger(__name__)

#: Images that are transformed at a time; what bounds the memory beyond one stack.
_CHUNK = 64
_SHARED_OPTICS = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")


def export_cryolike(
    dataset: ParticleDataset,
    folder: str | os.PathLike[str],
    *,
    descriptor: ImageDescriptor | str | os.PathLike[str],
    batch_size: int = 1024,
    n_stacks_max: int = -1,
    downsample: Downsample | None = None,
    plots: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool | None = None,
) -> list[Path]:
    """Write the particles, in the order of the data set, as CryoLike image stacks.

    Each stack is ``phys/particles_phys_stack_NNNNNN.pt`` (images with mean 0 and largest magnitude 1),
    ``fft/particles_fourier_stack_NNNNNN.pt`` (their polar Fourier transforms, of norm 1) and the ``.npz`` of the same name
    with the grids, optics, ``uid`` and ``row``. The ``.npz`` comes last: where it is, the stack is whole. The descriptor of
    the grid that was written is saved as ``fft/image_descriptor.npz``, for the later steps of CryoLike.

    Parameters
    ----------
    dataset : the particles
    folder : where ``phys/``, ``fft/`` and ``plots/`` go
    descriptor : grid and precision, or a CryoLike params file. It describes either the images as stored, and is then
        reduced together with them, or the images after downsampling, and is then used as it is.
    batch_size : images per stack
    n_stacks_max : stop after so many stacks; -1 means no limit
    downsample : how to make the images smaller
    plots : also draw CryoLike's three pictures of each stack into ``plots/`` (extra ``plot``)
    overwrite : replace the stacks that are in ``folder``
    resume : keep the stacks that are whole and write the others
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
        if there are stacks in ``folder`` and neither ``overwrite`` nor ``resume`` is given, or if they are of other particles
    """
    if batch_size < 1 or n_stacks_max < -1:
        raise ArgumentError(f"batch_size is at least 1 and n_stacks_max at least -1 (no limit), not {batch_size} and {n_stacks_max}")
    if overwrite and resume:
        raise ArgumentError("overwrite replaces what is there and resume keeps it; pass one of them")
    if len(dataset) == 0:
        raise ArgumentError("There are no particles to export: the selection is empty.")
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file; choose a folder.")
    collate = Collate(downsample=downsample)
    grid = _output_descriptor(dataset, descriptor, downsample)
    stacks = list(_plan(len(dataset), batch_size, n_stacks_max, folder))
    optics = [_stack_optics(dataset, stack) for stack in stacks]
    if plots:
        from ..plots import plot_stack, require_matplotlib

        require_matplotlib()
    transform = PolarTransform(grid.polar_grid, grid.n_pixels, eps=grid.eps)
    settings = {"downsampling": np.str_("none" if downsample is None else repr(downsample))}
    planned = [grid.to_npz_dict() | optics[stack.number] | _identity(dataset, stack) | settings for stack in stacks]
    left = _make_room(stacks, planned, folder, overwrite=overwrite, resume=resume)
    _write_npz(folder / "fft" / "image_descriptor.npz", grid.to_npz_dict())
    total = sum(len(stack.rows) for stack in left)
    with tqdm(total=total, unit="image", desc="CryoLike stacks", disable=None if progress is None else not progress) as bar:
        constant = 0
        for stack in left:
            phys, fourier, constant_here = _transform_stack(dataset, stack, collate, transform, grid, bar.update)
            constant += constant_here
            if plots:
                plot_stack(phys, fourier, grid, folder / "plots", stack.number)
            _write_stack(stack, phys, fourier, planned[stack.number])
    if constant:
        warnings.warn(f"{constant} of {total} images are constant and cannot be normalised; they became zeros.", UserWarning, stacklevel=2)
    return [stack.metadata for stack in stacks]


@dataclass(frozen=True)
class _Stack:
    number: int
    rows: range
    folder: Path

    @property
    def phys(self) -> Path:
        return self.folder / "phys" / f"particles_phys_stack_{self.number:06d}.pt"

    @property
    def fourier(self) -> Path:
        return self.folder / "fft" / f"particles_fourier_stack_{self.number:06d}.pt"

    @property
    def metadata(self) -> Path:
        return self.fourier.with_suffix(".npz")


def _plan(n_particles: int, batch_size: int, n_stacks_max: int, folder: Path) -> Iterator[_Stack]:
    n_stacks = -(-n_particles // batch_size)
    for number in range(n_stacks if n_stacks_max == -1 else min(n_stacks, n_stacks_max)):
        yield _Stack(number, range(number * batch_size, min(n_particles, (number + 1) * batch_size)), folder)


def _output_descriptor(
    dataset: ParticleDataset, descriptor: ImageDescriptor | str | os.PathLike[str], downsample: Downsample | None
) -> ImageDescriptor:
    given = descriptor if isinstance(descriptor, ImageDescriptor) else ImageDescriptor.load(Path(descriptor).expanduser())
    box = dataset.box if downsample is None else downsample.output_box(dataset.box)
    pixel_size = dataset.pixel_size * dataset.box / box
    return given.for_images(source_box=dataset.box, source_pixel_size=dataset.pixel_size, box=box, pixel_size=pixel_size)


def _stack_optics(dataset: ParticleDataset, stack: _Stack) -> dict[str, Any]:
    """The optics of one stack under CryoLike's names, dtypes and units."""
    particles = dataset.particles[stack.rows.start : stack.rows.stop]
    ctf = particles.ctf
    if ctf is None:
        raise TableError(
            "CryoLike needs the optics of each particle and the table has no ctf/* columns; pass the file that has as passthrough=."
        )
    u, v, angle, *_ = ctf.require("defocus_u", "defocus_v", "astigmatism_angle_rad", *_SHARED_OPTICS)
    try:
        voltage, aberration, contrast = (np.float64(particles.one_value(f"ctf/{name}", "dataset.select({})")) for name in _SHARED_OPTICS)
    except MixedParticlesError as error:
        raise MixedParticlesError(
            f"CryoLike keeps one voltage, spherical aberration and amplitude contrast per stack; stack {stack.number} (rows "
            f"{stack.rows.start} to {stack.rows.stop - 1}) would need several. Export each exposure group to a folder of its own. {error}"
        ) from error
    # CryoLike takes |U - V|: with U < V its astigmatism would be turned by 90 degrees. Swapped and turned, the CTF is the same.
    swap = u < v
    phase = np.zeros_like(u) if ctf.phase_shift_rad is None else ctf.phase_shift_rad
    indexed = particles.blob_paths is not None
    names = np.array([name.encode("utf-8", "surrogateescape") for name in particles.blob_paths or ()])
    return {
        "defocusU": np.where(swap, v, u),
        "defocusV": np.where(swap, u, v),
        "defocusAngle": np.where(swap, angle + np.float32(np.pi / 2), angle),
        "phaseShift": phase,
        "sphericalAberration": aberration,
        "voltage": voltage,
        "amplitudeContrast": contrast,
        "angleRotation": _NONE,
        "angleTilt": _NONE,
        "anglePsi": _NONE,
        "ref_pixel_size": np.full(2, particles.pixel_size[0], np.float64) if indexed else _NONE,
        "files": names[particles.file] if indexed else _NONE,
        "idxs": particles.slice.astype(np.uint32) if indexed else _NONE,
        "ctfBfactor": _NONE,
        "ctfScalefactor": _NONE,
        "n_images": np.int64(len(particles)),
    }


#: CryoLike reads an array of no elements as None; unlike None itself it needs no pickle.
_NONE = np.empty(0)


def _identity(dataset: ParticleDataset, stack: _Stack) -> dict[str, Any]:
    rows = slice(stack.rows.start, stack.rows.stop)
    return {"uid": dataset.particles.uid[rows], "row": dataset.particles.row[rows]}


def _make_room(stacks: list[_Stack], metadata: list[dict[str, Any]], folder: Path, *, overwrite: bool, resume: bool) -> list[_Stack]:
    """The stacks that are left to write, once it is sure that nothing in the folder gets mixed up with them."""
    present = [path for part in ("phys", "fft") for path in sorted((folder / part).glob("particles_*_stack_*.*"))]
    if overwrite:
        # Metadata first: what is left of a deletion that is cut short then never looks like a whole stack.
        for path in sorted([*present, *(folder / "plots").glob("*_stack_*.png")], key=lambda path: path.suffix != ".npz"):
            path.unlink()
        return stacks
    if present and not resume:
        raise ExportExistsError(
            f"{folder} holds {len(present)} files of CryoLike stacks already ({present[0].name}, ...). Choose another folder, "
            "pass overwrite=True to replace them, or resume=True (skip_exist=True) to continue a stopped run."
        )
    planned = {path for stack in stacks for path in (stack.phys, stack.fourier, stack.metadata)}
    foreign = [path for path in present if path not in planned]
    if foreign:
        raise ExportExistsError(f"{folder} holds {foreign[0].name}, which this export would not write; pass overwrite=True to start anew.")
    return [stack for stack in stacks if not _is_whole(stack, metadata[stack.number])]


def _is_whole(stack: _Stack, metadata: dict[str, Any]) -> bool:
    if not all(path.is_file() for path in (stack.phys, stack.fourier, stack.metadata)):
        return False
    try:
        written = read_npz_without_pickles(stack.metadata)
    except ArgumentError:
        return False
    for name, value in metadata.items():
        found = written.get(name)
        if not np.array_equal(_NONE if found is None else found, value):
            raise ExportExistsError(
                f"{stack.metadata} is of other particles or another grid ({name} differs); pass overwrite=True to start anew."
            )
    return True


def _transform_stack(
    dataset: ParticleDataset,
    stack: _Stack,
    collate: Collate,
    transform: PolarTransform,
    grid: ImageDescriptor,
    advance: Callable[[int], object],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    polar = grid.polar_grid
    phys = torch.empty((len(stack.rows), grid.n_pixels, grid.n_pixels), dtype=torch.float32)
    fourier = torch.empty((len(stack.rows), polar.n_shells, polar.n_inplanes), dtype=grid.complex_dtype)
    normalize, constant = Normalize("max"), 0
    for start in range(0, len(stack.rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        phys[part], constant_here = normalize.apply(collate.process_images(dataset.read(np.asarray(stack.rows[part]))))
        constant += constant_here
        fourier[part] = normalize_polar(transform(phys[part]), polar).to(grid.complex_dtype)
        advance(len(phys[part]))
    return phys, fourier, constant


def _write_stack(stack: _Stack, phys: torch.Tensor, fourier: torch.Tensor, metadata: dict[str, Any]) -> None:
    for path, tensor in ((stack.phys, phys), (stack.fourier, fourier)):
        # An open file, because torch.save would write the name of the partial file into it.
        with whole_file(path) as partial, partial.open("wb") as file:
            torch.save(tensor, file)
    _write_npz(stack.metadata, metadata)


def _write_npz(path: Path, arrays: dict[str, Any]) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
