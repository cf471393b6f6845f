"""Tables put side by side by uid, never by row, and the ``.csg`` groups that say which tables belong together."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, MissingDependencyError, MissingStackError, PairingError, TableError
from ..on_disk import expanded, is_file
from .columns import require_known_columns
from .paths import folders_around
from .table import Table, read_table

Unmatched = Literal["error", "drop"]

log = logging.getLogger(__name__)


def load_table(
    path: str | os.PathLike[str],
    *,
    passthrough: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    unmatched: Unmatched = "error",
) -> Table:
    """A ``.cs`` or ``.csg`` file, joined by uid with the tables given as ``passthrough``.

    The rows and their order are those of the first table; where two tables hold the same group of columns (``blob``,
    ``ctf``, ...) the first wins. Opening a NumPy table costs milliseconds; its columns are copied out when they are asked for.
    CSDAT tables (LZ4, from cryosparc-tools >= 4.4) are read whole and need the extra ``csdat``, groups the extra ``csg``.

    Parameters
    ----------
    path : the table or group
    passthrough : table(s) or group(s) with further groups of columns
    unmatched : "error", or "drop" to leave out rows without a partner

    Raises
    ------
    MissingStackError
        if there is no such file
    TableError
        if one cannot be read, is no CryoSPARC table, is truncated, or holds Python objects; says which
    PairingError
        if tables that are to be joined do not hold the same particles
    """
    require_unmatched(unmatched)
    extra = [] if passthrough is None else [passthrough] if isinstance(passthrough, str | os.PathLike) else list(passthrough)
    table = _read_any(path, unmatched)
    for other in extra:
        table = join_tables(table, _read_any(other, unmatched), unmatched=unmatched)
    return table


def require_unmatched(unmatched: object) -> None:
    """Raise an ``ArgumentError`` for anything but "error" and "drop"."""
    if unmatched not in ("error", "drop"):
        raise ArgumentError(f'unmatched is "error" or "drop", not {unmatched!r}')


def join_tables(table: Table, other: Table, *, unmatched: Unmatched = "error") -> Table:
    """``table`` with the column groups that only ``other`` has, row for row by uid.

    Raises
    ------
    PairingError
        if uids are zero or occur twice, or if rows of either table have no partner (``unmatched="drop"`` leaves them out
        and logs how many)
    """
    left, right = usable_uid(table), usable_uid(other)
    rows = match_uids(left, right)
    lonely = rows < 0
    n_left, n_right = int(lonely.sum()), len(right) - int((~lonely).sum())
    if n_left or n_right:
        told = (
            f"{table.path} and {other.path} do not hold the same particles: {n_left} of {len(left)} rows of the first and {n_right} of "
            f"{len(right)} rows of the second have no partner with the same uid"
        )
        if unmatched == "error":
            first = [*left[lonely][:3], *np.delete(right, rows[~lonely])[:3]]
            shown = ", ".join(map(str, first))
            raise PairingError(f'{told} (first: uid {shown}). If that is intended, unmatched="drop" keeps the rows that both have.')
        if lonely.all():
            raise PairingError(f"{told}: they share no uid at all. Are they of the same particles?")
        log.warning("%s; they are left out.", told)
    return side_by_side(table, np.flatnonzero(~lonely) if n_left else None, other, rows[~lonely])


def side_by_side(table: Table, rows: np.ndarray | None, other: Table, other_rows: np.ndarray, *, prefer: Collection[str] = ()) -> Table:
    """Chosen rows of two tables next to each other.

    A column group that both have comes from ``table``, unless it is named in ``prefer``. ``rows=None`` means all.
    """
    theirs = {slot for slot in other.slots if slot not in table.slots or slot in prefer}
    parts = {name: _Part(table, rows) for name in table.fields if name.split("/")[0] not in theirs}
    parts |= {name: _Part(other, other_rows) for name in other.fields if name.split("/")[0] in theirs}
    fields = {name: part.table.fields[name] for name, part in parts.items()}
    return Table(table.path, fields, len(other_rows), _SideBySide(parts), table.take_kept(rows))


def take_rows(table: Table, rows: np.ndarray) -> Table:
    """A table of the given rows only."""
    parts = {name: _Part(table, rows) for name in table.fields}
    return Table(table.path, table.fields, len(rows), _SideBySide(parts), table.take_kept(rows))


def take_slots(table: Table, slots: Collection[str]) -> Table:
    """A table with the uid and the given column groups only."""
    fields = {name: dtype for name, dtype in table.fields.items() if "/" not in name or name.split("/")[0] in slots}
    return Table(table.path, fields, table.rows, _SideBySide({name: _Part(table, None) for name in fields}), table.kept)


def match_uids(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each uid of ``left`` the row of ``right`` that has it, or -1; both hold each uid once."""
    # In order, because looking up one after the other all over the memory takes ten times as long as sorting.
    of_left, of_right = np.argsort(left), np.argsort(right)
    sought, there = left[of_left], right[of_right]
    place = np.searchsorted(there, sought)
    inside = place < len(there)
    inside[inside] = there[place[inside]] == sought[inside]
    rows = np.full(len(left), -1)
    rows[of_left[inside]] = of_right[place[inside]]
    return rows


