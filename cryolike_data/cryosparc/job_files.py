"""What lies in a job folder: its table, its numbered stacks, and its record of which image is whose."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingDependencyError, MissingStackError, PairingError, TableError
from ..on_disk import is_file, is_folder
from .columns import require_known_columns
from .join import csg_results, find_metafile
from .paths import unique_paths
from .table import Table, read_table

log = logging.getLogger(__name__)

_BATCH = re.compile(r"batch_(\d+)_(restacked|downsample)\.mrcs?$")
_KINDS = {"restack": ("restacked", "restacked_particles.cs"), "downsample": ("downsample", "downsampled_particles.cs")}


@dataclass(frozen=True)
class JobStacks:
    """The numbered stacks of a job in ``folder``; the first ``in_sequence`` of them are numbered 0, 1, 2, ... without a gap."""

    folder: Path
    by_number: dict[int, Path]
    in_sequence: int

    @property
    def paths(self) -> list[Path]:
        """Those numbered without a gap, in order."""
        return [self.by_number[number] for number in range(self.in_sequence)]

    @property
    def later(self) -> list[Path]:
        """Those beyond the first gap, in order."""
        return [path for number, path in sorted(self.by_number.items()) if number > self.in_sequence]

    @property
    def record_name(self) -> str:
        """The file in which the job that made them notes which image is whose."""
        return _KINDS[self.folder.name][1]

    def number(self, name: str) -> int | None:
        """The number of the stack that a ``blob/path`` means, if it means one of this job and kind."""
        path = Path(name.removeprefix(">"))
        match = _BATCH.match(path.name)
        ours = path.parts[-3:-1] == (self.folder.parent.name, self.folder.name) or path.parts[:-1] == (self.folder.name,)
        return int(match[1]) if match and ours and match[2] == _KINDS[self.folder.name][0] else None


def read_passthrough(job: Path, number: int) -> Table:
    """The table of a job folder, whose rows go in step with its stacks."""
    if not is_folder(job):
        near = sorted(path.name for path in job.parent.glob("J*") if os.path.isdir(path))[:8]
        told = f"there are {', '.join(near)}" if near else f"give the project folder, the one that holds {job.name}"
        raise MissingStackError(f"There is no job folder {job}; {told}.")
    path = job / f"J{number}_passthrough_particles.cs"
    if not is_file(path):
        near = sorted(file.name for file in job.glob("*.cs"))
        raise MissingStackError(
            f"There is no table {path}; a job folder needs one whose rows go in step with its stacks. "
            + (f"If one of {', '.join(near[:6])} has blob/path, open it with IndexedDataset." if near else "There is no .cs file in it.")
        )
    return read_table(path)


def find_stacks(job: Path) -> JobStacks:
    """The stacks of a job: ``restack/`` before ``downsample/``; numbers with any zero padding, from 0 to the first gap.

    Raises
    ------
    MissingStackError
        if there are none, or their folder cannot be listed
    PairingError
        if two have the same number
    """
    looked = []
    for kind, (word, _) in _KINDS.items():
        by_number: dict[int, Path] = {}
        for path in _listed(job / kind):
            match = _BATCH.match(path.name)
            if match is None or match[2] != word:
                continue
            twin = by_number.setdefault(int(match[1]), path)
            if twin is not path and twin.resolve() != path.resolve():  # links in .mrcs, which RELION wants, are no others
                raise PairingError(f"{twin.name} and {path.name} in {path.parent} have the same number; keep one of them.")
        if by_number:
            n = next(i for i in range(len(by_number) + 1) if i not in by_number)
            return JobStacks(job / kind, by_number, n)
        looked.append(f"{job / kind}/batch_*_{word}.mrc")
    raise MissingStackError(f"There are no stacks in {job}: looked for {' and '.join(looked)}.")


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where there is none. One that is out of reach is an error: another does not stand in for it."""
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_symlink():
            raise MissingStackError(f"{folder} is a link to {os.readlink(folder)}, which is no folder.") from None
        return []
    except OSError as error:
        raise MissingStackError(f"{folder} cannot be listed: {error.strerror}.") from error


def find_record(job: Path, stacks: JobStacks, passthrough: Table, *, needed: bool) -> Table | None:
    """The job's own record of which image each uid is: a table with uid and blob columns that points to these stacks."""
    for table in _possible_records(job, stacks, needed=needed):
        if {"uid", "blob/path", "blob/idx"} <= set(table.fields):
            if _points_to(table, stacks):
                return table
            if table.path != passthrough.path:
                log.warning(
                    "%s names other stacks than those in %s, whose order cannot be checked against it: has the folder of the job been "
                    "renamed?",
                    table.path,
                    stacks.folder,
                )
    return passthrough if {"blob/path", "blob/idx"} <= set(passthrough.fields) and _points_to(passthrough, stacks) else None


def _possible_records(job: Path, stacks: JobStacks, *, needed: bool) -> Iterator[Table]:
    named = job / stacks.record_name
    if is_file(named):
        yield read_table(named)
    for group in (path for path in _listed(job) if path.suffix == ".csg"):
        try:
            blob = csg_results(group).get("blob")
        except (TableError, MissingStackError, MissingDependencyError) as error:
            if needed and isinstance(error, MissingDependencyError):
                raise
            log.warning("%s is left aside: %s", group, error)
            continue
        path = None if blob is None else find_metafile(group, str(blob["metafile"]))
        if path is not None and not is_file(path):
            log.warning("The order of the images cannot be checked against %s, which %s names: it is not there.", path, group)
        elif path is not None and path != named:
            yield read_table(path)


def _points_to(table: Table, stacks: JobStacks) -> bool:
    require_known_columns(table)
    names, _ = unique_paths(table["blob/path"])
    return any(stacks.number(name) is not None for name in names)
