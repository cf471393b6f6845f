"""What tells one set of inputs from another, so that work is continued only on the same ones."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import ParticleDataset
from .errors import MissingStackError, StackError
from .particles import Particles
from .stacks import Stacks
from .zarr_store import is_url, open_store


def fingerprint(dataset: ParticleDataset) -> dict[str, Any]:
    """What tells one set of inputs from another: paths, sizes and modification times of the files, and the columns of the table.

    How pixels of 8 bits are read is a choice (``mode0``), while files say it of others.

    Of stores that are not read file by file it takes what they say of themselves, with the checksums that ``export_zarr`` left.
    """
    of_column: defaultdict[str, Any] = defaultdict(partial(hashlib.blake2b, digest_size=16))
    for part in dataset.particles.stretches():
        for name, column in part.columns().items():
            of_column[f"{name} {column.dtype} {column.shape[1:]}"].update(np.ascontiguousarray(column).view(np.uint8).data)
    columns = hashlib.blake2b(f"{len(dataset)}".encode(), digest_size=16)
    for name, hashed in sorted(of_column.items()):
        columns.update(f"{name} {hashed.hexdigest()}".encode())
    return {
        "kind": type(dataset).__name__,
        "files": len(input_files(dataset)),
        "table": columns.hexdigest(),
        "stacks": fingerprint_of_files(dataset),
        "pixels_of_8_bits": _pixels_of_8_bits(dataset),
        "pixel_size_A": dataset.pixel_size,
    }


def fingerprint_of_names(particles: Particles) -> str | None:
    """What tells how the table names the files from other names of the same ones; None where it names none."""
    names = particles.blob_paths
    return None if names is None else hashlib.blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()


def fingerprint_of_files(dataset: ParticleDataset) -> str:
    """The part of a fingerprint that tells whether files have changed: ``stacks``."""
    state = hashlib.blake2b(digest_size=16)
    files, gone = input_files(dataset), []
    for path in files:
        try:
            seen = b"".join(_seen(path))
        except FileNotFoundError:
            gone.append(path)
            continue
        except OSError as error:
            raise StackError(f"{path} cannot be reached any more: {error.strerror}.") from error
        state.update(os.fsencode(path) + b"\0" + seen + b"\n")
    if gone:
        raise MissingStackError("\n".join([f"{len(gone)} of {len(files)} stacks are gone:", *(f"  {path}" for path in gone)]))
    return state.hexdigest()


def _pixels_of_8_bits(dataset: ParticleDataset) -> str | None:
    """Whether pixels of 8 bits have a sign, by the names of their dtypes; None if there are none."""
    source = dataset.source
    dtypes = {header.dtype for header in source.headers} if isinstance(source, Stacks) else {source.dtype}
    return ", ".join(sorted(dtype.name for dtype in dtypes if dtype.itemsize == 1)) or None


def _seen(path: str) -> Iterator[bytes]:
    """What changes with the content of a file of images, or of a store that is read as a whole; a ``FileNotFoundError`` if it is gone."""
    url = is_url(path)
    status = None if url else os.stat(path)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        yield f"{status.st_size} {status.st_mtime_ns}".encode()
        return
    yield from _metadata(path)
    for file in [] if url else sorted(Path(path, "images").rglob("*")):
        status = file.stat()
        yield os.fsencode(f"{file} {status.st_size} {status.st_mtime_ns}\n")


def _metadata(location: str) -> Iterator[bytes]:
    """What a store says of itself and of its images, and the manifest of the export that made it."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    store = open_store(location, read_only=True)
    for name in ("zarr.json", "images/zarr.json", "source/zarr.json"):
        try:
            found = sync(store.get(name, default_buffer_prototype()))
        except Exception as error:  # whatever the library for this kind of URL raises
            raise StackError(f"{location} cannot be read: {error}") from error
        if found is None and name != "source/zarr.json":
            raise FileNotFoundError(name)
        yield b"" if found is None else found.to_bytes()


def input_files(dataset: ParticleDataset) -> list[str]:
    """The files that hold the images of a data set."""
    particles = dataset.particles
    return [particles.paths[number] for number in np.flatnonzero(np.bincount(particles.file)).tolist()]


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between what is said of a result that is there (its inputs under "inputs") and of another one, in words."""
    meaning = {
        "inputs.table": "the particles or their order, optics or poses",
        "inputs.stacks": "the input stacks (their paths, sizes or modification times)",
        "names": "the names of the stacks in the table (which earlier versions did not note)",
        "templates.sketch": "the templates",
        "displacements_A": "the displacements",
    }
    told = []
    all_old, all_new = _flat(there), _flat(here)
    # The program's version is told, but another one that writes the same layout may go on.
    for name in sorted({*all_old, *all_new} - {"version", "clearing"}):
        old, new = all_old.get(name), all_new.get(name)
        if old != new:
            told.append(f"{meaning[name]} differ" if name in meaning else f"{name} is {old!r} there and {new!r} here")
    return told


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
