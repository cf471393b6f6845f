"""``Results``: the records of a likelihood run, in memory or in a folder where they are written as they come."""

from __future__ import annotations

import io
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError, ExportExistsError
from ..files import is_partial, make_folder, whole_file
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
_RECORDS, _MATRIX, _ABOUT = "likelihood.npy", "by_template.npy", "likelihood.json"
_KIND = "likelihood"
_Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

#: What templates that are made again may differ by, in relation to their norm: finufft's accuracy depends on the number of threads.
_ROUNDING = 1e-4


class Results:
    """A record for each particle; several processes may write different ones of the same folder.

    Parameters
    ----------
    folder : where they are kept; in memory if None
    count : number of particles
    templates : columns of the matrix of images by templates; 0 for no matrix
    about : what the results are made from, as plain values; those that were made from something else are not continued
    overwrite : replace results that were made from something else, or are damaged; for a process that is alone

    Raises
    ------
    ExportExistsError
        if something else is in the folder; says what differs
    ExportError
        if the folder cannot be written, or what is there is damaged
    """

    def __init__(self, folder: Path | None, count: int, templates: int, about: dict[str, Any], *, overwrite: bool) -> None:
        self._folder, self._count = folder, count
        self._files: dict[str, int] = {}
        if folder is None:
            self._records = np.zeros(count, RECORD)
            return
        shapes: _Shapes = {_RECORDS: (RECORD, (count,))}
        if templates:
            shapes[_MATRIX] = (np.dtype("<f8"), (count, templates))
        self._shapes = shapes
        try:
            _take_place(folder, shapes, {"kind": _KIND} | about, overwrite)
        except ExportExistsError:
            raise
        except OSError as error:
            raise ExportError(f"{folder} cannot be written: {error}") from error
        self._open(os.O_RDONLY)

    def begin_writing(self) -> None:
        """What comes before ``write``; who only looks at results need not be allowed to change them."""
        if self._folder is not None:
            self.close()
            self._open(os.O_RDWR)

    def has(self, rows: range) -> bool:
        """Whether all of these are there."""
        if self._folder is None:
            return bool(self._records["done"][rows.start : rows.stop].all())
        # Not by way of a map, which a full disk turns into an error that ends the process.
        size = len(rows) * RECORD.itemsize
        found = os.read(self._at(_RECORDS, rows.start), size)
        return len(found) == size and bool(np.frombuffer(found, RECORD)["done"].all())

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
        """All records so far; a read-only map of the file where there is one."""
        if self._folder is None:
            return self._records
        return np.memmap(self._folder / _RECORDS, RECORD, "r", self._offset(_RECORDS), (self._count,))

    def _open(self, flags: int) -> None:
        try:
            for name in self._shapes:
                self._files[name] = os.open(f"{self._folder}/{name}", flags | getattr(os, "O_BINARY", 0))
        except OSError as error:
            self.close()
            raise ExportError(f"{self._folder} cannot be {'read' if flags == os.O_RDONLY else 'written'}: {error}") from error

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _offset(self, name: str) -> int:
        return len(_header(*self._shapes[name]))

    def _at(self, name: str, row: int) -> int:
        """The descriptor of a file, to be read or written from this row on; not ``os.pread``, which Windows does not have."""
        dtype, shape = self._shapes[name]
        os.lseek(self._files[name], self._offset(name) + row * _numbers(dtype, (1, *shape[1:])), os.SEEK_SET)
        return self._files[name]

    def _put(self, name: str, first: int, block: np.ndarray) -> None:
        content = memoryview(block.tobytes())
        try:
            descriptor = self._at(name, first)
            while content:
                content = content[os.write(descriptor, content) :]
        except OSError as error:
            what = f"{self._folder}/{name} cannot be written: {error}"
            raise ExportError(f"{what}. What is there is kept; the same call continues it.") from error


