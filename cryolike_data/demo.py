"""A small synthetic CryoSPARC project with known truth, for tests, notebooks and a first try.

The model is a sum of isotropic 3-D Gaussian blobs, so that its projections and its volume have closed forms. A particle with rotation
vector v shows a blob at c (x, y, z) at (E(v)^T c)_xy minus its shift, where E(v) = expm([v]x) takes the particle frame to the volume frame
and the shift is what has to be applied to centre the image. x runs along columns, y along rows, and pixel box // 2 is the centre.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._demo_files import (
    FIELDS,
    MRC_MODES,
    chunks_of,
    random_particles,
    random_places,
    random_uids,
    save_table,
    set_blob,
    write_batches,
    write_mrc,
)
from .ctf import Ctf, ctf_values, half_plane
from .descriptor import read_npz_without_pickles
from .errors import ArgumentError, ExportError, ExportExistsError
from .files import unfinished, whole_folder
from .mrc import HEADER_BYTES
from .on_disk import expanded, is_file, is_folder
from .particles import Selection, resolve_rows
from .rotations import rotation_matrices
from .transforms.downsample import crop_fourier

#: Of a project with as many stacks as there are by default.
LEAST_PARTICLES = 10
_PARTS = ("J1", "J3", "J4", "J5", "volume.mrc", "truth.npz")
_CTF_COLUMNS = {  # field of Ctf: column of the table
    "voltage_kv": "ctf/accel_kv",
    "spherical_aberration_mm": "ctf/cs_mm",
    "amplitude_contrast": "ctf/amp_contrast",
    "defocus_u": "ctf/df1_A",
    "defocus_v": "ctf/df2_A",
    "astigmatism_angle_rad": "ctf/df_angle_rad",
    "phase_shift_rad": "ctf/phase_shift_rad",
}


@dataclass(frozen=True)
class DemoProject:
    """Where the parts of a demo project lie.

    Attributes
    ----------
    folder : the project folder
    indexed : particle table of J3, whose rows name stack and slice of every particle in J1
    truth : what the images were made of (``.npz``, rows as in ``indexed``; see ``write_project``)
    volume : the model as an MRC volume, axes (z, y, x), voxel box // 2 at the origin
    job_number : job folder with restacked images of half of the particles, and a table of the order they are in
    downsampled_job_number : job folder with all particles at half the box; the pixel size is in the image headers only
    """

    folder: Path
    indexed: Path
    truth: Path
    volume: Path
    job_number: int = 4
    downsampled_job_number: int = 5


def write_project(
    folder: str | os.PathLike[str],
    *,
    n_particles: int = 600,
    box: int = 64,
    pixel_size: float = 2.0,
    seed: int = 0,
    snr: float = 0.1,
    n_stacks: int = LEAST_PARTICLES // 2,
    dtype: str = "float32",
    overwrite: bool = False,
) -> DemoProject:
    """Write a synthetic CryoSPARC project, the same to the last byte for the same arguments (with the same versions of torch and NumPy).

    ``truth.npz`` holds the model (``centres_A`` (K, 3), ``amplitudes`` (K,), ``sigma_A``), one row per row of J3's table of ``uid``,
    ``rotvec`` (N, 3) rad, ``shift_A`` (N, 2), ``half_set`` and the fields of ``Ctf``, and ``snr``, ``noise_std``, ``pixel_size``, ``box``,
    ``seed``. Stored images are -(CTF * projection) + noise: particles are dark, and times ``blob/sign`` they have positive contrast.

    Parameters
    ----------
    folder : where to write; a new one is made whole beside its place, and one that is there is filled at the end
    n_particles : rows of J3's table, at least 2 * n_stacks; the stacks hold a tenth more images of which no table speaks
    box : box size in pixels, at least 16, odd or even
    pixel_size : angstrom
    seed : of everything that is random, not negative
    snr : variance over the pixels of the noise-free images (with CTF; mean over particles) divided by the variance of the white noise,
        which is 1
    n_stacks : number of stacks in J1, at least 2, of falling size; the last has a single image
    dtype : pixel type of the stacks, "float32" or "float16"
    overwrite : replace a demo project that is there; into other folders with something in them nothing is ever written

    Raises
    ------
    ArgumentError
        if an argument is out of range
    ExportExistsError
        if the folder holds something that may not be replaced
    ExportError
        if it may not be written to, or the disk is full
    """
    _check_arguments(n_particles, box, pixel_size, seed, snr, n_stacks, dtype)
    place = expanded(folder).resolve()
    try:
        _check_place(place, overwrite)
        with whole_folder(place, _PARTS) as project:
            _write_into(project, n_particles, box, pixel_size, seed, snr, n_stacks, dtype)
    except ExportExistsError:
        raise
    except OSError as error:
        raise ExportError(f"{place} cannot be written: {error}") from error
    return _project(place)


def project_model(truth: Mapping[str, Any], rotvecs: Any, shifts_A: Any, box: int, pixel_size: float) -> Tensor:
    """Line integrals of the blob model, without CTF, sign or noise.

    Parameters
    ----------
    truth : mapping with ``centres_A`` (K, 3), ``amplitudes`` (K,) and ``sigma_A``, such as the open ``truth.npz``
    rotvecs : (B, 3) rotation vectors from the particle to the volume frame, radian
    shifts_A : (B, 2) translations (x, y) that centre the images, angstrom
    box, pixel_size : of the images, pixels and angstrom

    Returns
    -------
    (B, box, box) float32 tensor, density times angstrom
    """
    v, shifts, centres, amplitudes = (
        torch.as_tensor(np.asarray(a, np.float64), device="cpu") for a in (rotvecs, shifts_A, truth["centres_A"], truth["amplitudes"])
    )
    sigma = float(truth["sigma_A"])
    seen = torch.einsum("kj,bji->bki", centres, rotation_matrices(v))[..., :2] - shifts[:, None]
    x, y = (_bells(seen[..., axis], sigma, box, pixel_size) for axis in (0, 1))
    along_z = amplitudes * math.sqrt(2 * math.pi) * sigma
    return torch.einsum("bky,bkx->byx", y * along_z[:, None], x).float()


def clean_images(project: DemoProject | str | os.PathLike[str], rows: Selection) -> Tensor:
    """The stored images of some particles without their noise: CTF, sign and scale are those of the stored ones.

    Parameters
    ----------
    project : a ``DemoProject``, its folder, or its ``truth.npz``
    rows : rows of J3's table: row numbers (negative ones count from the end), a mask or a slice

    Returns
    -------
    (B, box, box) float32 tensor, in the order of ``rows``

    Raises
    ------
    RowIndexError
        if a row is out of range
    MissingStackError, ArgumentError
        if there is no truth, or it cannot be read
    """
    path = project.truth if isinstance(project, DemoProject) else expanded(project)
    truth: dict[str, Any] = read_npz_without_pickles(path / "truth.npz" if is_folder(path) else path)
    chosen = resolve_rows(rows, len(truth["uid"]))
    images = torch.empty(len(chosen), int(truth["box"]), int(truth["box"]), device="cpu")
    for part in chunks_of(len(chosen), images.shape[-1]):
        images[part] = _clean(truth, chosen[part])
    return images


def _project(folder: Path) -> DemoProject:
    return DemoProject(folder, folder / "J3" / "J3_particles.cs", folder / "truth.npz", folder / "volume.mrc")


def _check_arguments(n_particles: int, box: int, pixel_size: float, seed: int, snr: float, n_stacks: int, dtype: str) -> None:
    """Raise ``ArgumentError`` for the first argument that cannot work."""
    for fine, message in (
        (n_stacks >= 2, f"n_stacks must be at least 2, one per exposure group, not {n_stacks}"),
        (n_particles >= 2 * n_stacks, f"n_particles must be at least 2 * n_stacks = {2 * n_stacks}, not {n_particles}"),
        (box >= 16, f"box must be at least 16, not {box}"),
        (0 < pixel_size < math.inf, f"pixel_size must be positive, not {pixel_size}"),
        (abs(pixel_size * box - box // 2) > 1e-5 * box, f"pixel_size={pixel_size} gives J5 one of 1 A, which in a header means: not known"),
        (0 < snr < math.inf, f"snr must be positive, not {snr}"),
        (seed >= 0, f"seed must not be negative, not {seed}"),
        (dtype in MRC_MODES, f"dtype must be one of {', '.join(MRC_MODES)}, not {dtype!r}"),
    ):
        if not fine:
            raise ArgumentError(message)


def _check_place(place: Path, overwrite: bool) -> None:
    """Raise unless the place is free, an empty folder, what a run that was killed has left, or a demo project that may be replaced."""
    if is_file(_project(place).truth) and is_file(_project(place).indexed):
        if not overwrite:
            raise ExportExistsError(f"{place} holds a demo project already; pass overwrite=True to replace it.")
    elif place.exists() and not (place.is_dir() and (unfinished(place) or not any(place.iterdir()))):
        raise ExportExistsError(f"{place} holds something that is not a demo project; choose another folder.")


def _write_into(folder: Path, n: int, box: int, pixel_size: float, seed: int, snr: float, n_stacks: int, dtype: str) -> None:
    """Write all jobs, the truth and the volume into an empty folder."""
    project, rng = _project(folder), np.random.default_rng(seed)
    sizes, stack, idx = random_places(rng, n, n_stacks)
    names = [f"J1/extract/{uid:021d}_mic{k:04d}_particles.mrc" for k, uid in enumerate(random_uids(rng, n_stacks))]
    table = random_particles(rng, stack, box, pixel_size)
    set_blob(table, [names[k] for k in stack], idx, box, pixel_size)
    save_table(project.indexed, table, *FIELDS)
    truth = _truth(rng, table, seed, snr, box, pixel_size)
    np.savez(project.truth, **truth)
    write_mrc(project.volume, (box,) * 3, "float32", pixel_size, [_volume(truth)])
    for k, size in enumerate(sizes):
        row_of = np.full(size, -1)
        row_of[idx[stack == k]] = np.flatnonzero(stack == k)
        images = _noisy(truth, row_of, np.random.default_rng([seed, k + 1]))  # [seed, 0] would be the stream of seed itself
        write_mrc(folder / names[k], (size, box, box), dtype, pixel_size, images, is_stack=True)

    stored = [np.memmap(folder / name, dtype, "r", HEADER_BYTES, (size, box, box)) for name, size in zip(names, sizes, strict=True)]

    def read(rows: NDArray[np.int64]) -> NDArray[Any]:
        return np.stack([stored[stack[row]][idx[row]] for row in rows])

    def read_half(rows: NDArray[np.int64]) -> NDArray[Any]:
        return crop_fourier(torch.from_numpy(read(rows)).double(), box // 2).numpy()

    restacked = rng.permutation(n)[: n // 2]
    paths, places = write_batches(folder, "J4/restack/batch_{}_restacked.mrc", restacked, read, dtype, box, pixel_size)
    moved = table[restacked]
    set_blob(moved, paths, places, box, pixel_size)
    save_table(folder / "J4" / "J4_passthrough_particles.cs", moved, "ctf", "alignments3D")
    save_table(folder / "J4" / "restacked_particles.cs", moved, "blob")
    rows = rng.permutation(n)
    write_batches(folder, "J5/downsample/batch_{:06d}_downsample.mrc", rows, read_half, dtype, box // 2, pixel_size * box / (box // 2))
    save_table(folder / "J5" / "J5_passthrough_particles.cs", table[rows], "ctf", "alignments3D")


def _truth(rng: np.random.Generator, table: NDArray[Any], seed: int, snr: float, box: int, pixel_size: float) -> dict[str, Any]:
    """The model and everything the images follow from, read back from the table so that both agree to the last bit."""
    n_blobs, side = 25, box * pixel_size
    centres = rng.normal(size=(n_blobs, 3))
    centres *= 0.22 * side * (rng.uniform(0, 1, n_blobs) ** (1 / 3) / np.linalg.norm(centres, axis=1))[:, None]
    amplitudes = rng.uniform(0.5, 1.5, n_blobs)
    truth: dict[str, Any] = {
        "centres_A": centres - np.average(centres, axis=0, weights=amplitudes),
        "amplitudes": amplitudes,
        "sigma_A": max(0.03 * side, 1.25 * pixel_size),  # never so sharp that sampling on the pixels would alias
        "uid": table["uid"],
        "rotvec": table["alignments3D/pose"],
        "shift_A": table["alignments3D/shift"].astype(np.float64) * pixel_size,
        "half_set": table["alignments3D/split"],
        "exposure_group": table["ctf/exp_group_id"],
        **{name: table[column] for name, column in _CTF_COLUMNS.items()},
    }
    truth.update(snr=snr, noise_std=1.0, pixel_size=pixel_size, box=box, seed=seed)
    # The noise has unit variance, so the amplitudes carry the scale; rows are in random order, so the first ones stand for all.
    variances = [_clean(truth, np.arange(len(table))[part]).double().var(dim=(1, 2)) for part in chunks_of(min(len(table), 1024), box)]
    # Rounded, so that the order in which threads add up does not reach the pixels.
    truth["amplitudes"] = amplitudes * float(np.float32(math.sqrt(snr / float(torch.cat(variances).mean()))))
    return truth


def _clean(truth: Mapping[str, Any], rows: NDArray[np.int64]) -> Tensor:
    """Minus CTF times projection for the given rows: (len(rows), box, box) float32."""
    box, pixel_size = int(truth["box"]), float(truth["pixel_size"])
    clean = project_model(truth, truth["rotvec"][rows], truth["shift_A"][rows], box, pixel_size)
    optics: dict[str, Any] = {name: torch.from_numpy(truth[name][rows].astype(np.float64)) for name in _CTF_COLUMNS}
    transfer = ctf_values(Ctf(**optics), *half_plane(box, pixel_size))
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(clean.double()) * transfer, s=(box, box))
    return -filtered.float()


def _noisy(truth: Mapping[str, Any], row_of: NDArray[np.int64], rng: np.random.Generator) -> Iterator[NDArray[Any]]:
    """The images of one stack, chunk by chunk; a slice without a row (-1) is noise only, as a rejected pick."""
    box = int(truth["box"])
    for part in chunks_of(len(row_of), box):
        rows = row_of[part]
        images = rng.standard_normal((len(rows), box, box), dtype=np.float32)
        if np.any(rows >= 0):
            images[rows >= 0] += _clean(truth, rows[rows >= 0]).numpy()
        yield images


def _volume(truth: Mapping[str, Any]) -> NDArray[Any]:
    """Density of the model on the (z, y, x) grid of the box, float32; its sum along z times the voxel size is the projection."""
    centres = torch.from_numpy(truth["centres_A"])
    x, y, z = (_bells(centres[:, axis], truth["sigma_A"], truth["box"], truth["pixel_size"]) for axis in range(3))
    weighted = z * torch.from_numpy(truth["amplitudes"])[:, None]
    volume: NDArray[Any] = torch.einsum("kzy,kx->zyx", weighted[:, :, None] * y[:, None], x).float().numpy()
    return volume


def _bells(centres: Tensor, sigma: float, box: int, pixel_size: float) -> Tensor:
    """Gaussians of height 1 at centres (..., K), angstrom from the middle of the box, on its pixels: (..., K, box)."""
    grid = (torch.arange(box, dtype=torch.float64, device="cpu") - box // 2) * pixel_size
    return torch.exp(((grid - centres[..., None]) / sigma).square() / -2)
