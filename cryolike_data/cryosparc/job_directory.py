"""``JobDirectoryDataset``: a job folder whose table rows go in step with numbered stacks in ``restack/`` or ``downsample/``."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any, Literal

import numpy as np

from ..dataset import ParticleDataset
from ..errors import ArgumentError, MissingStackError, PairingError
from ..mrc import Mode0, require_mode0
from ..on_disk import expanded
from ..particles import Selection
from ..stacks import Stacks, images_needed, open_stacks
from .assemble import assemble
from .columns import image_numbers, require_known_columns, says_where
from .job_files import JobStacks, find_record, find_stacks, read_passthrough
from .join import Unmatched, join_tables, match_uids, require_unmatched, side_by_side, take_rows, take_slots, usable_uid
from .paths import resolve_paths, unique_paths
from .table import Table

log = logging.getLogger(__name__)

Pairing = Literal["sequence", "uid"]


class JobDirectoryDataset(ParticleDataset):
    """The particles of a restack or downsample job. Row k of ``J{n}_passthrough_particles.cs`` is item k.

    Parameters
    ----------
    folder : the project folder, which holds ``J{n}/``
    job_number : n
    pairing : "sequence" takes row k for image k over the numbered stacks, from 0 to the first missing number; "uid" finds
        each row's image by uid in the job's own record of them (``restacked_particles.cs``, ``downsampled_particles.cs``, or
        the table that a ``.csg`` there names). Real restack jobs are not always in sequence: where such a record is at hand
        and contradicts the sequence, that is an error.
    pixel_size : angstrom; default ``blob/psize_A``, then the MRC header where it is plausible
    unmatched : "error", or "drop" to leave out rows without a partner (``pairing="uid"`` only)
    select : which rows to take: a mask, row numbers, a slice, or a function of the particles
    mode0 : how to read 8-bit pixels, see ``cryolike_data.mrc.read_header``

    Warns
    -----
    UserWarning
        if there are more rows than images, or stacks beyond a gap in the numbering; both counts are given

    Raises
    ------
    MissingStackError
        if the job, its table or its stacks are not there
    PairingError
        if rows run out before images do, or the job's own record contradicts the sequence
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        job_number: int,
        *,
        pairing: Pairing = "sequence",
        pixel_size: Any = None,
        unmatched: Unmatched = "error",
        select: Selection = None,
        mode0: Mode0 = "auto",
    ) -> None:
        if pairing not in ("sequence", "uid"):
            raise ArgumentError(f'pairing is "sequence" or "uid", not {pairing!r}')
        require_unmatched(unmatched)
        require_mode0(mode0)
        if isinstance(job_number, str):
            raise ArgumentError(f"job_number is the number in the name of the job folder, such as 4 of J4, not {job_number!r}")
        job = expanded(folder).absolute() / f"J{job_number}"
        table = read_passthrough(job, job_number)
        stacks = find_stacks(job)
        require_known_columns(table)
        record = find_record(job, stacks, table, needed=pairing == "uid")
        if pairing == "uid":
            table, pool, file, image, names = _pair_by_uid(table, stacks, record, unmatched, mode0)
        else:
            table, pool, file, image = _pair_in_sequence(table, stacks, record, mode0)
            names = None
        needed = images_needed(file, image, len(pool.paths))
        particles = assemble(table, table.load(says_where), pool, file, image, needed, blob_paths=names, pixel_size=pixel_size)
        super().__init__(particles, pool, select=select)
        self.tables = table.files


def without_blob(table: Table) -> Table:
    """The table without ``blob/*``, which in a passthrough table may be those of an earlier job."""
    return take_slots(table, [slot for slot in table.slots if slot != "blob"])


