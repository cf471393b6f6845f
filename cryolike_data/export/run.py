"""Running a plan: unit by unit, here or on a cluster, from where an earlier run stopped; sealed when all units are there."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ArgumentError, ExportError
from ..fingerprint import fingerprint_of_files
from ..progress import Progress
from .cluster import require_executor, run_on_cluster
from .place import STATE, Place, WrittenFile, open_place
from .plan import Advance, ExportPlan
from .prepare import is_sealed, known_records, look, prepare
from .state import UnitRecord, at_work_on, living_runs, read_record, write_record

if TYPE_CHECKING:
    from distributed import Client

#: Units that are told by number in a message.
_TOLD = 8


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
    overwrite : remove another export that is there. One of the same plan is continued: its units are checked against their checksums,
        and kept if they are whole.
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
        if another run is at work on the same units, the disk is too small, or a file cannot be written
    """
    started = time.perf_counter()
    if executor is not None:
        require_executor(executor)
    chosen = plan.units if units is None else units
    place = open_place(plan.target)
    prepare(plan, place, overwrite=overwrite, alone=units is None)
    known = known_records(plan, place, chosen)
    written: list[UnitRecord] = []
    bar = Progress(plan.target.rstrip("/").rpartition("/")[2], sum(len(plan.rows(unit)) for unit in chosen), show=progress)
    with nullcontext() if is_sealed(plan, place) else at_work_on(place, chosen), bar:
        known = _whole(known, place)
        bar.skip(sum(len(plan.rows(unit)) for unit in known))
        left = [unit for unit in chosen if unit not in known]
        bar.start()
        written.extend(_run_units(plan, left, executor, bar.advance))
    records = [*known.values(), *written]
    if units is None:
        finish(plan)
    _warn_of_notes(records, plan)
    return _report(plan, place, records, written, started)


def run_unit(plan: ExportPlan, unit: int, *, advance: Advance = lambda images, size: None) -> UnitRecord:
    """Write one unit: each of its files beside its place and then renamed into it, then the record that it is finished.

    May be called anywhere, any number of times: the same unit is the same bytes.

    Parameters
    ----------
    plan : what to write
    unit : its number
    advance : called with the images and bytes that were written since the last call
    """

    def require_ours() -> None:
        there, unlike = look(plan, place)
        if unlike or there not in ("unfinished", "sealed"):
            raise ExportError(f"{plan.target} was given to another export while unit {unit} was written for this one.")

    place = open_place(plan.target)
    rows = plan.rows(unit)
    sealed = prepare(plan, place, overwrite=False, alone=False)
    place.before_placing = require_ours
    with _one_thread():
        record = plan.format.write_unit(plan.dataset, unit, rows, place, advance)
    if not sealed:
        write_record(place, record)
    return record


def finish(plan: ExportPlan) -> ExportReport:
    """Make sure that all units are there, write what belongs to none, and seal the result.

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
        rest = [WrittenFile.from_json(values) for values in (plan.format.read_manifest(place) or {})["rest"]]
        if not all(place.holds(file, checked=True) for file in rest):
            plan.format.write_rest(plan.dataset, place)
        place.remove(STATE)
        return _report(plan, place, [*known_records(plan, place, plan.units).values()], [], started)
    if look(plan, place)[0] != "nothing":
        prepare(plan, place, overwrite=False, alone=False)
    if others := living_runs(place, plan.units):
        raise ExportError(f"{plan.target} cannot be sealed yet: process {others[0]['pid']} on {others[0]['host']} is at work on it.")
    found = {unit: read_record(place, unit) for unit in plan.units}
    records = [record for record in found.values() if record is not None and all(place.holds(file, checked=False) for file in record.files)]
    missing = sorted(set(plan.units) - {record.unit for record in records})
    if missing:
        raise ExportError(
            f"{plan.target} cannot be sealed yet: {len(missing)} of {len(plan)} units are not there ({_told(missing)}). "
            "Run the same export again to write them."
        )
    if fingerprint_of_files(plan.dataset) != plan.about["inputs"]["stacks"]:
        raise ExportError(
            f"The input stacks of {plan.target} have changed while they were exported; export them again with overwrite=True."
        )
    rest = plan.format.write_rest(plan.dataset, place)
    about_files = {"units": [record.to_json() for record in records], "rest": [file.to_json() for file in rest]}
    plan.format.write_seal(plan.dataset, plan.about | about_files, place)
    place.remove(STATE)
    return _report(plan, place, records, [], started)


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


def _report(plan: ExportPlan, place: Place, records: list[UnitRecord], written: list[UnitRecord], started: float) -> ExportReport:
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
    cores = torch.get_num_threads()
    at_once = max(1, min(cores, len(units)))
    stopped = threading.Event()

    def go_on(images: int, size: int) -> None:
        if stopped.is_set():
            raise ExportError("the export was stopped")
        advance(images, size)

    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(run_unit, plan, unit, advance=go_on) for unit in units]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                # After an error or Ctrl-C: what has not begun never does, and what is at work ends with its next piece.
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        # torch keeps the number of threads per thread, but its default for threads to come was changed.
        torch.set_num_threads(cores)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch and finufft: several add up and transform in another order, so that the last bits would depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warn_of_notes(records: list[UnitRecord], plan: ExportPlan) -> None:
    """One warning for what happened to images of all units."""
    constant = sum(record.notes.get("constant", 0) for record in records)
    if constant:
        total = sum(len(plan.rows(record.unit)) for record in records)
        warnings.warn(f"{constant} of {total} images are constant and cannot be normalised; they became zeros.", UserWarning, stacklevel=3)


def _told(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_TOLD]))
    return shown + (", ..." if len(numbers) > _TOLD else "")
