"""Volumes, viewing directions, and polar Fourier transforms of projections, by slices through the 3-D transform.

Axes of a volume are (z, y, x) and voxel D // 2 is the origin. A pose is a rotation vector v whose E(v) takes the particle frame to the
volume frame: the 2-D transform of the projection along z at (kx, ky) is the 3-D transform of the volume at E(v) (kx, ky, 0). Grid, axes
and scale of the 2-D transforms are those of ``transforms.polar``.
"""

from __future__ import annotations

import math
import os

import mrcfile
import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, MissingStackError
from ..mrc import HEADER_BYTES, parse_header
from ..on_disk import expanded, is_file
from ..rotations import rotation_matrices, rotation_vectors
from ..transforms import PolarGrid
from ..transforms.finufft_plan import require_finufft


def read_volume(path: str | os.PathLike[str]) -> tuple[Tensor, float]:
    """Read a cubic MRC map, in any byte order and any real pixel mode, packed by gzip or bzip2 or not.

    The header's origin and start are not looked at: the origin of a volume is voxel D // 2.

    Parameters
    ----------
    path : the file

    Returns
    -------
    (D, D, D) float32 tensor, axes (z, y, x), and the voxel size in angstrom

    Raises
    ------
    MissingStackError
        if there is no such file
    ArgumentError
        if it is not an MRC file, not a cube, its axes are not in the usual order, its voxel size is zero or not the same along all axes,
        or a voxel is not a finite number
    """
    path = expanded(path)
    if not is_file(path):
        raise MissingStackError(f"{path} is not a file; read_volume needs the path of an MRC map.")
    try:
        with mrcfile.open(path, header_only=True) as mrc:  # so that a stack given by mistake is not read into memory
            box, voxel_size = _box_and_voxel_size(mrc.header, path)
        with mrcfile.open(path) as mrc:
            raw, stored = mrc.header.tobytes(), mrc.data.reshape(box, box, box)
    except ArgumentError:
        raise
    except (ValueError, EOFError, OSError) as error:
        raise ArgumentError(f"{os.fspath(path)} cannot be read as an MRC map: {error}") from error
    if stored.dtype.kind == "c":
        raise ArgumentError(f"{os.fspath(path)} holds complex numbers, a transform and not a map; write the map itself.")
    if stored.dtype == np.int8:  # IMOD's flag says that they are unsigned, and mrcfile does not look at it
        stored = stored.view(parse_header(raw, HEADER_BYTES + stored.nbytes, path).dtype)
    volume = torch.from_numpy(stored.astype(np.float32))
    if not bool(volume.isfinite().all()):
        raise ArgumentError(f"{os.fspath(path)} has voxels that are NaN or infinite; mask them or write the map again.")
    return volume, voxel_size


