"""``cryolike-data export``: thin over ``plan_export``, ``run`` and ``finish``."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from .cli_source import open_source, refuse
from .dataset import ParticleDataset, human_bytes
from .descriptor import ImageDescriptor
from .export import ExportReport, finish, plan_export, run, unit_range
from .export.plans import ExportFormat
from .transforms import Downsample
from .transforms.downsample import resized
from .zarr_dataset import ZarrDataset

#: Options that say what is written, by the formats that know them and their names there.
_SETTINGS = {
    "dtype": ("zarr", "mrc"),
    "contrast": ("cryolike", "mrc"),
    "shard_bytes": ("zarr",),
    "compression": ("zarr",),
    "keep_bits": ("zarr",),
    "batch_size": ("cryolike", "mrc"),
    "descriptor": ("cryolike",),
    "n_stacks_max": ("cryolike",),
    "plots": ("cryolike",),
    "no_fourier": ("cryolike",),
    "no_star": ("mrc",),
}
_TITLES = {"zarr": "a Zarr store", "cryolike": "CryoLike stacks", "mrc": "MRC stacks"}


def add_arguments(export: argparse.ArgumentParser) -> None:
    """The options of the command, after those that say where the particles are."""
    export.add_argument("out", metavar="OUT", help="a name or URL ending in .zarr, or a folder")
    export.add_argument("--format", choices=tuple(_TITLES), help="kind of output (default: zarr for a name in .zarr, else cryolike)")

    images = export.add_argument_group("images")
    images.add_argument("--box", type=int, help="downsample to this box size, pixels")
    images.add_argument("--factor", type=int, help="downsample by this factor")
    images.add_argument("--method", choices=("fourier", "mean", "max"), help="how to downsample (default: fourier)")
    images.add_argument("--contrast", choices=("stored", "positive"), help="positive: bright particles, by blob/sign (default: stored)")
    images.add_argument("--dtype", choices=("float16", "float32", "float64"), help="pixels of Zarr and MRC (default: as the files)")

    layout = export.add_argument_group("files")
    layout.add_argument("--shard-bytes", type=int, help="size of a file of a Zarr store (default: 268435456)")
    layout.add_argument("--compression", choices=("zstd", "blosc"), help="of a Zarr store (default: none, which reads fastest)")
    layout.add_argument("--keep-bits", type=int, help="round pixels of a Zarr store to so many bits of their mantissa")
    layout.add_argument("--batch-size", type=int, help="images per CryoLike or MRC stack (default: 1024)")
    layout.add_argument("--descriptor", type=Path, help="CryoLike params file (default: made for the images that are written)")
    layout.add_argument("--n-stacks-max", type=int, help="stop after so many CryoLike stacks")
    layout.add_argument("--plots", action="store_true", help="draw CryoLike's three pictures per stack")
    layout.add_argument("--no-fourier", action="store_true", help="CryoLike's images without their transforms")
    layout.add_argument("--no-star", action="store_true", help="MRC stacks with a .cs but no .star file")

    running = export.add_argument_group("running", "The same command continues a run that was stopped.")
    running.add_argument("--overwrite", action="store_true", help="replace another export")
    running.add_argument("--unit-range", metavar="I/N", help="write part I (from 0) of N only; seal the result with --finish")
    running.add_argument("--finish", action="store_true", help="seal what was written with --unit-range")
    running.add_argument("--executor", metavar="ADDRESS", help="scheduler of a dask.distributed cluster whose workers do the work")
    running.add_argument("--json", action="store_true", help="print a summary as JSON, and nothing else")


def export_command(options: argparse.Namespace) -> None:
    """Run the command."""
    _log_progress()
    dataset = open_source(options)
    resized = options.box is not None or options.factor is not None
    if not resized:
        refuse(options, ("method",), "images that keep their size; add --box or --factor")
    downsample = Downsample(options.factor, options.box, options.method or "fourier") if resized else None
    kind: ExportFormat = options.format or ("zarr" if options.out.rstrip("/").endswith(".zarr") else "cryolike")
    plan = plan_export(dataset, options.out, format=kind, downsample=downsample, **_settings(options, kind, dataset, downsample))
    units = None if options.unit_range is None else unit_range(options.unit_range, len(plan))
    if options.finish:
        refuse(options, ("unit_range", "overwrite", "executor"), "--finish, which writes no units")
        report = finish(plan)
    else:
        report = run(plan, units=units, overwrite=options.overwrite, executor=options.executor, progress=False if options.json else None)
    if options.json:
        print(json.dumps(report.to_dict()))
        return
    if kind == "zarr" and report.sealed:
        print(repr(ZarrDataset(plan.target)))
    print(_told(report, kind, star=not options.no_star))


def _settings(options: argparse.Namespace, kind: str, dataset: ParticleDataset, downsample: Downsample | None) -> dict[str, Any]:
    refuse(options, [name for name, kinds in _SETTINGS.items() if kind not in kinds], _TITLES[kind])
    given = {name: getattr(options, name) for name, kinds in _SETTINGS.items() if kind in kinds}
    if given.pop("no_fourier", False):
        given["fourier"] = False
    if given.pop("no_star", False):
        given["star"] = False
    if kind == "cryolike" and given["descriptor"] is None:
        given["descriptor"] = ImageDescriptor.from_individual_values(*resized(downsample, dataset.box, dataset.pixel_size))
    return {name: value for name, value in given.items() if value is not None}


def _told(report: ExportReport, kind: str, *, star: bool) -> str:
    lines = [
        f"{report.written} of {report.units} units written, {report.kept} were there; {human_bytes(report.bytes)} in {report.seconds:.1f} s"
        f" ({report.images_per_second:,.0f} images/s)"
    ]
    stacks = "stack" if report.units == 1 else "stacks"
    tables = "particles.cs and particles.star" if star else "particles.cs"
    where = {
        "zarr": "Written to",
        "cryolike": f"{report.units} {stacks} of CryoLike in",
        "mrc": f"{report.units} MRC {stacks}, {tables} in",
    }
    unsealed = "is not sealed yet: when all parts are written, run the same command with --finish in place of --unit-range."
    lines.append(f"{where[kind]} {report.target}" if report.sealed else f"{report.target} {unsealed}")
    return "\n".join(lines)


def _log_progress() -> None:
    """Where there is no terminal for a bar, its log lines are shown."""
    for name in ("export", "progress"):
        logging.getLogger(f"cryolike_data.{name}").setLevel(logging.INFO)
