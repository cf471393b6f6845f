"""The end of an export: what belongs to no unit, the seal that makes all of it whole, and nothing left of the work."""

from __future__ import annotations

import random
import time

from ..errors import ExportError
from ..fingerprint import fingerprint_of_files
from .place import STATE, Place, open_place
from .plan import ExportPlan
from .prepare import is_sealed, known_records, look, place_only_ours, prepare
from .report import ExportReport, report
from .state import BeingSealedError, Manifest, UnitRecord, at_work_on, tidy_up

#: Units that are told by number in a message.
_TOLD = 8
#: How long to wait for another call that seals the same export; by chance, so that two do not keep meeting.
_WAIT_SECONDS = 0.05, 0.5


def finish(plan: ExportPlan) -> ExportReport:
    """Make sure that all units are there, write what belongs to none, and seal the result.

    Where several processes call it, one does the work and the others wait for it.

    Returns
    -------
    What is there; no unit is written.

    Raises
    ------
    ExportError
        if units are missing or a run is still at work; says which
    """
    started = time.perf_counter()
    place = open_place(plan.target)
    if is_sealed(plan, place):
        _all_records(plan, place)
        seal(plan)
    while not is_sealed(plan, place):
        if look(plan, place)[0] == "nothing":
            _all_records(plan, place)
        prepare(plan, place, overwrite=False, alone=False)
        try:
            with at_work_on(place, plan.units, sealing=True):
                seal(plan)
        except BeingSealedError:
            time.sleep(random.uniform(*_WAIT_SECONDS))
        except ExportError:
            if not is_sealed(plan, place):  # or else another call was faster, and tidied up
                raise
    place.remove_empty(STATE)
    return report(plan, place, [*known_records(plan, place, plan.units).values()], [], started)


def seal(plan: ExportPlan) -> None:
    """What ``finish`` does, for who has made known that it is at work on all units, or has found the export sealed."""
    place = open_place(plan.target)
    place_only_ours(plan, place, "its last files were written")
    if is_sealed(plan, place) and (manifest := plan.format.read_manifest(place)) is not None:
        if not all(place.holds(file, checked=True) for file in manifest.rest):
            plan.format.write_rest(plan.dataset, place)
        plan.format.mend_seal(plan.dataset, manifest, place)
    else:
        records = _all_records(plan, place)
        if fingerprint_of_files(plan.dataset) != plan.about["inputs"]["stacks"]:
            raise ExportError(
                f"The input stacks of {plan.target} have changed while they were exported; export them again with overwrite=True."
            )
        rest = plan.format.write_rest(plan.dataset, place)
        plan.format.write_seal(plan.dataset, Manifest(plan.about, tuple(records), tuple(rest)), place)
    if is_sealed(plan, place):  # and not replaced by now
        tidy_up(place)


def _all_records(plan: ExportPlan, place: Place) -> list[UnitRecord]:
    """The records of all units, or an ``ExportError`` that says which are not there."""
    found = known_records(plan, place, plan.units)
    records = [record for record in found.values() if all(place.holds(file, checked=False) for file in record.files)]
    missing = sorted(set(plan.units) - {record.unit for record in records})
    if missing:
        shown = ", ".join(map(str, missing[:_TOLD])) + (", ..." if len(missing) > _TOLD else "")
        state = "is not whole any more" if is_sealed(plan, place) else "cannot be sealed yet"
        raise ExportError(
            f"{plan.target} {state}: {len(missing)} of {len(plan)} units are not there ({shown}). Run the same export again to write them."
        )
    return records
