"""Before a plan runs: what is in its place already, whether that may be continued or replaced, and whether there is room."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal

from ..dataset import human_bytes
from ..errors import ArgumentError, ExportError, ExportExistsError
from ..file_size import file_size
from ..fingerprint import differences, input_files
from ..zarr_store import is_url
from .place import STATE, LocalPlace, Output, Place, explained
from .plan import ExportPlan
from .state import ANY_UNITS, PLAN, UnitRecord, at_work_on, plan_of, read_plan, read_record, recorded_units, write_plan


def look(plan: ExportPlan, place: Place) -> tuple[Literal["nothing", "clearing", "unfinished", "sealed"], list[str]]:
    """What is in a place, and how its plan differs from this one."""
    written = place.read(PLAN)
    manifest = plan.format.read_manifest(place)
    if written == plan.about_bytes and manifest is None:
        return "unfinished", []  # as it is several times for each unit: nothing has to be taken apart
    at_work = plan_of(written)
    # Both are there when a run was stopped between sealing and tidying up, or while it removed what was there before it.
    if at_work is not None and (manifest is None or "clearing" in at_work):
        return "clearing" if "clearing" in at_work else "unfinished", differences(at_work, plan.about)
    if manifest is not None:
        # Earlier versions did not note the names; what is whole is kept unchanged or refused, file by file.
        return "sealed", differences({"names": plan.about.get("names")} | manifest.about, plan.about)
    return "nothing", []


def prepare(plan: ExportPlan, place: Place, *, overwrite: bool, alone: bool) -> bool:
    """Make sure that this plan may be at work in the place, and note that it is; whether it has been sealed there already.

    Raises
    ------
    ExportExistsError
        if something else is there
    """
    there, unlike = look(plan, place)
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
                return prepare(plan, place, overwrite=overwrite, alone=alone)
            raise ExportExistsError(
                f"{plan.target} holds {len(found)} files or folders that this export did not write ({found[0]}, ...). Choose another "
                "place, or pass overwrite=True to replace them."
            )
        _require_room(plan, freed=0)
        write_plan(place, plan.about)
    return there == "sealed" and not overwrite


def _clear(plan: ExportPlan, place: Place) -> None:
    """Remove what an earlier export left; until that is done, the place says what it is being cleared for."""
    found = _to_remove(plan, place)
    _require_apart(plan, found)
    if isinstance(place, LocalPlace):
        paths = [place.root / name for name in found]
        _require_room(plan, freed=sum(map(_size, paths)))
        _require_removable(paths)
    with at_work_on(place, ANY_UNITS):
        found = _to_remove(plan, place)  # once more: others may have written until now, and do not from now on
        write_plan(place, plan.about, clearing=found)
        # What makes an export whole goes first, so that what is left of it never looks like one.
        for name in sorted(found, key=lambda name: name != plan.format.seal):
            place.remove(name)
        place.remove(f"{STATE}/units")
        write_plan(place, plan.about)


def _to_remove(plan: ExportPlan, place: Place) -> list[str]:
    """What an earlier export left, and what a run that was stopped while it cleared had still to remove: what told of it may be gone."""
    return sorted({*plan.format.leftovers(place), *(read_plan(place) or {}).get("clearing", ())})


def place_only_ours(plan: ExportPlan, place: Place, doing: str, known: UnitRecord | None = None) -> None:
    """Have a place refuse files as soon as another export is at work there, and such as are not those of a record that is known."""

    # Given the place, which must not hold itself, and with it the plan and all files that this maps.
    def require_ours(place: Place, output: Output) -> None:
        there, unlike = look(plan, place)
        if unlike or there not in ("unfinished", "sealed"):
            raise ExportError(f"{plan.target} was given to another export while {doing} for this one.")
        if known is not None and output.written not in known.files:
            raise ExportError(
                f"{plan.target} is finished, but {output.written.name} is damaged and does not become what it was: the input stacks have "
                "changed since, or programs that it was made with. Export again with overwrite=True."
            )

    place.before_placing = require_ours


def is_sealed(plan: ExportPlan, place: Place) -> bool:
    """Whether this very export is in the place, and whole."""
    return look(plan, place) == ("sealed", [])


def known_records(plan: ExportPlan, place: Place, units: range) -> dict[int, UnitRecord]:
    """The records of the units that were finished before."""
    if is_sealed(plan, place) and (manifest := plan.format.read_manifest(place)) is not None:
        return {record.unit: record for record in manifest.units if record.unit in units}
    found = {unit: read_record(place, unit) for unit in recorded_units(place) if unit in units}
    return {unit: record for unit, record in found.items() if record is not None}


def _require_apart(plan: ExportPlan, names: Iterable[str]) -> None:
    """Raise an ``ExportError`` if what is to be removed from the target holds anything that is read, or is a part of it."""
    removed = {_without_links(f"{plan.target}/{name}") for name in names}
    around = {folder for path in removed for folder in path.parents}
    for path in (*input_files(plan.dataset), *plan.dataset.tables):
        # A link is needed as much as the file that it leads to.
        for needed in (_without_links(path), _without_links(path if is_url(path) else os.path.realpath(path))):
            if needed in around or not removed.isdisjoint((needed, *needed.parents)):
                raise ExportError(f"{plan.target} holds the particles that are to be exported ({path}); choose another place.")


def _without_links(path: str) -> PurePath:
    """A path by folders that are no links; its last part may be one. Two spellings of a URL give the same."""
    path = path.removeprefix("local://")  # which fsspec takes for a folder
    if is_url(path):
        return PurePosixPath(path)
    folder, name = os.path.split(path.rstrip("/"))
    return PurePath(os.path.realpath(folder), name)


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


def _require_removable(paths: Sequence[Path]) -> None:
    """Raise an ``ExportError`` if some of these files and folders cannot be removed, before the others are."""
    inside = {Path(folder, name) for path in paths for folder, names, _ in os.walk(path) for name in names}
    folders = {*(path.parent for path in paths), *paths, *inside}
    by_effective_user = os.access in os.supports_effective_ids
    for folder in sorted(path for path in folders if os.path.isdir(path) and not path.is_symlink()):
        with explained(folder, "emptied"):
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=by_effective_user):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder, which somebody else may be removing."""
    files = [path, *(Path(folder, name) for folder, _, names in os.walk(path) for name in names)]
    return sum(max(0, file_size(str(file))) for file in files if os.path.isfile(file))
