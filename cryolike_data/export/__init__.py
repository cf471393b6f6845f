"""Materialising particles into files: a plan of independent units, run and resumed, for CryoLike's files, MRC stacks and Zarr."""

from .cryolike import export_cryolike
from .mrc import export_mrc
from .plan import ExportPlan
from .plans import plan_export
from .report import ExportReport
from .run import run, run_unit, unit_range
from .seal import finish
from .zarr import export_zarr

__all__ = [
    "ExportPlan",
    "ExportReport",
    "export_cryolike",
    "export_mrc",
    "export_zarr",
    "finish",
    "plan_export",
    "run",
    "run_unit",
    "unit_range",
]
