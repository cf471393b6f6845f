"""Running a plan: unit by unit, here or on a cluster, from where an earlier run stopped; sealed when all units are there."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..dataset import human_bytes
from ..errors import ArgumentError, ExportError, ExportExistsError
from .cluster import require_executor, run_on_cluster
from .place import STATE, LocalPlace, Place, open_place
from .plan import Advance, ExportPlan, differences, fingerprint, input_files
from .progress import Progress
from .state import UnitRecord, at_work_on, living_runs, read_plan, read_record, recorded_units, write_plan, write_record

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)

#: Units that are told by number in a message.
_TOLD = 8
#: More units than any export has.
_ANY_UNIT = 1 << 62


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
    _prepare(plan, place, overwrite=overwrite, alone=units is None)
    known = _known_records(plan, place, chosen)
    written: list[UnitRecord] = []
    with nullcontext() if _is_sealed(plan, place) else at_work_on(place, chosen), Progress(plan, chosen, show=progress) as bar:
        left = []
        for unit in chosen:
            record = known.get(unit)
            if record is not None and all(place.holds(file, checked=True) for file in record.files):
                bar.skip(len(plan.rows(unit)))
            else:
                known.pop(unit, None)
                left.append(unit)
        bar.start()
        written.extend(_run_units(plan, left, executor, bar.advance))
    records = [*known.values(), *written]
    if units is None:
        finish(plan)
    _warn_of_notes(records, plan)
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
        sealed=_is_sealed(plan, place),
    )


def run_unit(plan: ExportPlan, unit: int, *, advance: Advance = lambda images, size: None) -> UnitRecord:
    """Write one unit: each of its files beside its place and then renamed into it, then the record that it is finished.

    May be called anywhere, any number of times: the same unit is the same bytes.

    Parameters
    ----------
    plan : what to write
    unit : its number
    advance : called with the images and bytes that were written since the last call
    """
    place = open_place(plan.target)
    rows = plan.rows(unit)
    sealed = _is_sealed(plan, place)
    if not sealed:
        _prepare(plan, place, overwrite=False, alone=False)
    with _one_thread():
        record = plan.format.write_unit(plan.dataset, unit, rows, place, advance)
    if not sealed:
        write_record(place, record)
    return record


def finish(plan: ExportPlan) -> None:
    """Make sure that all units are there, write what belongs to none, and seal the result.

    Raises
    ------
    ExportError
        if units are missing or a run is still at work; says which
    """
    place = open_place(plan.target)
    if _is_sealed(plan, place):
        place.remove(STATE)
        return
    if _look(plan, place)[0] != "nothing":
        _prepare(plan, place, overwrite=False, alone=False)
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
    if fingerprint(plan.dataset) != plan.about["inputs"]:
        raise ExportError(
            f"The input stacks of {plan.target} have changed while they were exported; export them again with overwrite=True."
        )
    manifest = plan.about | {"units": [record.to_json() for record in records]}
    plan.format.write_rest(plan.dataset, records, manifest, place)
    place.remove(STATE)


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


def _look(plan: ExportPlan, place: Place) -> tuple[Literal["nothing", "clearing", "unfinished", "sealed"], list[str]]:
    """What is in a place, and how its plan differs from this one."""
    at_work, manifest = read_plan(place), plan.format.read_manifest(place)
    # Both are there when a run was stopped between sealing and tidying up, or while it removed what was there before it.
    if at_work is not None and (manifest is None or "clearing" in at_work):
        return "clearing" if "clearing" in at_work else "unfinished", differences(at_work, plan.about)
    if manifest is not None:
        return "sealed", differences({name: value for name, value in manifest.items() if name != "units"}, plan.about)
    return "nothing", []


def _prepare(plan: ExportPlan, place: Place, *, overwrite: bool, alone: bool) -> None:
    """Make sure that this plan may be at work in the place, and note that it is.

    Raises
    ------
    ExportExistsError
        if something else is there
    """
    there, unlike = _look(plan, place)
    if overwrite and not alone:
        raise ArgumentError("overwrite=True is for a run of all units: one of several would remove what others wrote.")
    if overwrite and (there in ("nothing", "sealed") or unlike):
        _clear(plan, place)
    elif unlike:
        what = "another export" if there == "sealed" else "another export that is not finished"
        raise ExportExistsError(
            f"{plan.target} holds {what}: {'; '.join(unlike)}. Choose another place, repeat the call that made it to continue it, or pass "
            "overwrite=True to replace it."
        )
    elif there == "clearing":
        _clear(plan, place)
    elif there == "nothing":
        if found := plan.format.leftovers(place):
            if read_plan(place) is not None:  # others that share the work have begun between the two looks
                _prepare(plan, place, overwrite=overwrite, alone=alone)
                return
            raise ExportExistsError(
                f"{plan.target} holds {len(found)} files or folders that this export did not write ({found[0]}, ...). Choose another "
                "place, or pass overwrite=True to replace them."
            )
        _require_room(plan, freed=0)
        write_plan(place, plan.about)


def _clear(plan: ExportPlan, place: Place) -> None:
    """Remove what an earlier export left; until that is done, the place says what it is being cleared for."""
    # What a run that was stopped while it cleared had still to remove: what told of it may be gone.
    found = sorted({*plan.format.leftovers(place), *(read_plan(place) or {}).get("clearing", ())})
    if isinstance(place, LocalPlace):
        roots = [str(place.root / name) for name in found]
        for path in map(os.path.realpath, input_files(plan.dataset)):  # the target is one without links too
            if any(path == root or path.startswith(root + os.sep) for root in roots):
                raise ExportError(f"{plan.target} holds the particles that are to be exported ({path}); choose another place.")
        _require_room(plan, freed=sum(map(_size, map(Path, roots))))
    with at_work_on(place, range(_ANY_UNIT)):
        write_plan(place, plan.about, clearing=found)
        # What makes an export whole goes first, so that what is left of it never looks like one.
        for name in sorted(found, key=lambda name: name != plan.format.seal):
            place.remove(name)
        place.remove(f"{STATE}/units")
        write_plan(place, plan.about)


def _is_sealed(plan: ExportPlan, place: Place) -> bool:
    return _look(plan, place) == ("sealed", [])


def _known_records(plan: ExportPlan, place: Place, units: range) -> dict[int, UnitRecord]:
    """The records of the units that were finished before."""
    if _is_sealed(plan, place):
        manifest = plan.format.read_manifest(place) or {}
        records = [UnitRecord.from_json(values) for values in manifest["units"]]
        return {record.unit: record for record in records if record.unit in units}
    found = {unit: read_record(place, unit) for unit in recorded_units(place) if unit in units}
    return {unit: record for unit, record in found.items() if record is not None}


def _require_room(plan: ExportPlan, *, freed: int) -> None:
    """Raise an ``ExportError`` if the disk cannot hold the images."""
    if "://" in plan.target:
        return
    folder = next(path for path in (Path(plan.target), *Path(plan.target).parents) if path.is_dir())
    free = shutil.disk_usage(folder).free + freed
    if plan.needed_bytes > free:
        raise ExportError(
            f"{plan.target} needs {human_bytes(plan.needed_bytes)} and the disk has {human_bytes(free)} free. Make room, choose another "
            "disk, or write fewer or smaller images."
        )


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    return path.stat().st_size if path.exists() else 0


def _warn_of_notes(records: list[UnitRecord], plan: ExportPlan) -> None:
    """One warning for what happened to images of all units."""
    constant = sum(record.notes.get("constant", 0) for record in records)
    if constant:
        total = sum(len(plan.rows(record.unit)) for record in records)
        warnings.warn(f"{constant} of {total} images are constant and cannot be normalised; they became zeros.", UserWarning, stacklevel=3)


def _told(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_TOLD]))
    return shown + (", ..." if len(numbers) > _TOLD else "")
