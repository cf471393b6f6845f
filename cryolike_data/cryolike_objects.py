"""CryoLike's own objects for a batch, so that a stream of batches can take the place of its stack files.

Signatures, dtypes and conventions are those of CryoLike's commit d209d6b. The polar axes of a ``PolarBatch`` are CryoLike's already. Its
CTF is right for data of CryoSPARC and RELION, where CryoLike's own has the axis of astigmatism mirrored, because it counts their angle
from the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .descriptor import PIXEL_SIZE_TOLERANCE, ImageDescriptor
from .errors import ArgumentError, MissingDependencyError, TableError
from .polar_batch import PolarBatch

if TYPE_CHECKING:
    from cryolike.microscopy import CTF
    from cryolike.stacks import Images


@dataclass(frozen=True, eq=False)
class CryoLikeArguments:
    """What CryoLike's constructors are called with, as plain tensors and numbers.

    Attributes
    ----------
    fourier : (B, n_shells, n_inplanes) complex64 or complex128, transforms of the images
    ctf : (B, n_shells, n_inplanes) float32 or float64, CTF at the same points
    radius_max, dist_radii : polar grid, units of 1 / (half box)
    n_inplanes : angles on each shell
    n_pixels : box of the images, pixels
    pixel_size : angstrom
    """

    fourier: Tensor
    ctf: Tensor
    radius_max: float
    dist_radii: float
    n_inplanes: int
    n_pixels: int
    pixel_size: float


def to_cryolike(batch: PolarBatch, descriptor: ImageDescriptor) -> tuple[Images, CTF]:
    """CryoLike's ``Images`` and ``CTF`` for a batch, on the device of the batch.

    What its converter and ``load_img_stack`` make by way of files, in place of the loop over stacks::

        for batch in cryolike_data.stream(dataset, polar=descriptor.polar_grid, normalize="max", unit_power=True):
            images, ctf = to_cryolike(batch, descriptor)
            comparator = template_first_comparator(device, images, templates, ctf, n_images, n_templates, True, precision)
            pose, log_likelihood = compute_optimal_pose(comparator, templates, images, precision, True)
            result[batch.index] = log_likelihood

    CryoLike's cross-correlation takes particles to be bright: where ``dataset.particles.sign`` is -1,
    ``batch.fourier.neg_()`` comes first. Its likelihood is the same for both.

    Parameters
    ----------
    batch : images with their polar transforms and CTF. ``normalize="max", unit_power=True`` scales them as CryoLike does; another scale
        adds a constant to all log-likelihoods of an image. An image that is zero everywhere makes CryoLike refuse its batch.
    descriptor : grids and precision of the templates that the images are to be compared with. The images take its pixel size, because
        CryoLike compares pixel sizes exactly.

    Raises
    ------
    MissingDependencyError
        if CryoLike, or something it needs, is not installed
    ArgumentError, TableError
        see ``cryolike_arguments``
    """
    given = cryolike_arguments(batch, descriptor)
    try:
        from cryolike.grids import CartesianGrid2D, FourierImages, PolarGrid
        from cryolike.microscopy import CTF
        from cryolike.stacks import Images
    except ImportError as error:
        raise MissingDependencyError(
            f"CryoLike cannot be imported ({error}). It is not on PyPI: pip install git+https://github.com/flatironinstitute/CryoLike. "
            "What it needs but does not name: pip install matplotlib mrcfile pandas pydantic starfile tqdm."
        ) from error
    polar_grid = PolarGrid(radius_max=given.radius_max, dist_radii=given.dist_radii, n_inplanes=given.n_inplanes, uniform=True)
    # The integrated likelihood takes the number of pixels from the Cartesian grid.
    cartesian_grid = CartesianGrid2D(given.n_pixels, given.pixel_size)
    images = Images(phys_data=cartesian_grid, fourier_data=FourierImages(given.fourier, polar_grid))
    return images, CTF(given.ctf)


def cryolike_arguments(batch: PolarBatch, descriptor: ImageDescriptor) -> CryoLikeArguments:
    """What ``to_cryolike`` passes to CryoLike; needs no CryoLike.

    Both tensors are contiguous copies in the precision of the descriptor, on the device of the batch and without gradients: CryoLike may
    change them in place. CryoLike casts the CTF to the precision of the templates before it uses it, so that its own default of float64
    would change nothing but the memory. A batch in single precision does not become more accurate: for a descriptor with
    ``precision="double"``, stream with ``dtype=torch.float64``.

    Parameters
    ----------
    batch, descriptor : see ``to_cryolike``

    Raises
    ------
    ArgumentError
        if the batch has no polar transforms or no particles, if the descriptor has another polar grid, another box or (by more than
        0.1 %) another pixel size than the batch, after downsampling, or if the CTF is complex
    TableError
        if the batch has no CTF
    """
    if not isinstance(batch, PolarBatch):
        raise ArgumentError(
            f"CryoLike needs polar transforms, which {batch!r} does not have: pass polar=descriptor.polar_grid to stream, "
            "or collate_fn=PolarCollate(descriptor.polar_grid) to a DataLoader."
        )
    if len(batch) == 0:
        raise ArgumentError("The batch is empty, and CryoLike takes no stack without images: skip it.")
    _check_grids(batch, descriptor)
    return CryoLikeArguments(
        fourier=_copy(batch.fourier, descriptor.complex_dtype),
        ctf=_copy(_real_ctf(batch), descriptor.complex_dtype.to_real()),
        radius_max=descriptor.radius_max,
        dist_radii=descriptor.dist_radii,
        n_inplanes=descriptor.n_inplanes,
        n_pixels=descriptor.n_pixels,
        pixel_size=descriptor.pixel_size,
    )


def _check_grids(batch: PolarBatch, descriptor: ImageDescriptor) -> None:
    ours, theirs = descriptor.polar_grid, batch.grid
    pairs: dict[str, tuple[float, float]] = {
        "radius_max": (ours.radius_max, theirs.radius_max),
        "dist_radii": (ours.dist_radii, theirs.dist_radii),
        "n_inplanes": (ours.n_inplanes, theirs.n_inplanes),
        "box (pixels)": (descriptor.n_pixels, batch.box),
    }
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if not math.isclose(descriptor.pixel_size, batch.pixel_size, rel_tol=PIXEL_SIZE_TOLERANCE):
        differing["pixel size (angstrom)"] = (descriptor.pixel_size, batch.pixel_size)
    if differing:
        told = "\n".join(f"  {name}: {mine!r} in the descriptor, {its!r} in the batch" for name, (mine, its) in differing.items())
        raise ArgumentError(
            f"The descriptor does not fit the batch:\n{told}\n"
            f"Make one for the images after downsampling, such as ImageDescriptor.from_individual_values(n_pixels={batch.box}, "
            f"pixel_size={batch.pixel_size:.6g}), and stream with polar=descriptor.polar_grid."
        )


def _real_ctf(batch: PolarBatch) -> Tensor:
    if batch.polar_ctf is None:
        raise TableError("The batch has no CTF, because the table has no ctf/* columns; pass the file that holds them as passthrough=.")
    if batch.polar_ctf.is_complex():
        raise ArgumentError("The CTF of the batch is complex, and CryoLike's is real: leave beam_tilt and trefoil out of ctf_terms.")
    return batch.polar_ctf


def _copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
