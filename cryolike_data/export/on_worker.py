"""What a worker of dask holds of an export; needs the extra ``distributed``."""

from __future__ import annotations

from dataclasses import dataclass

from distributed import WorkerPlugin, get_worker

from .plan import ExportPlan
from .run import run_unit
from .state import UnitRecord


@dataclass(frozen=True)
class PlanOnWorkers(WorkerPlugin):  # type: ignore[misc]
    """A plan that every worker has, those that are started later, too.

    Attributes
    ----------
    name : under which a worker finds it
    plan : what to write
    """

    name: str
    plan: ExportPlan


def run_unit_of(name: str, unit: int) -> UnitRecord:
    """``run_unit`` on a worker, of the plan of that name."""
    return run_unit(get_worker().plugins[name].plan, unit)
