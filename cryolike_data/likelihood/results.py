"""``Results``: the records of a likelihood run, in memory or in a folder where they are written as they come."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError, ExportExistsError
from ..files import make_folder
from ..fingerprint import differences
from .result import ImageLikelihood

#: ``done`` is last, so that a record of which a part was written does not have it.
RECORD = np.dtype(
    [
        ("row", "<i8"),
        ("uid", "<u8"),
        ("log_likelihood", "<f8"),
        ("template", "<i8"),
        ("displacement_A", "<f8", (2,)),
        ("rotation_rad", "<f8"),
        ("pose", "<f8", (3,)),
        ("shift_A", "<f8", (2,)),
        ("done", "u1"),
    ],
    align=True,
)
_Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
_RECORDS, _MATRIX, _ABOUT = "likelihood.npy", "by_template.npy", "likelihood.json"


class Results:
    """A record for each particle; several processes may write different ones of the same folder.

    Parameters
    ----------
    folder : where they are kept; in memory if None
    count : number of particles
    templates : columns of the matrix of images by templates; 0 for no matrix
    about : what the results are made from; those that were made from something else are not continued
    overwrite : remove results that were made from something else

    Raises
    ------
    ExportExistsError
        if something else is in the folder; says what differs
    """

    def __init__(self, folder: Path | None, count: int, templates: int, about: dict[str, Any], *, overwrite: bool) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}
        if folder is None:
            self._records = np.zeros(count, RECORD)
            return
        shapes: _Shapes = {_RECORDS: (RECORD, (count,))}
        if templates:
            shapes[_MATRIX] = (np.dtype("<f8"), (count, templates))
        _take_place(folder, shapes, about, overwrite)
        self._records = np.load(folder / _RECORDS, mmap_mode="r", allow_pickle=False)
        try:
            self._files = {name: os.open(folder / name, os.O_WRONLY) for name in shapes}
        except OSError as error:
            raise ExportError(f"{folder} cannot be written: {error}") from error
        self._offsets = {
            name: os.path.getsize(folder / name) - dtype.itemsize * int(np.prod(shape)) for name, (dtype, shape) in shapes.items()
        }

    def has(self, rows: range) -> bool:
        """Whether all of these are there."""
        return bool(self._records["done"][rows.start : rows.stop].all())

    def write(self, rows: range, table_rows: np.ndarray, uid: np.ndarray, found: ImageLikelihood) -> None:
        """Keep what was found about these rows of the data set."""
        block = np.zeros(len(rows), RECORD)
        block["row"], block["uid"], block["done"] = table_rows, uid, 1
        for name in ("log_likelihood", "template", "displacement_A", "rotation_rad", "pose", "shift_A"):
            block[name] = getattr(found, name).numpy()
        if self._folder is None:
            self._records[rows.start : rows.stop] = block
            return
        if found.by_template is not None:
            self._put(_MATRIX, rows.start, found.by_template.numpy())
        self._put(_RECORDS, rows.start, block)

    def records(self) -> np.ndarray:
        """All records so far."""
        return self._records

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _put(self, name: str, first: int, block: np.ndarray) -> None:
        # Not by way of a map, because a full disk would then end the process.
        content = memoryview(block.tobytes())
        offset = self._offsets[name] + first * block[:1].nbytes
        try:
            while content:
                written = os.pwrite(self._files[name], content, offset)
                content, offset = content[written:], offset + written
        except OSError as error:
            raise ExportError(
                f"{self._folder}/{name} cannot be written: {error}. What is there is kept; the same call continues it."
            ) from error


def _take_place(folder: Path, shapes: _Shapes, about: dict[str, Any], overwrite: bool) -> None:
    """Make the folder hold files for these results, unless it does already.

    The folder appears with all of its files at once: of processes that begin together one makes it, and the others find it.
    """
    if _is_ours(folder, about, overwrite):
        return
    make_folder(folder.parent)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    new, old = beside.with_suffix(".new"), beside.with_suffix(".old")
    try:
        new.mkdir()
        for name, (dtype, shape) in shapes.items():
            np.lib.format.open_memmap(new / name, mode="w+", dtype=dtype, shape=shape)
        (new / _ABOUT).write_text(json.dumps(about, indent=1))
        if overwrite and folder.exists():
            os.rename(folder, old)
            if _about(old) == about:  # another process was faster
                os.rename(old, folder)
        try:
            os.rename(new, folder)
        except OSError:
            if not _is_ours(folder, about, False):
                raise
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error}") from error
    finally:
        for scratch in (new, old):
            shutil.rmtree(scratch, ignore_errors=True)


def _is_ours(folder: Path, about: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds results of the same kind; False if there is nothing, or what may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    there = _about(folder)
    if there is None:
        raise ExportExistsError(f"{folder} exists and holds something else than results of a likelihood; choose another output.")
    if there == about:
        return True
    if overwrite:
        return False
    told = "\n".join(f"  {line}" for line in differences(there, about))
    raise ExportExistsError(
        f"{folder} holds results that were made from something else:\n{told}\nChoose another output, or pass overwrite=True."
    )


def _about(folder: Path) -> dict[str, Any] | None:
    """What the results in a folder were made from, or None if there are none."""
    try:
        found: dict[str, Any] = json.loads((folder / _ABOUT).read_text())
    except (OSError, ValueError):
        return None
    return found
