"""CryoSPARC particles for PyTorch: lazy data sets over tables and MRC stacks, batched device work, and export."""

from importlib.metadata import version as _version

from . import likelihood
from .batch import Particle, ParticleBatch
from .collate import Collate
from .convert import (
    convert_particle_stacks_from_cryosparc_job_directory,
    convert_particle_stacks_from_indexed_cryosparc,
    convert_particle_stacks_from_indexed_cryosparc_file,
)
from .cryolike_objects import to_cryolike
from .cryosparc import IndexedDataset, JobDirectoryDataset, read_table
from .ctf import Ctf
from .dataset import ParticleDataset
from .descriptor import ImageDescriptor
from .errors import CryolikeDataError
from .export import ExportPlan, export_cryolike, export_mrc, export_zarr, finish, plan_export, run_unit
from .particles import Particles
from .polar_batch import PolarBatch, PolarCollate
from .sampler import ParticleSampler
from .stream import ParticleStream, stream
from .transforms import Downsample, Normalize, PolarGrid
from .zarr_dataset import ZarrDataset

__version__ = _version("cryolike-data")

__all__ = [
    "Collate",
    "CryolikeDataError",
    "Ctf",
    "Downsample",
    "ExportPlan",
    "ImageDescriptor",
    "IndexedDataset",
    "JobDirectoryDataset",
    "Normalize",
    "Particle",
    "ParticleBatch",
    "ParticleDataset",
    "ParticleSampler",
    "ParticleStream",
    "Particles",
    "PolarBatch",
    "PolarCollate",
    "PolarGrid",
    "ZarrDataset",
    "convert_particle_stacks_from_cryosparc_job_directory",
    "convert_particle_stacks_from_indexed_cryosparc",
    "convert_particle_stacks_from_indexed_cryosparc_file",
    "export_cryolike",
    "export_mrc",
    "export_zarr",
    "finish",
    "likelihood",
    "plan_export",
    "read_table",
    "run_unit",
    "stream",
    "to_cryolike",
]
