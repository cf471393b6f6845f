"""``Particles``: one row per particle, saying where its image lies and what is known about it, wherever the row came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch

from .arguments import SAME
from .ctf import Ctf
from .errors import ArgumentError, MixedParticlesError, RowIndexError
from .later import Later, take_rows_of
from .repeated import Repeated, is_repeated, once, repeat

#: Particles that are looked at together by who goes through all of them.
STRETCH_ROWS = 1 << 14
#: Columns of no more particles are some megabytes: they are read as a whole and kept, which takes less than one stretch after the other.
FEW_ROWS = 1 << 16

#: What selects rows: a boolean mask, row numbers, a slice, or a function of the particles that gives one of these.
Selection = Any


ValueT = TypeVar("ValueT")


class _Column(Generic[ValueT]):
    """A field of ``Particles`` that may be given as a ``Later``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, particles: None, owner: type) -> None: ...
    @overload
    def __get__(self, particles: Particles, owner: type) -> ValueT: ...
    def __get__(self, particles: Particles | None, owner: type) -> ValueT | None:
        if particles is None:
            return None  # what a field is that is not given
        value = particles.__dict__[self._name]
        found: ValueT = value[self._name] if isinstance(value, Later) else value
        return found

    def __set__(self, particles: Particles, value: ValueT | Later) -> None:
        particles.__dict__[self._name] = value


