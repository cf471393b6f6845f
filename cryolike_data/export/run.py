"""Running a plan: unit by unit, here or on a cluster, from where an earlier run stopped; sealed when all units are there."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..arguments import integer
from ..errors import ArgumentError, ExportError
from ..progress import Progress
from .cluster import require_executor, run_on_cluster
from .pixels import NOT_FINITE
from .place import STATE, Place, open_place
from .plan import Advance, ExportPlan
from .prepare import is_sealed, known_records, place_only_ours, prepare
from .report import ExportReport, report
from .seal import seal
from .state import UnitRecord, at_work_on, write_record

if TYPE_CHECKING:
    from distributed import Client

#: What a warning says of images that units have a note of.
_NOTES = {
    "constant": "are constant and cannot be normalised; they became zeros.",
    NOT_FINITE: "have pixels that are NaN or infinite, as has what was written of them; leave these particles out.",
}

#: For each thread that is at work on a unit, how many threads torch used before; and what is held while one begins or ends.
_BEFORE: list[int] = []
_SWITCHING = threading.Lock()


def run(
    plan: ExportPlan,
    *,
    units: range | None = None,
    overwrite: bool = False,
    executor: Client | str | None = None,
    progress: bool | None = None,
) -> ExportReport:
    """Run a plan: write what is not there yet, and seal the result if these are all units.

    Parameters
    ----------
    plan : what to write
    units : the units of this run, where several share the work; ``finish`` seals the result then
    overwrite : remove an export that is there and write all units, but continue one of the same plan that is not finished. Without it,
        one of the same plan is continued or, if it is finished, checked: its units are kept where their checksums are right.
    executor : a ``dask.distributed.Client``, or the address of a scheduler, whose workers run the units (extra ``distributed``)
    progress : show a progress bar; by default on a terminal only, elsewhere a line is logged every so often

    Returns
    -------
    What was done.

    Raises
    ------
    ExportExistsError
        if another export, or something else, is in the place; says what differs
    ExportError
        if another run is at work on the same units, the disk is too small, a file cannot be written, or a unit of a finished export is
        damaged and does not become what it was
    """
    started = time.perf_counter()
    if executor is not None:
        require_executor(executor)
    if not isinstance(units, range | None):
        raise ArgumentError(f"units is a range, such as range(0, 4), or None for all of them, not {units!r}")
    chosen = plan.units if units is None else units
    images = sum(len(plan.rows(unit)) for unit in chosen)  # an error if there is no such unit
    place = open_place(plan.target)
    prepare(plan, place, overwrite=overwrite, alone=units is None)
    known = known_records(plan, place, chosen)
    written: list[UnitRecord] = []
    bar = Progress(plan.target.rstrip("/").rpartition("/")[2], images, show=progress)
    with nullcontext() if is_sealed(plan, place) else at_work_on(place, chosen), bar:
        known = _whole(known, place)
        bar.skip(sum(len(plan.rows(unit)) for unit in known))
        left = [unit for unit in chosen if unit not in known]
        bar.start()
        written.extend(_run_units(plan, left, executor, bar.advance))
        if units is None:
            seal(plan)
    if units is None:
        place.remove_empty(STATE)
    records = [*known.values(), *written]
    _warn_of_notes(records, plan)
    return report(plan, place, records, written, started)


def run_unit(plan: ExportPlan, unit: int, *, advance: Advance = lambda images, size: None) -> UnitRecord:
    """Write one unit: each of its files beside its place and then renamed into it, then the record that it is finished.

    May be called anywhere, any number of times: the same unit is the same bytes.

    Parameters
    ----------
    plan : what to write
    unit : its number
    advance : called with the images and bytes that were written since the last call

    Raises
    ------
    ExportError
        if another export is at work there, a file cannot be written, or the export is sealed and a file would not become what it was
    """
    unit = integer("unit", unit)
    place = open_place(plan.target)
    rows = plan.rows(unit)
    sealed = prepare(plan, place, overwrite=False, alone=False)
    known = known_records(plan, place, range(unit, unit + 1)).get(unit) if sealed else None
    place_only_ours(plan, place, f"unit {unit} was written", known)
    with _one_thread():
        record = plan.format.write_unit(plan.dataset, unit, rows, place, advance)
    if not sealed:
        write_record(place, record)
    return record


def unit_range(text: str, count: int) -> range:
    """The units that "i/n" means: part i, from 0, of n equal parts.

    Raises
    ------
    ArgumentError
        if it means none
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ArgumentError(f"A range of units is i/n, part i of n counted from 0, such as 0/4 to 3/4, not {text!r}.")
    i, n = int(part), int(parts)
    return range(i * count // n, (i + 1) * count // n)


def _whole(records: dict[int, UnitRecord], place: Place) -> dict[int, UnitRecord]:
    """The records whose files are all there, by their sizes and checksums."""

    def is_whole(record: UnitRecord) -> bool:
        return all(place.holds(file, checked=True) for file in record.files)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        checked = zip(records.items(), pool.map(is_whole, records.values()), strict=True)
        return {unit: record for (unit, record), whole in checked if whole}


def _run_units(plan: ExportPlan, units: list[int], executor: Client | str | None, advance: Advance) -> Iterator[UnitRecord]:
    if executor is None:
        yield from _run_here(plan, units, advance)
        return
    for record in run_on_cluster(plan, units, executor):
        advance(len(plan.rows(record.unit)), record.size)
        yield record


def _run_here(plan: ExportPlan, units: list[int], advance: Advance) -> Iterator[UnitRecord]:
    """Records of the units as they are finished: each by one thread, so that reading, work and writing of several overlap."""
    plan.dataset.ask_ahead(np.arange(1))  # where the images lie is worked out once, and not by every thread
    at_once = max(1, min(torch.get_num_threads(), len(units)))
    stopped = threading.Event()

    def go_on(images: int, size: int) -> None:
        if stopped.is_set():
            raise ExportError("the export was stopped")
        advance(images, size)

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run_unit, plan, unit, advance=go_on) for unit in units]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            # After an error or Ctrl-C: what has not begun never does, and what is at work ends with its next piece.
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch and finufft: several add up and transform in another order, so that the last bits would depend on them."""
    with _SWITCHING:
        # torch keeps the number per thread, but changes its default for others, too: the first one at work tells what it was.
        _BEFORE.append(_BEFORE[0] if _BEFORE else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _SWITCHING:
            torch.set_num_threads(_BEFORE.pop())


def _warn_of_notes(records: list[UnitRecord], plan: ExportPlan) -> None:
    """One warning for each thing that happened to images of all units."""
    total = sum(len(plan.rows(record.unit)) for record in records)
    for note, what in _NOTES.items():
        if count := sum(record.notes.get(note, 0) for record in records):
            warnings.warn(f"{count} of {total} images {what}", UserWarning, stacklevel=3)
