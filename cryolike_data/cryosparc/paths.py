"""From the paths that a table names to files on this disk; every problem of all paths in one error."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from ..errors import ArgumentError, MissingStackError

_SWAPPED = {".mrc": ".mrcs", ".mrcs": ".mrc"}
#: Files of one folder that are asked for one by one, before the folder is listed instead.
_FEW = 16
_BLOCK_ROWS = 4096


def unique_paths(column: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The different values of a path column, decoded as UTF-8, in order of appearance, and each row's place among them.

    Returns
    -------
    paths : list of str
    file : (N,) int32
    """
    number: dict[bytes | str, int] = {}
    file = np.empty(len(column), np.int32)
    for start in range(0, len(column), _BLOCK_ROWS):
        # The column of a table on disk is strided and wide: a copy of a block stays in the cache.
        block = np.ascontiguousarray(column[start : start + _BLOCK_ROWS])
        heads = np.flatnonzero(np.concatenate([[True], block[1:] != block[:-1]]))
        numbers = [number.setdefault(value, len(number)) for value in block[heads].tolist()]
        file[start : start + _BLOCK_ROWS] = np.repeat(np.asarray(numbers, np.int32), np.diff(np.append(heads, len(block))))
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value) for value in number], file


def resolve_paths(
    names: Sequence[str], rows_per_name: Sequence[int], *, table: Path, folder: str | os.PathLike[str] | None = None
) -> list[str]:
    """The absolute path of the file that each ``blob/path`` stands for.

    With ``folder`` every stack lies directly in it, by file name. Without, a path is tried as it is (absolute, or from the
    working directory), then from the folder of the table and each folder above it (the project directory is the parent of
    the job folder); a leading ``>`` says "from the folder of the table" and tries that first. Each place is also tried with
    ``.mrc`` and ``.mrcs`` swapped, after all places have been tried without.

    Raises
    ------
    MissingStackError
        listing every file that was not found, the number of rows it costs, and where it was looked for
    ArgumentError
        if two different paths would be read from one file
    """
    if folder is not None:
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise MissingStackError(f"folder={str(folder)!r} is not a folder; it should hold the {len(names)} stacks that {table} names.")
    found: list[str] = []
    problems: list[str] = []
    folders = _Folders()
    places = partial(_places, roots=_roots(table), folder=None if folder is None else os.path.abspath(folder))
    for name, rows in zip(names, rows_per_name, strict=True):
        hit = next(filter(folders.hold, chain(places(name), _swapped(places(name)))), None)
        if hit is None:
            problems.append(_explain(name, rows, [Path(place) for place in places(name)], folder))
        else:
            found.append(hit)
    if problems:
        raise MissingStackError(_all_problems(problems, len(names), table, folder))
    _refuse_collisions(names, found, table, folder)
    return found


def _places(name: str, *, roots: tuple[str, list[str]], folder: str | None) -> Iterator[str]:
    """Where a stack may lie, as absolute paths, in the order in which to look."""
    plain = name.removeprefix(">")
    if folder is not None:
        yield os.path.join(folder, os.path.basename(plain))
    elif os.path.isabs(plain):
        yield plain
    else:
        here, (beside, *above) = roots
        first, second = (beside, here) if name.startswith(">") else (here, beside)
        for root in dict.fromkeys((first, second, *above)):
            yield os.path.join(root, plain)


def _roots(table: Path) -> tuple[str, list[str]]:
    """The working directory; the folder of a table and all folders above it."""
    beside = table.absolute().parent
    return os.getcwd(), [str(beside), *map(str, beside.parents)]


def _swapped(places: Iterable[str]) -> Iterator[str]:
    for place in places:
        stem, suffix = os.path.splitext(place)
        if suffix in _SWAPPED:
            yield stem + _SWAPPED[suffix]


class _Folders:
    """Which files there are, found out by listing a folder once more than a few of its files are asked for.

    Stacks come by the thousand in few folders, and on a network file system each question costs a round trip.
    """

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}
        self._files: dict[str, set[str]] = {}

    def hold(self, place: str) -> bool:
        """Whether there is a file of this name (or a link to one)."""
        folder, name = os.path.split(place)
        if folder not in self._files:
            self._asked[folder] = self._asked.get(folder, 0) + 1
            if self._asked[folder] <= _FEW:
                return _is_file(place)
            self._files[folder] = _list_files(folder)
        return name in self._files[folder]


def _list_files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if _is_file(entry.path if entry.is_symlink() else entry)}
    except (OSError, ValueError):  # not there, no permission, a name that no folder can have: _explain says so
        return set()


def _is_file(place: str | os.DirEntry[str]) -> bool:
    try:
        return os.path.isfile(place) if isinstance(place, str) else place.is_file()
    except (OSError, ValueError):
        return False


def _explain(name: str, rows: int, places: Sequence[Path], folder: Path | None) -> str:
    for place in places:
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                return f"  {name} ({rows} rows) is a link at {place} to {os.readlink(place)}, which does not exist"
        except (OSError, ValueError) as error:
            return f"  {name[:200]!r} ({rows} rows) cannot be opened: {getattr(error, 'strerror', None) or error}"
        else:
            return f"  {name} ({rows} rows) is a folder at {place}"
    # Where a relative path was looked for from, not each place in full.
    depth = 1 if folder is not None or Path(name).is_absolute() else len(Path(name.removeprefix(">")).parts)
    looked = ", ".join(str(place.parents[min(depth, len(place.parents)) - 1]) for place in places[:3])
    return f"  {name} ({rows} rows) looked in: {looked}{', and the folders above' if len(places) > 3 else ''}"


def _all_problems(problems: list[str], total: int, table: Path, folder: Path | None) -> str:
    remedy = (
        "Each stack has to lie directly in that folder, under the file name in blob/path."
        if folder is not None
        else 'If the stacks lie together in one folder, pass folder="that/folder".'
    )
    return "\n".join([f"{len(problems)} of {total} stacks named by {table} were not found.", *problems, remedy])


@dataclass(frozen=True)
class _Claim:
    name: str
    exact: bool


def _refuse_collisions(names: Sequence[str], found: Sequence[str], table: Path, folder: Path | None) -> None:
    """Two names may share a file only if both name it by its whole path; by file name alone they may be different stacks."""
    if len(set(found)) == len(found):
        return
    claims: dict[str, _Claim] = {}
    clashes: list[str] = []
    for name, path in zip(names, found, strict=True):
        plain = os.path.normpath(name.removeprefix(">"))
        exact = folder is None and os.path.splitext(plain)[1] == os.path.splitext(path)[1]
        earlier = claims.setdefault(path, _Claim(plain, exact))
        if earlier.name != plain and not (earlier.exact and exact):
            clashes.append(f"  {earlier.name} and {plain} -> {path}")
    if clashes:
        raise ArgumentError(
            "\n".join(
                [
                    f"{len(clashes)} pairs of different paths in {table} would be read from the same file:",
                    *clashes[:20],
                    "Keep the folders as they are in CryoSPARC and leave folder= out, or give the stacks different names.",
                ]
            )
        )
