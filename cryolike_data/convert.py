"""The calls of CryoLike's tutorial on CryoSPARC files, with its parameters and defaults; thin over the public names.

Here, and only here, ``folder_cryosparc`` means what it means in CryoLike: the folder of the stacks for an indexed file, the
project folder for a job directory.
"""

from __future__ import annotations

import os
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from .cryosparc import IndexedDataset, JobDirectoryDataset
from .cryosparc.job_directory import Pairing
from .dataset import ParticleDataset
from .descriptor import ImageDescriptor
from .errors import ArgumentError, ExportExistsError
from .export import export_cryolike
from .export.folder import MANIFEST
from .on_disk import expanded
from .particles import Selection
from .transforms import Downsample

PathLike = str | os.PathLike[str]


def convert_particle_stacks_from_indexed_cryosparc_file(
    params_input: ImageDescriptor | PathLike,
    file_cs: PathLike,
    folder_cryosparc: PathLike = "",
    folder_output: PathLike = "",
    batch_size: int = 1024,
    n_stacks_max: int = -1,
    pixel_size: Any = None,
    downsample_factor: int = 1,
    downsample_type: Literal["mean", "max", "fourier"] = "mean",
    skip_exist: bool = False,
    flag_plots: bool = True,
    *,
    index_base: Literal[0, 1] = 0,
    select: Selection = None,
    overwrite: bool = False,
) -> list[Path]:
    """Convert the particles of an indexed CryoSPARC file to CryoLike stacks, in the order of the file.

    Parameters
    ----------
    params_input : image descriptor, or the params file that holds one
    file_cs : the CryoSPARC file, with ``blob/path`` and ``blob/idx``
    folder_cryosparc : where the stacks lie, directly in it; "" takes ``blob/path`` as written
    folder_output : where ``phys/``, ``fft/`` and ``plots/`` go; "" is the working directory
    batch_size : images per output stack
    n_stacks_max : stop after so many stacks; -1 means no limit
    pixel_size : angstrom, a number or a pair; None takes it from the file
    downsample_factor : 1 leaves the images as they are
    downsample_type : "mean", "max" or "fourier"
    skip_exist : keep the stacks of a finished export of the same particles that are whole; by default such an export is an error.
        A run that was stopped is continued in any case.
    flag_plots : draw CryoLike's three pictures of each stack
    index_base : 0 as CryoSPARC counts ``blob/idx``; 1 as CryoLike's tutorial does
    select : which particles to take, see ``IndexedDataset``; CryoLike keeps one voltage per stack, so mixed tables need it
    overwrite : replace stacks that are in ``folder_output``

    Returns
    -------
    The ``.npz`` files, one per stack.
    """
    dataset = IndexedDataset(
        file_cs, folder=folder_cryosparc, index_base=index_base, pixel_size=_given_pixel_size(pixel_size), select=select
    )
    return _convert(
        dataset,
        params_input,
        folder_output,
        batch_size,
        n_stacks_max,
        downsample_factor,
        downsample_type,
        skip_exist,
        flag_plots,
        overwrite,
    )


def convert_particle_stacks_from_cryosparc_job_directory(
    params_input: ImageDescriptor | PathLike,
    folder_cryosparc: PathLike = "",
    job_number: int = 0,
    folder_output: PathLike = "",
    batch_size: int = 1024,
    n_stacks_max: int = -1,
    pixel_size: Any = -1.0,
    downsample_factor: int = 1,
    downsample_type: Literal["mean", "max", "fourier"] = "mean",
    skip_exist: bool = False,
    flag_plots: bool = True,
    *,
    pairing: Pairing = "sequence",
    select: Selection = None,
    overwrite: bool = False,
) -> list[Path]:
    """Convert the particles of a CryoSPARC restack or downsample job to CryoLike stacks, in the order of its table.

    Parameters
    ----------
    params_input : image descriptor, or the params file that holds one
    folder_cryosparc : the folder that holds ``J{job_number}/``; "" is the working directory
    job_number : number of the job
    pixel_size : angstrom, a number or a pair; a negative number or None takes it from the table or the MRC headers
    pairing : "sequence" (row k is image k) or "uid" (joined by uid; see ``JobDirectoryDataset``)
    folder_output, batch_size, n_stacks_max, downsample_factor, downsample_type, skip_exist, flag_plots, select, overwrite
        as for ``convert_particle_stacks_from_indexed_cryosparc_file``

    Returns
    -------
    The ``.npz`` files, one per stack.
    """
    dataset = JobDirectoryDataset(folder_cryosparc, job_number, pairing=pairing, pixel_size=_given_pixel_size(pixel_size), select=select)
    return _convert(
        dataset,
        params_input,
        folder_output,
        batch_size,
        n_stacks_max,
        downsample_factor,
        downsample_type,
        skip_exist,
        flag_plots,
        overwrite,
    )


#: The name that the tutorial uses.
convert_particle_stacks_from_indexed_cryosparc = convert_particle_stacks_from_indexed_cryosparc_file


def _convert(
    dataset: ParticleDataset,
    params_input: ImageDescriptor | PathLike,
    folder_output: PathLike,
    batch_size: int,
    n_stacks_max: int,
    downsample_factor: int,
    downsample_type: Literal["mean", "max", "fourier"],
    skip_exist: bool,
    flag_plots: bool,
    overwrite: bool,
) -> list[Path]:
    if isinstance(downsample_factor, bool) or not isinstance(downsample_factor, Real) or downsample_factor < 1:
        raise ArgumentError(f"downsample_factor is 1 (none) or a larger integer, not {downsample_factor!r}")
    folder = expanded(folder_output)
    if os.path.isfile(folder / MANIFEST) and not skip_exist and not overwrite:
        raise ExportExistsError(
            f"{folder} holds an export already ({MANIFEST}). Choose another folder, or pass skip_exist=True to keep the stacks that are "
            "whole or overwrite=True to replace them."
        )
    # Made even for a factor of 1, so that an unknown downsample_type never passes unnoticed.
    downsample = Downsample(factor=downsample_factor, method=downsample_type)
    return export_cryolike(
        dataset,
        folder,
        descriptor=params_input,
        batch_size=batch_size,
        n_stacks_max=n_stacks_max,
        downsample=None if downsample_factor == 1 else downsample,
        plots=flag_plots,
        overwrite=overwrite,
    )


def _given_pixel_size(value: Any) -> Any:
    """CryoLike's default of -1 means that no pixel size is given, as None does."""
    return None if isinstance(value, Real) and value < 0 else value