def _take_place(folder: Path, shapes: _Shapes, about: dict[str, Any], overwrite: bool) -> None:
    """Make the folder hold files for these results, unless it does already.

    Its description comes last, and before it no record: of processes that begin together each makes the same files, whichever is first.
    Only a process that is alone may overwrite.
    """
    if _is_ours(folder, shapes, about, overwrite):
        return
    is_new = not folder.exists()
    make_folder(folder)
    try:
        with whole_file(folder / _ABOUT) as partial:
            partial.write_text(json.dumps(about, indent=1))
            if overwrite:
                # The description is the last to go, too: records without one would be taken for new ones.
                for name in (_RECORDS, _MATRIX, *(_names(folder)[1] - {partial.name}), _ABOUT):
                    (folder / name).unlink(missing_ok=True)
            for name, (dtype, shape) in shapes.items():
                _make_zeros(folder / name, dtype, shape)
    finally:
        if not os.path.exists(folder / _ABOUT):
            for name in shapes:
                (folder / name).unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # another process is at it
                    folder.rmdir()
    _is_ours(folder, shapes, about, False)  # unless other results were begun there at the same moment


def _make_zeros(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Make an npy file of zeros; one that another process has just made, and may be filling, stays."""
    header = _header(dtype, shape)
    path.touch()
    with path.open("r+b") as file:
        if file.read(len(header)) not in (b"", header):
            file.truncate(0)  # for other results, by a run that was killed
        file.seek(0)
        file.write(header)
        file.truncate(len(header) + _numbers(dtype, shape))


def _is_free(folder: Path) -> bool:
    """Whether a folder is empty, but for the files of results that are not described yet."""
    names, partial = _names(folder)
    return not names or (bool(partial) and names <= {_RECORDS, _MATRIX, *partial})


def _names(folder: Path) -> tuple[set[str], set[str]]:
    """Names of all that is in a folder, and those of descriptions that runs are at, or were when they were killed."""
    names = {path.name for path in folder.iterdir()}
    return names, {name for name in names if is_partial(name, _ABOUT)}


def _is_ours(folder: Path, shapes: _Shapes, about: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds these results; False if there is nothing, or what may be replaced.

    Raises
    ------
    ExportExistsError, ExportError
        if it holds something else, or is damaged
    """
    if not folder.exists() or (folder.is_dir() and _is_free(folder)):
        return False
    there = _about(folder)
    if there is None:
        raise ExportExistsError(f"{folder} exists and holds something else than results of a likelihood; choose another output.")
    told = [f"  {line}" for line in differences(_settled(there, about), about)]
    damage = _damage(folder, shapes)
    if not told and not damage:
        return True
    if not overwrite and told:
        what = f"{folder} holds results that were made from something else:"
        raise ExportExistsError("\n".join([what, *told, "Choose another output, or pass overwrite=True."]))
    if not overwrite:
        raise ExportError(f"{damage}; results cannot be continued there. Choose another output, or pass overwrite=True to begin anew.")
    names, partial = _names(folder)
    others = sorted(names - partial - {_RECORDS, _MATRIX, _ABOUT})
    if others:
        raise ExportExistsError(f"{folder} also holds {', '.join(others[:3])}, which overwrite=True would remove; choose another output.")
    return False


def _settled(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """What results were made from, with the numbers of a sketch taken for those of another where they agree but for rounding."""
    old, new = (about.get("templates", {}).get("sketch") for about in (there, here))
    if np.shape(old) != np.shape(new) or not np.allclose(old, new, rtol=_ROUNDING, atol=_ROUNDING):
        return there
    return there | {"templates": there["templates"] | {"sketch": new}}


def _about(folder: Path) -> dict[str, Any] | None:
    """What the results in a folder were made from, or None if there are none."""
    try:
        found = json.loads((folder / _ABOUT).read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("kind") == _KIND else None


def _damage(folder: Path, shapes: _Shapes) -> str:
    """What is wrong with the files of results; nothing if they are whole."""
    for name, (dtype, shape) in shapes.items():
        header, path = _header(dtype, shape), folder / name
        try:
            with path.open("rb") as file:
                whole = file.read(len(header)) == header and os.fstat(file.fileno()).st_size == len(header) + _numbers(dtype, shape)
        except OSError as error:
            return f"{path} cannot be read: {error}"
        if not whole:
            return f"{path} is cut short or not what was written here"
    return ""


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What stands before the numbers in an npy file."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return content.getvalue()


def _numbers(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Bytes of the numbers in it."""
    return dtype.itemsize * math.prod(shape)
