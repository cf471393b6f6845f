"""Which particles a command is about: the options that every command has, and the data set that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from .cryosparc import IndexedDataset, JobDirectoryDataset
from .cryosparc.columns import CTF_FIELDS
from .cryosparc.job_directory import Pairing, without_blob
from .cryosparc.job_files import read_passthrough
from .cryosparc.join import Unmatched, load_table
from .cryosparc.table import Table
from .dataset import ParticleDataset
from .errors import ArgumentError
from .mrc import Mode0
from .on_disk import expanded, is_file, is_folder
from .particles import Particles, Selection
from .selection import choose
from .zarr_dataset import ZarrDataset

#: Options that mean nothing for a Zarr store.
_OF_STACKS = ("folder", "index_base", "passthrough", "pixel_size", "pairing", "mode0", "unmatched")


def add_source(parser: argparse.ArgumentParser) -> None:
    """The options that say where particles are and which of them are meant."""
    parser.add_argument("file", type=_location, metavar="FILE", help=".cs, .csg or .zarr (or its URL); with --job the project folder")
    parser.add_argument("--job", type=int, metavar="N", help="read the job directory FILE/JN")
    parser.add_argument("--folder", type=Path, help="where the stacks lie, by file name")
    parser.add_argument("--passthrough", type=Path, action="append", help="a table with further columns, joined by uid; may be repeated")
    parser.add_argument("--index-base", type=int, choices=(0, 1), help="1 if blob/idx counts from 1 (default: 0)")
    parser.add_argument("--pairing", choices=get_args(Pairing), help="how rows of a job find their images (default: sequence)")
    parser.add_argument("--pixel-size", type=float, help="angstrom (default: from the table or the MRC headers)")
    parser.add_argument("--mode0", choices=get_args(Mode0), help="how to read 8-bit pixels (default: auto)")
    parser.add_argument(
        "--unmatched", choices=get_args(Unmatched), help="what to do with rows that have no partner by uid (default: error)"
    )

    particles = parser.add_argument_group("which particles", "in this order: group, conditions, half, every, shuffle, limit")
    particles.add_argument("--group", type=int, help="of this exposure group only")
    particles.add_argument("--where", action="append", default=[], metavar="CONDITION", help="such as 'ctf/df1_A < 20000'; may be repeated")
    particles.add_argument("--half", choices=("A", "B"), help="one half set")
    particles.add_argument("--every", type=int, metavar="N", help="one of N particles")
    particles.add_argument("--shuffle", type=int, metavar="SEED", help="in a random order; reading an export in order is random then")
    particles.add_argument("--limit", type=int, metavar="N", help="at the most N particles")


def _location(text: str) -> Path | str:
    """A path, or a URL as it is."""
    if "://" in text:
        return text
    try:
        return expanded(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def refuse(options: argparse.Namespace, names: Sequence[str], what: str) -> None:
    """Raise an ``ArgumentError`` if one of these options was given."""
    # Not by equality: 0 is a value, and equal to False.
    given = [f"--{name.replace('_', '-')}" for name in names if (value := getattr(options, name)) is not None and value is not False]
    if given:
        raise ArgumentError(f"{', '.join(given)} has no meaning for {what}.")


def open_source(options: argparse.Namespace) -> ParticleDataset:
    """The data set that the options stand for."""
    select = _selection(options)
    if isinstance(options.file, str):
        refuse(options, ("job", *_OF_STACKS), "a Zarr store")
        return ZarrDataset(options.file, select=select)
    how: Any = {"mode0": options.mode0 or "auto", "unmatched": options.unmatched or "error"}
    if options.job is not None:
        refuse(options, ("folder", "index_base", "passthrough"), "a job directory")
        pairing: Pairing = options.pairing or "sequence"
        if pairing == "sequence":
            refuse(options, ("unmatched",), "rows that are paired in sequence")
        return JobDirectoryDataset(options.file, options.job, pairing=pairing, pixel_size=options.pixel_size, select=select, **how)
    if is_folder(options.file):
        if options.file.suffix == ".zarr" or is_file(options.file / "zarr.json"):
            refuse(options, _OF_STACKS, "a Zarr store")
            return ZarrDataset(options.file, select=select)
        raise ArgumentError(f"{options.file} is a folder; give a .cs file, or --job N to read the job directory {options.file / 'JN'}.")
    refuse(options, ("pairing",), "anything but a job directory")
    return IndexedDataset(
        options.file,
        folder=options.folder,
        index_base=options.index_base or 0,
        passthrough=options.passthrough,
        pixel_size=options.pixel_size,
        select=select,
        **how,
    )


def _selection(options: argparse.Namespace) -> Selection:
    """Which rows are meant. They are chosen while a data set is opened, because what is left out may have another box or pixel size."""
    asked = {name: getattr(options, name) for name in ("where", "half", "every", "shuffle", "limit")}
    if options.group is not None:
        asked["where"] = [f"{CTF_FIELDS['exposure_group']} == {options.group}", *options.where]
    if all(option in (None, []) for option in asked.values()):
        return None
    table = _table(options)

    def column(name: str, particles: Particles) -> np.ndarray:
        if table is not None and name in table:
            # By row of the file, of which those without a partner are not in the table.
            rows = particles.row if table.kept is None else np.searchsorted(table.kept, particles.row)
            found: np.ndarray = table[name][rows]
            return found
        known = particles.columns()
        known |= {field: known[f"ctf/{ours}"] for ours, field in CTF_FIELDS.items() if f"ctf/{ours}" in known}
        if name not in known:
            there = sorted({*known, *(() if table is None else table.fields)})
            raise ArgumentError(f"There is no column {name!r} to choose by; there are {', '.join(there)}.")
        return known[name]

    return lambda particles: choose(particles, column=partial(column, particles=particles), **asked)


def _table(options: argparse.Namespace) -> Table | None:
    """The table to choose by: what a data set goes by; a store has none."""
    if options.job is not None and isinstance(options.file, Path):
        return without_blob(read_passthrough(options.file.absolute() / f"J{options.job}", options.job))
    return indexed_table(options)


def indexed_table(options: argparse.Namespace) -> Table | None:
    """The table that was given, with others joined to it; None for a project or a store."""
    if not isinstance(options.file, Path) or not is_file(options.file):
        return None
    return load_table(options.file, passthrough=options.passthrough, unmatched=options.unmatched or "error")
