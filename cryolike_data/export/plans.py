"""``plan_export``: a plan for any kind of output."""

from __future__ import annotations

import os
from typing import Any, Literal, get_args

from ..dataset import ParticleDataset
from ..errors import ArgumentError
from ..transforms import Downsample
from .cryolike import plan_cryolike
from .mrc import plan_mrc
from .plan import ExportPlan
from .zarr import plan_zarr

ExportFormat = Literal["zarr", "cryolike", "mrc"]
_PLANNERS: dict[str, Any] = {"zarr": plan_zarr, "cryolike": plan_cryolike, "mrc": plan_mrc}


def plan_export(
    dataset: ParticleDataset,
    target: str | os.PathLike[str],
    *,
    format: ExportFormat | None = None,
    downsample: Downsample | None = None,
    **settings: Any,
) -> ExportPlan:
    """A plan to export particles, whose units can be run anywhere; nothing is written.

    Parameters
    ----------
    dataset : the particles, in the order in which they are written
    target : folder or URL
    format : "zarr", "cryolike" or "mrc"; by default "zarr" for a target that ends in ``.zarr``
    downsample : how to make the images smaller
    settings : further arguments of ``export_zarr``, ``export_cryolike`` or ``export_mrc`` that say what is written

    Returns
    -------
    The plan, for ``run``, ``run_unit`` and ``finish``.

    Raises
    ------
    ArgumentError
        if the format is not known or does not know a setting
    """
    if format is None and os.fspath(target).rstrip("/").endswith(".zarr"):
        format = "zarr"
    if format is None or format not in _PLANNERS:
        raise ArgumentError(f"format is one of {', '.join(get_args(ExportFormat))} (by default zarr for a name in .zarr), not {format!r}")
    try:
        plan: ExportPlan = _PLANNERS[format](dataset, target, downsample=downsample, **settings)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ArgumentError(f"These are not settings of the format {format!r}: {error}") from error
    return plan