@dataclass(frozen=True, eq=False, repr=False)
class Particles:
    """A table of N particles. Every selection keeps all columns in step.

    Where particles come from a table, all that does not say where images lie is read from it when it is first asked for, and is
    there for reading only: ``dataclasses.replace(particles, pose=...)`` makes a table with other columns, of which
    ``ParticleDataset(table, dataset.source)`` is a data set.

    Attributes
    ----------
    row : (N,) int64, row in the table the particles came from
    uid : (N,) uint64, CryoSPARC's id of the particle (0 where the table has none)
    file : (N,) int32, index into ``paths``
    slice : (N,) int64, image inside that file, from 0
    box : (N,) int32, box size of the stored image, pixels
    pixel_size : (N,) float, pixel size of the stored image, angstrom
    paths : the files
    blob_paths : the same files as the table names them (``blob/path``), or None where it names none
    ctf : optics per particle, or None
    pose : (N, 3) float32 rotation vector taking the particle frame to the volume frame, radian, or None; a 2-D alignment
        gives (0, 0, angle)
    shift_A : (N, 2) float32 translation (x, y) to apply to the image to centre the particle, angstrom, or None
    half_set : (N,) 0 or 1, or None
    sign : (N,) contrast sign of the stored pixels, or None; applied by exports with ``contrast="positive"`` only
    """

    file: np.ndarray
    slice: np.ndarray
    box: np.ndarray
    pixel_size: np.ndarray
    paths: tuple[str, ...]
    blob_paths: tuple[str, ...] | None = None
    row: _Column[np.ndarray] = _Column()
    uid: _Column[np.ndarray] = _Column()
    ctf: _Column[Ctf[np.ndarray] | None] = _Column()
    pose: _Column[np.ndarray | None] = _Column()
    shift_A: _Column[np.ndarray | None] = _Column()
    half_set: _Column[np.ndarray | None] = _Column()
    sign: _Column[np.ndarray | None] = _Column()

    def __len__(self) -> int:
        return len(self.file)

    def __getstate__(self) -> dict[str, Any]:
        # Columns of a table are read again elsewhere, and a value that all rows share travels once.
        return {name: Repeated(value[:1], len(value)) if is_repeated(value) else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        repeated = {name: value for name, value in state.items() if isinstance(value, Repeated)}
        self.__dict__.update(state | {name: repeat(one.row, one.rows) for name, one in repeated.items()})

    def __getitem__(self, key: Selection) -> Particles:
        """The chosen rows, by mask, integer array, slice or single row, with every column in step."""
        rows = resolve_rows([key] if isinstance(key, int | np.integer) else key, len(self), self)
        later: dict[Later, Later] = {}
        taken: dict[str, Any] = {}
        for name in (*_COLUMNS, "ctf"):
            value = self.__dict__[name]
            if not isinstance(value, Later):
                taken[name] = take_rows_of(value, rows)
                continue
            if value not in later:
                later[value] = value.take(rows)
            taken[name] = later[value]
        return replace(self, **taken)

    def part(self, rows: range) -> Particles:
        """The particles of a stretch of rows, for who goes through all of them: no column is read as a whole where it need not be."""
        for value in self.__dict__.values():
            if isinstance(value, Later) and (len(self) <= FEW_ROWS or not value.by_rows):
                value["uid"]  # all of them, once and not for every stretch
        return self[rows.start : rows.stop]

    def stretches(self, rows: int = STRETCH_ROWS) -> Iterator[Particles]:
        """All particles, so many at a time; unless these are few, columns that were not read yet are let go of with each stretch."""
        particles = self if len(self) <= FEW_ROWS else self.apart()
        for start in range(0, len(self), rows):
            yield particles.part(range(start, min(len(self), start + rows)))

    def apart(self) -> Particles:
        """The same particles, for who looks at all columns once: those that were not read yet go when this copy goes."""
        later = {value: value.apart() for value in self.__dict__.values() if isinstance(value, Later)}
        fields: dict[str, Any] = {name: later[value] for name, value in self.__dict__.items() if isinstance(value, Later)}
        return replace(self, **fields)

    def columns(self) -> dict[str, np.ndarray]:
        """Every per-particle column that is present; optics are named ``ctf/...``."""
        optics = [] if self.ctf is None else self.ctf.items()
        plain = {name: column for name in _COLUMNS if (column := getattr(self, name)) is not None}
        return plain | {f"ctf/{name}": column for name, column in optics}

    def where(self, condition: Selection = None, /, **equal: Any) -> Particles:
        """The rows that fulfil a condition and hold the given values.

        Parameters
        ----------
        condition : a mask, row numbers, or a function of the particles that gives a mask
        equal : columns by name (``box=128``, ``exposure_group=3``, ``defocus_u=...``); floats compare to 5 digits

        Examples
        --------
        >>> particles.where(exposure_group=3)                                # doctest: +SKIP
        >>> particles.where(lambda p: p.ctf.defocus_u < 20000, half_set=0)   # doctest: +SKIP
        """
        mask = np.ones(len(self), bool)
        if condition is not None:
            mask[:] = False
            mask[choose_rows(condition, self)] = True
        columns = self.columns() if equal else {}
        for name, value in equal.items():
            column = columns.get(name, columns.get(f"ctf/{name}"))
            if column is None or column.ndim > 1:
                usable = sorted(n.removeprefix("ctf/") for n, c in columns.items() if c.ndim == 1)
                raise ArgumentError(f"There is no column {name!r} to compare; there are {', '.join(usable)}.")
            if np.ndim(value):
                among = f"lambda p: np.isin(p.{'' if name in columns else 'ctf.'}{name}, {value!r})"
                raise ArgumentError(f"{name}= takes one value to compare with, not {value!r}; for several write where({among}).")
            if np.asarray(value).dtype.kind not in "biuf":
                raise ArgumentError(f"{name}= takes a number to compare with, not {value!r}.")
            mask &= np.isclose(column, value, rtol=SAME) if column.dtype.kind == "f" else column == value
        return self[mask]

    def one_value(self, name: str, remedy: str = "select={}") -> Any:
        """The single value that column ``name`` has in all rows; ``remedy`` says how a selection is passed, for the error.

        Raises
        ------
        MixedParticlesError
            naming the groups, their sizes and how to select one
        """
        column = getattr(self, name) if name in _COLUMNS else self.columns().get(name)
        if column is None or column.ndim > 1:
            usable = ", ".join(known for known, of_all in self.columns().items() if of_all.ndim == 1)
            raise ArgumentError(f"There is no column {name!r} with one number for each particle; there are {usable}.")
        short, first, seen = name.removeprefix("ctf/"), column[0], once(column)
        if (seen == first).all() or (column.dtype.kind == "f" and np.allclose(seen, first, rtol=SAME, atol=0)):
            return first
        values, counts = np.unique(column, return_counts=True)
        where = f"p.ctf.{short}" if name.startswith("ctf/") else f"p.{short}"
        shown = [
            f"  {short} {shortest(value)}: {count} particles   {remedy.format(f'lambda p: np.isclose({where}, {shortest(value)})')}"
            for value, count in zip(values[:12], counts[:12], strict=True)
        ]
        more = [f"  ... and {len(values) - 12} more"] if len(values) > 12 else []
        raise MixedParticlesError("\n".join([f"The particles differ in {short}; take one group at a time:", *shown, *more]))

    def __repr__(self) -> str:
        optics = "without CTF" if self.ctf is None else "with CTF"
        if self.ctf is not None and self.ctf.exposure_group is not None:
            optics = f"with CTF in {len(np.unique(self.ctf.exposure_group))} exposure groups"
        poses = "with poses" if self.pose is not None else "without poses"
        boxes = ", ".join(map(str, np.unique(self.box)))
        return f"Particles({len(self)} rows in {len(np.unique(self.file))} files, box {boxes} px, {optics}, {poses})"


_COLUMNS = ("row", "uid", "file", "slice", "box", "pixel_size", "pose", "shift_A", "half_set", "sign")


def choose_rows(selection: Selection, particles: Particles) -> np.ndarray:
    """The same as ``resolve_rows`` for choosing among particles, where zeros and ones for all of them may be meant as a mask.

    They are by a function, and as numbers of 8 bits, in which masks are kept; any other array or list is one of row numbers.

    Raises
    ------
    RowIndexError
        for these, which are row numbers; and see ``resolve_rows``
    """
    n = len(particles)
    if by_function := callable(selection):
        selection = selection(particles)
    if isinstance(selection, slice):
        return resolve_rows(selection, n)
    numbers = _as_array(selection)
    if n > 2 and numbers.shape == (n,) and numbers.dtype.kind in "iuf" and (by_function or numbers.dtype.itemsize == 1):
        low, high = numbers.min(), numbers.max()
        # Minus one and minus two are zero and one inverted bit by bit. Nobody means the same two rows again and again.
        if 0 <= low <= high <= 1 or -2 <= low <= high <= -1:
            raise RowIndexError("zeros and ones for all particles are row numbers and no condition; compare, as in p.half_set == 1")
    return resolve_rows(numbers, n)


def resolve_rows(selection: Selection, n: int, particles: Particles | None = None) -> np.ndarray:
    """Row numbers (int64, none negative) that a selection stands for, among ``n`` rows: a new array, in one piece.

    Columns that are read later must not follow what becomes of the caller's array by then.

    Raises
    ------
    RowIndexError
        if a row is out of range or a mask has the wrong length
    """
    if callable(selection) and particles is not None:
        return choose_rows(selection, particles)
    if isinstance(selection, slice):
        return np.arange(*selection.indices(n), dtype=np.int64)
    rows = _as_array(selection)
    # Seen as unsigned, a negative number is larger than any row: the usual case costs one pass.
    if rows.dtype == np.int64 and rows.ndim == 1 and len(rows) and rows.view(np.uint64).max() < n:
        return np.array(rows, order="C")
    if rows.ndim != 1:
        given = f"one of shape {rows.shape}" if rows.ndim else repr(rows.item())
        raise RowIndexError(f"rows are chosen by a one-dimensional mask or list of row numbers, not by {given}")
    if rows.dtype == bool:
        if len(rows) != n:
            raise RowIndexError(f"a mask of {len(rows)} values cannot choose among {n} rows")
        return np.flatnonzero(rows)
    if len(rows) == 0:
        return np.empty(0, np.int64)
    if rows.dtype.kind not in "iu":
        raise RowIndexError(f"rows are chosen by integers or a mask, not by {rows.dtype} values")
    bad = rows >= n if rows.dtype.kind == "u" else (rows < -n) | (rows >= n)
    if bad.any():
        raise RowIndexError(f"row {rows[bad][0]} is out of range ({int(bad.sum())} of {len(rows)} asked for are): there are {n} rows")
    rows = rows.astype(np.int64)
    return np.where(rows < 0, rows + n, rows)


def _as_array(selection: Any) -> np.ndarray:
    if isinstance(selection, torch.Tensor):
        selection = selection.cpu().numpy()
    try:
        return np.asarray(selection)
    except ValueError as error:
        raise RowIndexError(f"rows are chosen by a one-dimensional mask or list of row numbers: {error}") from error


def shortest(value: Any) -> float | int:
    """A NumPy number as the Python number with the fewest digits that reads back the same (1.3 for float32 1.29999995)."""
    return float(str(value)) if np.asarray(value).dtype.kind == "f" else int(value)
