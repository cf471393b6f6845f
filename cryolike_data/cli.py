"""The command line: ``cryolike-data info``, ``export``, ``show``, ``bench`` and ``demo``, thin over the public names."""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import __version__
from .arguments import integer
from .cli_export import add_arguments, export_command
from .cli_source import add_source, indexed_table, open_source
from .collate import Collate
from .dataset import human_bytes
from .errors import ArgumentError, CryolikeDataError
from .transforms import Downsample

#: What messages say to who calls the functions, and what they say here.
_AS_OPTIONS = (
    (r"(?<![\w/])overwrite=True", "--overwrite"),
    (r"(?<![\w/])star=False", "--no-star"),
    (r"(?<![\w/])fourier=False", "--no-fourier"),
    (r"(?<![\w/])plots=False", "without --plots"),
    (r'(?<![\w/])folder="([^"]*)"', r"--folder \1"),
    (r"(?<![\w/])folder=(?= )", "--folder"),
    (r"(?<![\w/])index_base=", "--index-base "),
    (r"(?<![\w/])passthrough=", "--passthrough"),
    (r'(?<![\w/])pairing="(\w+)"', r"--pairing \1"),
    (r"(?<![\w/])pixel_size= ", "--pixel-size "),
    (r"(?<![\w/])(factor|box)=(\d)", r"--\1 \2"),
    (r"(?<![\w/])(factor|box)=(?=[ .])", r"--\1"),
    (r"(?<![\w/])dataset\.select\(lambda p: np\.isclose\(p\.ctf\.(\w+), ([^)]*)\)\)", r"--where 'ctf/\1 == \2'"),
    (r"(?<![\w/])select=(?=[. ])", "--where"),
    (r"(?<![\w/])select=lambda p: np\.isclose\(p\.(\w+), ([^)]*)\)", r"--where '\1 == \2'"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 with the reason on the error stream if not, 130 if it was stopped by Ctrl-C or SIGTERM."""
    options = _parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():  # the only one that is told
        # A scheduler that ends a job gives it time to remove what is half written, and another machine need not wait to go on.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")  # names of files may have letters that a terminal has not
    warnings.showwarning = lambda message, *_: print(f"cryolike-data: {message}", file=sys.stderr)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        options.command(options)
        print(end="", flush=True)  # there is no sys.stdout to be flushed where it was closed
    except KeyboardInterrupt:
        print(f"cryolike-data: stopped{options.how_to_go_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads the output, such as head, has enough. Python would say so once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CryolikeDataError, OSError) as error:
        print(f"cryolike-data: {_as_options(str(error))}", file=sys.stderr)
        return 1
    return 0


def _as_options(message: str) -> str:
    for of_function, of_command in _AS_OPTIONS:
        message = re.sub(of_function, of_command, message)
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cryolike-data", description="CryoSPARC particles: what is in them, and export.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is decided on the way")
    parser.set_defaults(how_to_go_on="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what is in a table and its stacks")
    add_source(info)
    info.set_defaults(command=_info)

    export = commands.add_parser(
        "export", help="write a Zarr store, MRC stacks with .cs and .star, or CryoLike stacks; continues where it was stopped"
    )
    add_source(export)
    add_arguments(export)
    export.set_defaults(command=export_command, how_to_go_on="; the same command goes on from here")

    show = commands.add_parser("show", help="a picture of some particles (extra: plot)")
    add_source(show)
    show.add_argument("out", type=Path, metavar="PNG", help="the picture to write")
    show.add_argument("--count", type=int, default=32, help="how many particles, evenly spread over the table (default: 32)")
    show.add_argument("--box", type=int, help="downsample to this box size first, which takes noise away")
    show.set_defaults(command=_show)

    bench = commands.add_parser("bench", help="how fast these images can be had here, and what holds them up")
    add_source(bench)
    bench.add_argument("--batch-size", type=int, default=256, help="particles per batch (default: 256)")
    bench.add_argument(
        "--gigabytes", type=float, default=1.0, help="how much of the images to use at the most; it is read several times (default: 1)"
    )
    bench.add_argument("--no-cold", action="store_true", help="leave out reading from the disk")
    bench.set_defaults(command=_bench)

    demo = commands.add_parser("demo", help="write a small synthetic CryoSPARC project with its truth")
    demo.add_argument("out", type=Path, metavar="OUT", help="the project folder to write")
    demo.add_argument("--particles", type=int, default=600, help="number of particles (default: 600)")
    demo.add_argument("--box", type=int, default=64, help="box size, pixels (default: 64)")
    demo.add_argument("--seed", type=int, default=0, help="the same seed writes the same project (default: 0)")
    demo.add_argument("--overwrite", action="store_true", help="replace what is there")
    demo.set_defaults(command=_demo)
    return parser


def _info(options: argparse.Namespace) -> None:
    # Before the stacks are looked for, so that a table without its stacks still tells what it holds.
    if (table := indexed_table(options)) is not None:
        print(f"{options.file}\n  rows       {len(table):,}\n  fields     {len(table.fields)} in {table.describe_slots()}")
    dataset = open_source(options)
    print(repr(dataset))
    print(f"  bytes      {human_bytes(len(dataset) * dataset.image_bytes)} of images, {human_bytes(dataset.image_bytes)} each")
    ctf = dataset.particles.ctf
    if ctf is None or ctf.exposure_group is None:
        return
    for group in np.unique(ctf.exposure_group).tolist():
        chosen = dataset.particles.where(exposure_group=group).ctf
        assert chosen is not None
        kinds = (("voltage_kv", "kV"), ("spherical_aberration_mm", "mm Cs"), ("amplitude_contrast", "amplitude contrast"))
        told = [
            f"{'/'.join(f'{value:g}' for value in np.unique(column))} {unit}"
            for name, unit in kinds
            if (column := getattr(chosen, name)) is not None
        ]
        print(f"  group {group:<4} {len(chosen.require('exposure_group')[0]):,} particles, {', '.join(told)}")


def _show(options: argparse.Namespace) -> None:
    from .plots import montage, require_picture_name

    integer("--count", options.count, least=1)
    require_picture_name(options.out)
    dataset = open_source(options)
    rows = np.unique(np.linspace(0, len(dataset) - 1, options.count).round().astype(int))
    collate = Collate(downsample=None if options.box is None else Downsample(box=options.box))
    figure = montage(collate(dataset.batch(rows)).images, titles=[f"row {row}" for row in dataset.particles.row[rows].tolist()])
    figure.savefig(options.out)
    print(f"{len(rows)} of {len(dataset):,} particles are shown in {options.out}")


def _bench(options: argparse.Namespace) -> None:
    from .diagnose import diagnose

    dataset = open_source(options)
    if options.batch_size < 1 or not 0 < options.gigabytes < math.inf:
        raise ArgumentError(f"--batch-size and --gigabytes are positive, not {options.batch_size} and {options.gigabytes}")
    print(repr(dataset))
    max_bytes = int(options.gigabytes * 1e9)
    figures, sentence = diagnose(dataset, batch_size=options.batch_size, max_bytes=max_bytes, cold=not options.no_cold)
    print(*figures, sentence, sep="\n")


def _demo(options: argparse.Namespace) -> None:
    from .demo import LEAST_PARTICLES, write_project

    integer("--particles", options.particles, least=LEAST_PARTICLES)
    project = write_project(options.out, n_particles=options.particles, box=options.box, seed=options.seed, overwrite=options.overwrite)
    print(
        f"Wrote {project.folder}. Look at it with:\n  cryolike-data info {project.indexed}\n  cryolike-data info {project.folder} --job 4"
    )