def _pair_in_sequence(table: Table, stacks: JobStacks, record: Table | None, mode0: Mode0) -> tuple[Table, Stacks, np.ndarray, np.ndarray]:
    if not stacks.in_sequence:
        first = min(stacks.by_number.items())[1]
        raise MissingStackError(f"{stacks.folder} holds {first.name} but no stack number 0; row k is image k only from number 0 on.")
    pool = open_stacks(stacks.paths, mode0=mode0)
    counts = np.array([header.nz for header in pool.headers])
    n_rows, n_images = len(table), int(counts.sum())
    later = f", and stops before {', '.join(path.name for path in stacks.later[:3])}" if stacks.later else ""
    told = f"{table.path.name} has {n_rows} rows and {stacks.folder} has {n_images} images in {len(counts)} stacks numbered from 0{later}"
    if n_rows < n_images:
        raise PairingError(f"{told}: rows run out, so row k cannot be image k. Is this the table of another job or of a selection?")
    if n_rows > n_images or stacks.later:
        warnings.warn(f"{told}. The first {n_images} rows are used.", UserWarning, stacklevel=3)
    if n_rows > n_images:
        table = take_rows(table, np.arange(n_images))
    file = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    image = np.arange(n_images) - np.repeat(np.cumsum(counts) - counts, counts)
    if record is not None:
        table = _check_sequence(table, record, stacks, file, image)
    elif "blob/path" in table:
        # A passthrough may carry the blob of an earlier job, whose pixel size and box are not those of these stacks.
        log.warning("blob/* of %s names other stacks than those in %s and is not used.", table.path, stacks.folder)
        table = without_blob(table)
    return table, pool, file, image


def _check_sequence(table: Table, record: Table, stacks: JobStacks, file: np.ndarray, image: np.ndarray) -> Table:
    """The table with the record's columns beside it, after making sure that the record does not contradict the sequence."""
    rows = np.arange(len(table)) if record.path == table.path else _record_rows(table, record)
    if rows is None:
        return without_blob(table)
    names, number = unique_paths(record["blob/path"])
    numbers = np.array([-1 if (found := stacks.number(name)) is None else found for name in names])
    agrees = (rows >= 0) & (numbers[number[rows]] == file) & (record["blob/idx"][rows] == image)
    if not agrees.all():
        row = int(np.flatnonzero(~agrees)[0])
        said = f"image {record['blob/idx'][rows[row]]} of {names[number[rows[row]]]}" if rows[row] >= 0 else "not in it"
        raise PairingError(
            f"The rows of {table.path.name} are not in the order of the images: by {record.path.name}, {int((~agrees).sum())} of "
            f"{len(table)} rows belong to another image (row {row} is {said}, not image {image[row]} of {stacks.paths[file[row]].name}). "
            'Pass pairing="uid" to join them by uid.'
        )
    return table if record.path == table.path else side_by_side(table, None, record, rows, prefer=("blob",))


def _record_rows(table: Table, record: Table) -> np.ndarray | None:
    if "uid" not in table or not table["uid"].any():
        log.warning("%s has no uids, so its order cannot be checked against %s.", table.path, record.path.name)
        return None
    return match_uids(usable_uid(table), usable_uid(record))


def _pair_by_uid(
    table: Table, stacks: JobStacks, record: Table | None, unmatched: Unmatched, mode0: Mode0
) -> tuple[Table, Stacks, np.ndarray, np.ndarray, list[str]]:
    if record is None:
        raise PairingError(
            f'pairing="uid" needs the job\'s record of its images in {stacks.folder.parent}: {stacks.record_name}, or a .csg '
            'that names such a table. Copy it there, or use pairing="sequence" if you know that row k is image k.'
        )
    if record.path != table.path:
        table = join_tables(without_blob(table), record, unmatched=unmatched)
    names, file = unique_paths(table["blob/path"])
    # By number, whatever the zero padding; a name that is none of this job's stacks is looked for as in an indexed file.
    here = [stacks.by_number.get(-1 if (number := stacks.number(name)) is None else number) for name in names]
    elsewhere = [k for k, path in enumerate(here) if path is None]
    found = resolve_paths(
        [names[k] for k in elsewhere],
        lambda: np.bincount(file)[elsewhere].tolist(),
        table=record.path,
        remedy=f"Those of this job have to lie in {stacks.folder}.",
    )
    paths = [str(path) if path is not None else found[elsewhere.index(k)] for k, path in enumerate(here)]
    return table, open_stacks(paths, mode0=mode0), file, image_numbers(table), names
