"""CryoSPARC tables (``.cs``), told apart by their first bytes, with columns copied out on demand."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import tokenize
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np

from ..errors import MissingDependencyError, MissingStackError, TableError
from .rows import ColumnsInMemory, RowsOnDisk, copy_columns, stamp_of

_NUMPY, _CSDAT, _SNAPPY = b"\x93NUMPY", b"\x95CSDAT", b"\x94CSDAT"
_OTHERS = {
    b"PK\x03\x04": "a zip archive (such as .npz); extract the .cs file from it",
    b"\x80": "a Python pickle, which could run code when loaded; save the table from CryoSPARC, or with numpy.save of a structured array",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed with gzip; unpack it first (gunzip)",
} | dict.fromkeys(
    (b"data_", b"\ndata_", b"# vers", b"\n# ver"), "a RELION star file, which is not read; give the .cs of the CryoSPARC job instead"
)
# Parent classifications leave hundreds of fields behind; NumPy's own limit of 10 kB is soon passed.
_MAX_HEADER_BYTES = 1 << 30


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """A table with one row per particle. ``table["blob/idx"]`` is that column as a contiguous array.

    Attributes
    ----------
    path : the file
    fields : dtype of each column, with its shape per row
    rows : number of rows
    kept : (rows,) int64, row in the file of each row of the table; None for all, in order
    """

    path: Path
    fields: Mapping[str, np.dtype[Any]]
    rows: int
    _source: Source
    kept: np.ndarray | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return f"Table({self.path}: {self.rows:,} rows, {len(self.fields)} fields in {self.describe_slots()})"

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.fields:
            raise TableError(f"{self.path} has no column {name!r}. It has {self.describe_slots()}.")
        if isinstance(self._source, _Loaded | RowsOnDisk):
            return self._source[name]
        column = np.array(self._source[name], order="C")
        return column.astype(column.dtype.newbyteorder("="), copy=False)

    def pop(self, name: str) -> np.ndarray:
        """The column, which is let go of where ``load`` put it into memory: for who made the table and takes each column once."""
        column = self[name]
        if isinstance(self._source, _Loaded):
            del self._source.columns[name]
        return column

    def load(self, wanted: Callable[[str], bool], *, rows: np.ndarray | None = None) -> Table:
        """The table with the wanted columns in memory (see ``copy_columns``), and without the others; all rows, or these in this order.

        Rows of a table on disk are wide: all columns are copied in one pass over it, which is several times as fast as a pass
        for each.
        """
        fields = {name: dtype for name, dtype in self.fields.items() if wanted(name)}
        if isinstance(self._source, Loads):
            return self._with(self._source.load(fields, rows), rows)
        return self._with({name: self[name] if rows is None else self[name][rows] for name in fields}, rows)

    def load_numbered(self, wanted: Callable[[str], bool], name: str, *, few: Collection[str] = ()) -> tuple[Table, list[Any], np.ndarray]:
        """The same, and of a column of strings its different values in order of appearance and each row's place (int32) among them.

        ``few`` are columns of which rows with the same string rarely differ; they are read together with it, and in no time.
        """
        together = [name, *(other for other in few if wanted(other) and other in self.fields)]
        alone = [other for other in self.fields if wanted(other) and other not in together]
        if isinstance(self._source, RowsOnDisk):
            columns, kinds = copy_columns(self._source, alone, kinds_of=together)
        else:
            loaded = self.load(lambda other: other in together or other in alone)
            columns = {other: loaded[other] for other in alone}
            kinds = copy_columns(ColumnsInMemory({other: loaded[other] for other in together}), (), kinds_of=together)[1]
        return self._with(columns | {other: kinds.column(other) for other in together if wanted(other)}), *kinds.values(name)

    def take_kept(self, rows: np.ndarray | None) -> np.ndarray | None:
        """``kept`` of a table of these rows of this one; None for all."""
        return self.kept if rows is None else rows if self.kept is None else self.kept[rows]

    def _with(self, columns: dict[str, np.ndarray], rows: np.ndarray | None = None) -> Table:
        fields = {name: self.fields[name] for name in columns}
        loaded = _Loaded(columns, {name: self.origin(name) for name in columns})
        return Table(self.path, fields, self.rows if rows is None else len(rows), loaded, self.take_kept(rows))

    def get(self, name: str) -> np.ndarray | None:
        """The column, or None where the table has none of that name."""
        return self[name] if name in self.fields else None

    def origin(self, name: str) -> Path:
        """The file that a column comes from (tables joined by uid have several)."""
        origin = getattr(self._source, "origin", None)
        return self.path if origin is None else Path(origin(name))

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the columns come from."""
        return tuple(dict.fromkeys(str(self.origin(name).absolute()) for name in self.fields))

    @property
    def slots(self) -> list[str]:
        """The groups of columns that are present: blob, ctf, alignments3D, ..."""
        return list(dict.fromkeys(name.split("/")[0] for name in self.fields if "/" in name))

    def describe_slots(self) -> str:
        """The column groups in words, for messages."""
        return ", ".join(f"{slot}/*" for slot in self.slots) or "no columns of any known group"


class Source(Protocol):
    """Where a table's columns come from, by name."""

    def __getitem__(self, name: str, /) -> np.ndarray: ...


@runtime_checkable
class Loads(Source, Protocol):
    """The same, if it gives many in less time than one by one."""

    def load(self, fields: Mapping[str, np.dtype[Any]], rows: np.ndarray | None) -> dict[str, np.ndarray]:
        """Columns (see ``copy_columns``) of all rows, or of these in this order."""


