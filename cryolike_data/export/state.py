"""What an export at work leaves in ``.export``: its plan, a record of each finished unit, and who is at work on which units."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import ExportError
from .place import PARTIAL, STATE, Place, WrittenFile

#: A run on another machine that has not been heard of for so long is taken for dead. The clocks of the machines may differ by less.
_SILENCE_SECONDS = 120.0
_HEARTBEAT_SECONDS = 15.0
#: Where the plan of the export at work lies.
PLAN = f"{STATE}/plan.json"
_UNITS, _RUNS = f"{STATE}/units", f"{STATE}/runs"
#: More than any export has.
ANY_UNITS = range(1 << 62)
#: What makes known the runs of this process, by name. Of one that has ended it may stay, where the file system was away.
_OURS: set[str] = set()


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit consists of.

    Attributes
    ----------
    unit : its number
    files : in the order in which they were written
    notes : counts that are added up over the units, by what they count
    """

    unit: int
    files: tuple[WrittenFile, ...]
    notes: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"unit": self.unit, "files": [file.to_json() for file in self.files], "notes": self.notes}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> UnitRecord:
        """What ``to_json`` gave."""
        return cls(int(values["unit"]), tuple(map(WrittenFile.from_json, values["files"])), dict(values["notes"]))


@dataclass(frozen=True)
class Manifest:
    """What the seal of an export says of it.

    Attributes
    ----------
    about : what it was made of, see ``ExportPlan``
    units : the records of its units
    rest : the files that belong to no unit, but for the seal
    """

    about: dict[str, Any]
    units: tuple[UnitRecord, ...]
    rest: tuple[WrittenFile, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return self.about | {"units": [record.to_json() for record in self.units], "rest": [file.to_json() for file in self.rest]}

    @classmethod
    def from_json(cls, values: Any) -> Manifest | None:
        """What ``to_json`` gave; None of what is damaged, or is the file of somebody else."""
        try:
            about = {name: value for name, value in values.items() if name not in ("units", "rest")}
            units = tuple(map(UnitRecord.from_json, values["units"]))
            rest = tuple(map(WrittenFile.from_json, values["rest"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return cls(about, units, rest) if about.keys() >= {"format", "version", "inputs"} else None


def to_bytes(values: Any) -> bytes:
    """Plain values as JSON, the same bytes for the same values."""
    return json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"


def write_json(place: Place, name: str, values: Any) -> None:
    """Write plain values to a file."""
    place.write(name, to_bytes(values))


def read_json(place: Place, name: str) -> Any:
    """The values in a file, or None if it is not there or damaged."""
    return _parsed(place.read(name))


def _parsed(content: bytes | None) -> Any:
    try:
        return None if content is None else json.loads(content)
    except ValueError:
        return None


def read_plan(place: Place) -> dict[str, Any] | None:
    """The plan of the export at work, with ``clearing`` in it (see ``write_plan``) while that goes on; None if there is none."""
    return plan_of(place.read(PLAN))


def plan_of(content: bytes | None) -> dict[str, Any] | None:
    """The same of the content of its file, None if there is no file, or a damaged one."""
    found = _parsed(content)
    return found if isinstance(found, dict) and found.keys() >= {"format", "particles"} else None


def write_plan(place: Place, plan: dict[str, Any], *, clearing: Sequence[str] | None = None) -> None:
    """Note the plan of the export that is at work from now on, and what of earlier ones has to be removed before it begins."""
    write_json(place, PLAN, plan | ({} if clearing is None else {"clearing": list(clearing)}))


def read_record(place: Place, unit: int) -> UnitRecord | None:
    """The record of a finished unit, or None."""
    try:
        return UnitRecord.from_json(read_json(place, _record_name(unit)))
    except (KeyError, TypeError, ValueError):
        return None


def write_record(place: Place, record: UnitRecord) -> None:
    """Note that a unit is finished."""
    write_json(place, _record_name(record.unit), record.to_json())


def recorded_units(place: Place) -> list[int]:
    """The numbers of the units that have a record."""
    numbers = (name.removesuffix(".json") for name in place.names(_UNITS))
    return [int(number) for number in numbers if number.isdecimal()]  # a network file system puts names of its own there


def describe_unfinished(place: Place) -> str | None:
    """What to say of an export that is at work or was stopped, or None if there is no trace of one."""
    plan = read_plan(place)
    if plan is None:
        return None
    return (
        f"an export that is not finished ({len(recorded_units(place))} units are, of {plan['particles']:,} particles in all). "
        "Run the same export again to continue it, or seal it with --finish where several runs share the work"
    )


class BeingSealedError(ExportError):
    """Another process seals the export."""


@contextmanager
def at_work_on(place: Place, units: range, *, sealing: bool = False) -> Iterator[None]:
    """Make known that this process works on some units, or seals what was made of them, for as long as the context lasts.

    Raises
    ------
    BeingSealedError
        if another living process seals the export
    ExportError
        if one works on some of the units
    """
    name = f"{_RUNS}/{uuid.uuid4().hex}.json"
    about = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "began": _process_start(os.getpid())}
    own = about | {"first": units.start, "stop": units.stop, "step": units.step, "sealing": sealing}

    def make_known() -> None:
        write_json(place, name, own | {"seen": time.time()})

    ended = threading.Event()

    def keep_known() -> None:
        while not ended.wait(_HEARTBEAT_SECONDS):
            with suppress(ExportError):  # the next one may be written
                make_known()
        # Here too, where no Ctrl-C comes: whoever lives on after one would be taken for being at work.
        with suppress(ExportError):
            place.remove(name)

    thread = threading.Thread(target=keep_known, name="cryolike-export", daemon=True)
    try:
        _OURS.add(name)
        # First known, then looking: of two that start at once, at least one sees the other.
        make_known()
        others = living_runs(place, ANY_UNITS, apart_from=name)
        if in_the_way := [run for run in others if _have_common(_units_of(run), units)]:
            only_seal = all(run.get("sealing") for run in in_the_way)
            what = f"{place} cannot be sealed yet" if sealing else "Another run is at work on this target"
            raise (BeingSealedError if only_seal else ExportError)(
                f"{what}: {_told(in_the_way[0])}. Wait for it or stop it, then run the same export again."
            )
        if not others:  # who may write more slowly than that
            place.remove_abandoned(_SILENCE_SECONDS)
        thread.start()
        yield
    finally:
        _OURS.discard(name)
        ended.set()
        if thread.is_alive():
            thread.join()
        place.remove(name)


def living_runs(place: Place, units: range, *, apart_from: str = "") -> list[dict[str, Any]]:
    """The other processes at work on some of these units; what dead ones left is removed."""
    found = []
    for name in place.names(_RUNS):
        path = f"{_RUNS}/{name}"
        if path == apart_from or not name.endswith(".json"):  # a network file system puts names of its own there
            continue
        run = _read_run(place, path)
        if run is None or not _is_alive(run, path):
            place.remove(path)
        elif _have_common(_units_of(run), units):
            found.append(run)
    return found


def tidy_up(place: Place) -> None:
    """Remove what is of no use beside an export that is sealed; what cannot be removed does no harm."""
    for name in (_UNITS, PARTIAL, PLAN):
        with suppress(ExportError):  # such as for a sign of life that is being written
            place.remove(name)
    with suppress(ExportError):
        living_runs(place, ANY_UNITS)  # which removes what dead ones left


def _read_run(place: Place, name: str) -> dict[str, Any] | None:
    """What a run says of itself; None if it is gone or, as it is written whole, damaged since, as by a power cut."""
    found = read_json(place, name)
    return found if isinstance(found, dict) and found.keys() >= {"host", "machine", "pid", "began", "first", "stop", "seen"} else None


def _units_of(run: dict[str, Any]) -> range:
    return range(run["first"], run["stop"], run.get("step", 1))


def _have_common(one: range, other: range) -> bool:
    fewer, more = sorted((one, other), key=len)
    return any(unit in more for unit in fewer)


def _told(run: dict[str, Any]) -> str:
    units = _units_of(run)
    steps = "" if units.step == 1 else f" in steps of {units.step}"
    which = "all units" if units == ANY_UNITS else f"units {units[0]} to {units[-1]}{steps}"
    return f"process {run['pid']} on {run['host']}, {which}"


def _record_name(unit: int) -> str:
    return f"{_UNITS}/{unit:06d}.json"


def _is_alive(run: dict[str, Any], name: str) -> bool:
    if run["machine"] == _machine():
        if run["pid"] == os.getpid():
            return name in _OURS
        if (began := _process_start(run["pid"])) is not None:
            return bool(run["began"] == began)
    return time.time() - float(run["seen"]) < _SILENCE_SECONDS


@cache
def _machine() -> str:
    """What tells apart machines, and containers with process numbers of their own."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _process_start(pid: int) -> str | None:
    """When a process began, on the clock of its machine; "" if there is no such process. Tells it from a later one of its number.

    None if the system does not tell: macOS of any process that there is, Linux of those of other users, it may be.
    """
    with suppress(FileNotFoundError, PermissionError), open(f"/proc/{pid}/stat") as file:  # or there is no /proc
        state, *rest = file.read().rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    with suppress(PermissionError):
        try:
            if sys.platform != "win32":  # where that would interrupt the process
                os.kill(pid, 0)
        except ProcessLookupError:
            return ""
    return None