def project_volume(volume: Tensor, rotvecs: Tensor, grid: PolarGrid, *, eps: float = 1e-6) -> Tensor:
    """Polar Fourier transforms of the projections of a volume along the z axis of the particle frame.

    F(r, theta) = 4 pi / D * sum over (z, y, x) of V[z, y, x] exp(-i k . (x - D//2, y - D//2, z - D//2)) with
    k = 4 pi / D * E(v) (r sin(theta), r cos(theta), 0): what ``to_polar`` gives for the sum over z of the rotated volume, and exactly
    ``to_polar(volume.sum(0)[None], grid)`` for v = 0. There is no voxel size in it: line integrals are this times the voxel size.

    With E = E0 Rz(psi), F(r, theta) = F0(r, theta - psi): for psi = m * 2 pi / n_inplanes the transform is
    ``torch.roll(F0, m, dims=-1)``, towards higher angles.

    In double precision on the CPU, always, with no gradient. Besides the result it takes memory for a dozen complex volumes, however many
    the orientations.

    Parameters
    ----------
    volume : (D, D, D) real tensor, axes (z, y, x)
    rotvecs : (S, 3) rotation vectors from the particle to the volume frame, radian
    grid : points at which to evaluate
    eps : relative accuracy asked of finufft

    Returns
    -------
    (S, n_shells, n_inplanes) complex128 tensor on the device of the volume

    Raises
    ------
    ArgumentError
        if a shape is wrong, or a number not finite
    MissingDependencyError
        if finufft is not installed
    """
    _check_volume(volume, eps)
    frames = rotation_matrices(rotvecs.detach().cpu())
    if not bool(frames.isfinite().all()):
        raise ArgumentError("Some of the rotation vectors are NaN or infinite.")
    box = len(volume)
    # A projection is real, so F(-k) = conj F(k): with an even number of angles one half of them gives the other.
    n_angles = grid.n_inplanes // 2 if grid.n_inplanes % 2 == 0 else grid.n_inplanes
    radial, angles = torch.from_numpy(4 * math.pi / box * grid.radii)[:, None], torch.from_numpy(grid.angles[:n_angles])
    in_plane = torch.stack([(radial * angles.sin()).ravel(), (radial * angles.cos()).ravel()])  # kx, ky
    plan = require_finufft().Plan(2, (box,) * 3, 1, eps, -1, "complex128", nthreads=torch.get_num_threads())
    density = (volume.detach().to("cpu", torch.float64) * (4 * math.pi / box)).to(torch.complex128).numpy()
    result = torch.empty(len(frames), grid.n_shells, grid.n_inplanes, dtype=torch.complex128, device="cpu")
    # Every call of the plan transforms the whole volume again: take as many points as need about the memory of that.
    step = max(1, max(2**18, 2 * box**3) // in_plane.shape[1])
    for start in range(0, len(frames), step):
        part = frames[start : start + step]
        x, y, z = torch.einsum("sij,jp->isp", part[..., :2], in_plane).reshape(3, -1).numpy()
        plan.setpts(z, y, x)
        values = torch.from_numpy(plan.execute(density)).reshape(len(part), grid.n_shells, n_angles)
        result[start : start + step, :, :n_angles] = values
        result[start : start + step, :, n_angles:] = values[..., : grid.n_inplanes - n_angles].conj()
    return result.to(volume.device)


def viewing_directions(step_deg: float) -> tuple[Tensor, Tensor]:
    """A nearly even grid of viewing directions on the sphere.

    The sphere is cut into bands of equal height in polar angle, each with a ring of directions along its middle. Bands are no higher than
    the step and neighbours on a ring no further apart, so that from anywhere on the sphere it is at most half a step along the
    meridian to a ring, and half a step along the ring to a direction: every direction has one of the grid within a step.

    Parameters
    ----------
    step_deg : distance of neighbours, degrees, over 0 to 90

    Returns
    -------
    (S, 3) float64 rotation vectors of E = Rz(azimuth) Ry(polar), whose direction is E (0, 0, 1), and (S,) float64 logarithms of the share
    of the sphere that each direction stands for: its band, divided evenly; their exponentials sum to 1

    Raises
    ------
    ArgumentError
        if the step is not in that range
    """
    if not 0 < step_deg <= 90:
        raise ArgumentError(f"step_deg={step_deg!r} must be over 0 and at most 90 degrees.")
    # Not a band or a direction more than needed because of rounding, where the step divides the circle.
    n_bands = math.ceil(180 / step_deg - 1e-9)
    height = math.pi / n_bands
    polar = (torch.arange(n_bands, dtype=torch.float64, device="cpu") + 0.5) * height
    count = torch.ceil(360 / step_deg * polar.sin() - 1e-9).long()
    ring = torch.repeat_interleave(torch.arange(n_bands, device="cpu"), count)
    place = torch.arange(len(ring), device="cpu") - (count.cumsum(0) - count)[ring]
    turn, tilt = torch.zeros(2, len(ring), 3, dtype=torch.float64, device="cpu")
    turn[:, 2], tilt[:, 1] = 2 * math.pi * place.double() / count[ring], polar[ring]
    # Between polar angles a and b lies (cos a - cos b) / 2 of the sphere.
    share = polar.sin() * math.sin(height / 2) / count
    return rotation_vectors(rotation_matrices(turn) @ rotation_matrices(tilt)), share.log()[ring]


def _box_and_voxel_size(header: np.recarray, path: str | os.PathLike[str]) -> tuple[int, float]:
    """Box and voxel size of the map that has this header, or an ``ArgumentError`` that says why it cannot be used."""
    name = os.fspath(path)
    shape = [int(header[field]) for field in ("nx", "ny", "nz")]
    intervals = np.array([int(header[field]) for field in ("mx", "my", "mz")])
    axes = [int(header[field]) for field in ("mapc", "mapr", "maps")]
    cell = np.array([float(header["cella"][axis]) for axis in "xyz"])
    if shape[0] < 1 or len(set(shape)) > 1:
        raise ArgumentError(f"{name} is {' x '.join(map(str, shape))} voxels; the map must be a cube. Pad or crop it to one.")
    if axes != [1, 2, 3]:
        raise ArgumentError(
            f"{name} has its axes in the order MAPC, MAPR, MAPS = {axes}, not [1, 2, 3]; write it again in (x, y, z) order."
        )
    if intervals.min() < shape[0]:
        raise ArgumentError(
            f"{name} has {shape[0]} voxels along each axis, but its header counts MX, MY, MZ = {intervals.tolist()}, as a stack of images "
            "does. If it is a map, set them and its voxel size."
        )
    sizes = cell / intervals
    if not np.all(np.isfinite(sizes) & (sizes > 0)) or np.ptp(sizes) > 1e-3 * sizes[0]:
        raise ArgumentError(
            f"{name} has voxels of {' x '.join(f'{size:g}' for size in sizes)} angstrom; they must be equal and positive. "
            "Set the voxel size in its header."
        )
    return shape[0], float(sizes[0])


def _check_volume(volume: Tensor, eps: float) -> None:
    if volume.ndim != 3 or len(set(volume.shape)) != 1 or len(volume) < 1 or volume.is_complex():
        raise ArgumentError(f"The volume must be a real (D, D, D) tensor; this is {tuple(volume.shape)} {volume.dtype}.")
    if not bool(volume.isfinite().all()):
        raise ArgumentError("The volume has voxels that are NaN or infinite.")
    if not eps > 0:
        raise ArgumentError(f"eps={eps} must be positive.")