@dataclass(frozen=True)
class _Loaded:
    columns: dict[str, np.ndarray]
    origins: dict[str, Path]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def origin(self, name: str) -> Path:
        return self.origins[name]


def read_table(path: Path) -> Table:
    """Open one table, of any container format; groups are for ``load_table``, which says more."""
    try:
        # Not by way of pathlib, which in newer Pythons takes what is closed to this user for not there.
        opened = path.open("rb") if stat.S_ISREG(os.stat(path).st_mode) else None
    except ValueError:  # a name with a zero byte
        opened = None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise TableError(f"{path} cannot be read: {error.strerror}.") from error
        opened = None
    if opened is None:
        raise MissingStackError(f"There is no table {path}{_what_is_there(path)}.")
    with opened as file:
        magic = file.read(6)
        file.seek(0)
        if magic == _NUMPY:
            return _read_numpy(path, file)
        if magic == _CSDAT:
            return _read_csdat(path, file)
    if magic == _SNAPPY:
        raise TableError(
            f"{path} is in the old Snappy CSDAT format of cryosparc-tools 4.1 to 4.3, which current cryosparc-tools cannot read either. "
            "Load it with one of those versions and save it again with Dataset.save(path, format=NUMPY_FORMAT)."
        )
    for start, meaning in _OTHERS.items():
        if magic.startswith(start):
            raise TableError(f"{path} is not a CryoSPARC table but {meaning}.")
    raise TableError(f"{path} is not a CryoSPARC table: it starts with {magic!r}, not with a NumPy or CSDAT header.")


def _what_is_there(path: Path) -> str:
    """What a path leads to that is no file, for messages."""
    if path.is_dir():
        store = os.path.isfile(path / "zarr.json")
        return f": it is {'a Zarr store; open it with ZarrDataset' if store else 'a folder; give the .cs file in it'}"
    return f": it is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else ""


def _read_numpy(path: Path, file: IO[bytes]) -> Table:
    shape, dtype = _numpy_header(path, file)
    names = dtype.names
    if not names or len(shape) != 1 or shape[0] < 0:
        raise TableError(f"{path} holds a plain array of shape {shape}, not a table with named columns.")
    objects = [name for name in names if dtype[name].hasobject]
    if objects:
        raise TableError(
            f"{path} holds Python objects (columns {', '.join(objects[:5])}), which could run code when loaded. Give these columns a "
            'fixed-length string type, e.g. table.astype(...) with "S120", and save it again.'
        )
    start = file.tell()
    expected, found = shape[0] * dtype.itemsize, os.fstat(file.fileno()).st_size - start
    if found < expected:
        raise TableError(f"{path} is truncated: {shape[0]} rows need {expected} bytes and {found} are there. Copy it again.")
    fields = {name: dtype[name] for name in names}
    source = RowsOnDisk(path.absolute(), dtype, start, shape[0], stamp_of(file)) if expected else np.empty(shape, dtype)
    return Table(path, fields, shape[0], source)


def _numpy_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        # Versions 2 and 3 share a layout, but names are UTF-8 in 3.
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file, max_header_size=_MAX_HEADER_BYTES)
        if version >= (3, 0) and dtype.names:
            dtype.names = tuple(name.encode("latin1").decode("utf-8", "replace") for name in dtype.names)
    except (ValueError, LookupError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise TableError(f"{path} has a damaged NumPy header: {error}") from error
    return shape, dtype


def _read_csdat(path: Path, file: IO[bytes]) -> Table:
    """``magic | u32 length, JSON header | per column: u32 length, bytes (an LZ4 block if listed so) | heap of strings``."""
    try:
        import lz4.block
    except ImportError as error:
        raise MissingDependencyError(f'{path} is a CSDAT table, which needs LZ4: pip install "cryolike-data[csdat]"') from error
    try:
        file.seek(len(_CSDAT))
        header = json.loads(_sized(file))
        if (rows := int(header["length"])) < 0:
            raise ValueError(f"{rows} rows")
        specs = [(str(spec[0]), str(spec[1]), tuple(spec[2]) if len(spec) > 2 else ()) for spec in header["dtype"]]
        packed = set(header.get("compressed_fields") or ())
        columns: dict[str, np.ndarray] = {}
        for name, code, shape in specs if rows else ():
            dtype = np.dtype("<u8") if code == "|O" else np.dtype(code)
            size = rows * dtype.itemsize * int(np.prod(shape, dtype=int))
            raw = _sized(file)
            data = lz4.block.decompress(raw, uncompressed_size=size) if name in packed else raw
            columns[name] = np.frombuffer(data, dtype).reshape(rows, *shape)
        heap = file.read()
        for name, code, shape in specs:
            if rows == 0:
                columns[name] = np.empty((0, *shape), "S1" if code == "|O" else code)
            elif code == "|O":
                columns[name] = np.array([heap[start : heap.index(b"\0", start)] for start in columns[name].tolist()])
        fields = {name: np.dtype((column.dtype, column.shape[1:])) for name, column in columns.items()}
    except (ValueError, LookupError, TypeError, SyntaxError, OverflowError, RecursionError, struct.error, lz4.block.LZ4BlockError) as error:
        raise TableError(f"{path} is a damaged or truncated CSDAT table ({error}). Copy or save it again.") from error
    return Table(path, fields, rows, columns)


def _sized(file: IO[bytes]) -> bytes:
    (size,) = struct.unpack("<I", file.read(4))
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{size} bytes announced, {len(data)} found")
    return data