@dataclass(frozen=True)
class _Part:
    table: Table
    rows: np.ndarray | None


@dataclass(frozen=True)
class _SideBySide:
    parts: dict[str, _Part]

    def __getitem__(self, name: str) -> np.ndarray:
        part = self.parts[name]
        return part.table[name] if part.rows is None else part.table[name][part.rows]

    def load(self, fields: Mapping[str, np.dtype[Any]], rows: np.ndarray | None) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = {}
        for name in fields:
            if name in columns:
                continue
            table, of_table = self.parts[name].table, self.parts[name].rows
            # All that come from the same rows of the same table, in one pass over it.
            beside = {other for other in fields if self.parts[other].table is table and self.parts[other].rows is of_table}
            taken = of_table if rows is None else rows if of_table is None else of_table[rows]
            loaded = table.load(beside.__contains__, rows=taken)
            columns |= {other: loaded[other] for other in beside}
        return {name: columns[name] for name in fields}

    def origin(self, name: str) -> Path:
        return self.parts[name].table.origin(name)


def usable_uid(table: Table) -> np.ndarray:
    """The uids of a table, or a ``PairingError`` if they are absent, all zero or not unique, a ``TableError`` if they are no integers."""
    if "uid" not in table:
        raise PairingError(f"{table.path} has no uid column, so its rows cannot be matched with another table's.")
    require_known_columns(table)
    uid = table["uid"].astype(np.uint64, copy=False)
    if len(uid) and not uid.any():
        raise PairingError(f"All {len(uid)} uids of {table.path} are zero, so its rows cannot be matched with another table's.")
    values, counts = np.unique(uid, return_counts=True)
    repeated = values[counts > 1]
    if len(repeated):
        shown = ", ".join(map(str, repeated[:3]))
        raise PairingError(
            f"{len(repeated)} uids of {table.path} occur more than once (first: {shown}), so its rows cannot be matched one to one. "
            "Remove the duplicates in CryoSPARC (job Remove Duplicate Particles) first."
        )
    return uid


def _read_any(path: str | os.PathLike[str], unmatched: Unmatched) -> Table:
    path = expanded(path)
    if path.suffix.lower() != ".csg":
        return read_table(path)
    tables = [take_slots(read_table(file), slots) for file, slots in csg_files(path).items()]
    table = tables[0]
    for other in tables[1:]:
        table = join_tables(table, other, unmatched=unmatched)
    return table


def csg_files(path: Path) -> dict[Path, list[str]]:
    """The tables that a ``.csg`` group names, each with the column groups to take from it.

    The one that defines the rows comes first; passthrough tables come last.

    Raises
    ------
    TableError
        if the group cannot be read, holds no particles or a table has another number of rows than it says
    MissingStackError
        if a table that it names is not there
    """
    slots: dict[Path, list[str]] = {}
    counts: dict[Path, int | None] = {}
    for slot, entry in csg_results(path).items():
        file = find_metafile(path, str(entry["metafile"]))
        slots.setdefault(file, []).append(slot)
        counts.setdefault(file, entry["num_items"])
    if not slots:
        raise TableError(f"{path} does not describe particles.")
    missing = [file for file in slots if not is_file(file)]
    if missing:
        raise MissingStackError("\n".join([f"{len(missing)} tables named by {path} were not found:", *(f"  {file}" for file in missing)]))
    for file, count in counts.items():
        rows = len(read_table(file))
        if count is not None and rows != count:
            raise TableError(f"{path} promises {count} rows in {file.name}, which has {rows}; export the group again.")
    return {file: slots[file] for file in sorted(slots, key=lambda file: "passthrough" in file.name)}


def csg_results(path: Path) -> dict[str, dict[str, Any]]:
    """The particle results of a ``.csg`` group by column group (blob, ctf, ...), each with its ``metafile``; empty if it has none."""
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(f'{path} is a .csg group, which needs PyYAML: pip install "cryolike-data[csg]"') from error
    if not is_file(path):
        raise MissingStackError(f"There is no group file {path}.")
    try:
        results = yaml.safe_load(path.read_text("utf-8"))["results"]
        of_particles = {slot: dict(entry) for slot, entry in results.items() if str(entry.get("type", "particle")).startswith("particle")}
        for entry in of_particles.values():
            entry["num_items"] = None if entry.get("num_items") is None else int(entry["num_items"])
        return {slot: entry for slot, entry in of_particles.items() if entry["metafile"]}
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise TableError(f"{path} is not a CryoSPARC group file: it should list results with a metafile each ({error}).") from error


def find_metafile(group: Path, name: str) -> Path:
    """The table a group names: ``>file`` lies beside the group, any other path starts at the project directory above it."""
    beside = group.parent / name.removeprefix(">")
    around = [Path(os.path.realpath(group)).parent] if name.startswith(">") else folders_around(group)
    candidates = [beside, *(folder / name.removeprefix(">") for folder in around)]
    return next((file for file in candidates if is_file(file)), beside)
