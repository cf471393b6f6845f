"""From the paths that a table names to files on this disk; every problem of all paths in one error."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from ..errors import ArgumentError, MissingStackError
from ..on_disk import expanded, is_folder
from .rows import number_rows

_SWAPPED = {".mrc": ".mrcs", ".mrcs": ".mrc"}
#: Files of one folder that are asked for one by one, before the folder is listed instead.
_FEW = 16


def unique_paths(column: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The different values of a path column, decoded as UTF-8, in order of appearance, and each row's place among them.

    Returns
    -------
    paths : list of str
    file : (N,) int32
    """
    values, file = number_rows(column)
    return decode(values), file


def decode(values: Sequence[bytes | str]) -> list[str]:
    """Paths as a table holds them, as str; bytes that are no UTF-8 still name the same file."""
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value) for value in values]


def resolve_paths(
    names: Sequence[str],
    count_rows: Callable[[], Sequence[int]],
    *,
    table: Path,
    folder: str | os.PathLike[str] | None = None,
    remedy: str = 'If the stacks lie together in one folder, pass folder="that/folder".',
) -> list[str]:
    """The absolute path of the file that each ``blob/path`` stands for.

    With ``folder`` every stack lies directly in it, by file name. Without, a path is tried as it is (absolute, or from the
    working directory), then from the folder of the table and each folder above it (the project directory is the parent of
    the job folder), and if links lead to the table, from its own folder and those above; a leading ``>`` says "from the folder of
    the table" and tries that first. Each place is also tried with ``.mrc`` and ``.mrcs`` swapped, after all places have been tried
    without. ``remedy`` says what to do where a file is missing and no ``folder`` was given.

    Raises
    ------
    MissingStackError
        listing every file that was not found, the number of rows it costs, and where it was looked for
    ArgumentError
        if two different paths would be read from one file
    """
    if folder is not None:
        folder = expanded(folder)
        if not is_folder(folder):
            raise MissingStackError(f"folder={str(folder)!r} is not a folder; it should hold the {len(names)} stacks that {table} names.")
    places = partial(_places, roots=_roots(table), folder=None if folder is None else os.path.abspath(folder))
    found = _find(names, places)
    if "" in found:
        missing = [(name, rows) for name, rows, path in zip(names, count_rows(), found, strict=True) if not path]
        dangling = cache(_dangling_link)
        problems = [_explain(name, rows, [Path(place) for place in places(name)], folder, dangling) for name, rows in missing]
        if folder is not None:
            remedy = "Each stack has to lie directly in that folder, under the file name in blob/path."
        told = f"{len(problems)} of {len(names)} stacks named by {table} were not found."
        raise MissingStackError("\n".join([told, *problems, remedy]))
    _refuse_collisions(names, found, table, folder)
    return found


def _find(names: Sequence[str], places: Callable[[str], Iterator[str]]) -> list[str]:
    """The file that each path stands for, or "" where there is none. Paths that differ in the file name only are looked for together."""
    found = [""] * len(names)
    folders = _Folders()
    for prefix, wanted in _by_prefix(names).items():
        for place in places(prefix):
            wanted = _look(place, wanted, folders, found)
        swapped = {k: _swapped(name) for k, name in wanted.items()}
        for place in places(prefix) if swapped else ():
            swapped = _look(place, swapped, folders, found)
    return found


def _by_prefix(names: Sequence[str]) -> dict[str, dict[int, str]]:
    """File names by number, for each way in which paths begin: up to the last slash, or with ">" alone."""
    shared = names[0][: names[0].rfind("/") + 1] if names else ""
    # All between the first and the last in the alphabet begin as these do: in most tables all paths do.
    if shared and min(names).startswith(shared) and max(names).startswith(shared):
        rest = [name[len(shared) :] for name in names]
        if "/" not in "".join(rest):
            return {shared: dict(enumerate(rest))}
    of_prefix: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for k, name in enumerate(names):
        cut = name.rfind("/") + 1 or name.startswith(">")
        of_prefix[name[:cut]][k] = name[cut:]
    return of_prefix


def _look(place: str, wanted: dict[int, str], folders: _Folders, found: list[str]) -> dict[int, str]:
    """Fill in the files that are in a folder; those that are not."""
    there = folders.which(place, wanted.values()) if wanted else set()
    if there.isdisjoint(wanted.values()):
        return wanted
    left = {} if there.issuperset(wanted.values()) else {k: name for k, name in wanted.items() if name not in there}
    for k, name in wanted.items():
        if k not in left:
            found[k] = place + name
    return left


