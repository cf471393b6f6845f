"""What a run of an export did, as values that scripts can use."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from .place import Place
from .plan import ExportPlan
from .prepare import is_sealed
from .state import UnitRecord


@dataclass(frozen=True)
class ExportReport:
    """What a run did.

    Attributes
    ----------
    target, format : where, and which kind of output
    particles : in the whole export
    units : in the whole export
    written, kept : units that this run wrote, and those that it found finished and left as they are
    bytes : of the files of these units
    seconds : wall time
    images_per_second : of the units that were written
    sealed : whether the export is whole
    """

    target: str
    format: str
    particles: int
    units: int
    written: int
    kept: int
    bytes: int
    seconds: float
    images_per_second: float
    sealed: bool

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def report(plan: ExportPlan, place: Place, records: list[UnitRecord], written: list[UnitRecord], started: float) -> ExportReport:
    """What was done since ``started``, by the records of the units that are there and of those that were written."""
    seconds = time.perf_counter() - started
    images = sum(len(plan.rows(record.unit)) for record in written)
    return ExportReport(
        target=plan.target,
        format=plan.format.kind,
        particles=len(plan.dataset),
        units=len(plan),
        written=len(written),
        kept=len(records) - len(written),
        bytes=sum(record.size for record in records),
        seconds=round(seconds, 3),
        images_per_second=round(images / seconds, 1),
        sealed=is_sealed(plan, place),
    )