def _places(name: str, *, roots: tuple[list[str], list[str]], folder: str | None) -> Iterator[str]:
    """Where a stack (or, up to and with the last slash, the folder of it) may lie, as absolute paths, in the order in which to look."""
    plain = name.removeprefix(">")
    if folder is not None:
        yield os.path.join(folder, os.path.basename(plain))
    elif os.path.isabs(plain):
        yield plain
    else:
        here, (beside, *above) = roots
        first, second = ([beside], here) if name.startswith(">") else (here, [beside])
        for root in dict.fromkeys((*first, *second, *above)):
            yield os.path.join(root, plain)


def _roots(table: Path) -> tuple[list[str], list[str]]:
    """The working directory, if it has not been removed; the folders around a table."""
    try:
        here = [os.getcwd()]
    except FileNotFoundError:
        here = []
    return here, [str(folder) for folder in folders_around(table)]


def folders_around(table: Path) -> list[Path]:
    """The folder of a table and all folders above it, then those where it lies if it is reached by links."""
    by_link, itself = table.absolute(), Path(os.path.realpath(table))
    return list(dict.fromkeys((*by_link.parents, *itself.parents)))


def _swapped(name: str) -> str:
    """The file name with ``.mrc`` and ``.mrcs`` swapped; "" for any other."""
    stem, suffix = os.path.splitext(name)
    return stem + _SWAPPED[suffix] if suffix in _SWAPPED else ""


class _Folders:
    """Which files there are, found out by listing a folder once more than a few of its files are asked for.

    Stacks come by the thousand in few folders, and on a network file system each question costs a round trip.
    """

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}
        self._files: dict[str, set[str] | None] = {}  # None for a folder that cannot be listed, though its files may be read

    def which(self, folder: str, names: Collection[str]) -> set[str]:
        """Names among which are those of the given ones that are files (or links to one) in a folder, whose path ends with a slash."""
        if folder not in self._files:
            self._asked[folder] = self._asked.get(folder, 0) + len(names)
            if self._asked[folder] > _FEW:
                self._files[folder] = _list_files(folder)
        listed = self._files.get(folder)
        return {name for name in names if os.path.isfile(folder + name)} if listed is None else listed


def _list_files(folder: str) -> set[str] | None:
    """The files of a folder; None if it cannot be listed."""
    try:
        with os.scandir(folder) as listed:
            entries = list(listed)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # not there, or a name that no folder can have
        return set()
    except OSError:
        return None
    try:
        return {entry.name for entry in entries if entry.is_file()}
    except OSError:  # a link among them cannot be followed
        return {entry.name for entry in entries if os.path.isfile(entry.path)}


def _dangling_link(folder: Path) -> Path | None:
    """The link on the way to a folder that leads nowhere, if one does."""
    return next((path for path in (folder, *folder.parents) if os.path.islink(path) and not os.path.exists(path)), None)


def _explain(name: str, rows: int, places: Sequence[Path], folder: Path | None, dangling: Callable[[Path], Path | None]) -> str:
    if not name.removeprefix(">"):
        return f"  {name!r} ({rows} rows) is no path: the table does not say where these images lie"
    shown = name if name == name.strip() else repr(name)
    for place in places:
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                return f"  {shown} ({rows} rows) is a link at {place} to {os.readlink(place)}, which does not exist"
            if (link := dangling(place.parent)) is not None:
                return f"  {shown} ({rows} rows) lies behind {link}, a link to {os.readlink(link)}, which does not exist"
        except (OSError, ValueError) as error:
            return f"  {name[:200]!r} ({rows} rows) cannot be opened: {getattr(error, 'strerror', None) or error}"
        else:
            return f"  {shown} ({rows} rows) is {'a folder' if place.is_dir() else 'no file that can be mapped'} at {place}"
    # Where a relative path was looked for from, not each place in full.
    depth = 1 if folder is not None or Path(name).is_absolute() else len(Path(name.removeprefix(">")).parts)
    looked = ", ".join(str(place.parents[min(depth, len(place.parents)) - 1]) for place in places[:3])
    return f"  {shown} ({rows} rows) looked in: {looked}{', and the folders above' if len(places) > 3 else ''}"


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
