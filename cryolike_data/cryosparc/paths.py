"""From the paths that a table names to files on this disk; every problem of all paths in one error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ArgumentError, MissingStackError

_SWAPPED = {".mrc": ".mrcs", ".mrcs": ".mrc"}


def unique_paths(column: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The different values of a path column, decoded as UTF-8, in order of appearance, and each row's place among them.

    Returns
    -------
    paths : list of str
    file : (N,) int32
    """
    if len(column) == 0:
        return [], np.empty(0, np.int32)
    starts = np.flatnonzero(np.concatenate([[True], column[1:] != column[:-1]]))
    number: dict[bytes | str, int] = {}
    heads = [number.setdefault(value, len(number)) for value in column[starts].tolist()]
    file = np.repeat(np.asarray(heads, np.int32), np.diff(np.append(starts, len(column))))
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value) for value in number], file


def resolve_paths(
    names: Sequence[str], rows_per_name: Sequence[int], *, table: Path, folder: str | os.PathLike[str] | None = None
) -> list[Path]:
    """The file that each ``blob/path`` stands for.

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
    found: list[Path] = []
    problems: list[str] = []
    for name, rows in zip(names, rows_per_name, strict=True):
        places = _places(name, table, folder)
        swapped = [place.with_suffix(_SWAPPED[place.suffix]) for place in places if place.suffix in _SWAPPED]
        hit = next((place for place in [*places, *swapped] if _is_file(place)), None)
        if hit is None:
            problems.append(_explain(name, rows, places, folder))
        else:
            found.append(hit.absolute())
    if problems:
        raise MissingStackError(_all_problems(problems, len(names), table, folder))
    _refuse_collisions(names, found, table, folder)
    return found


def _places(name: str, table: Path, folder: Path | None) -> list[Path]:
    plain = Path(name.removeprefix(">"))
    if folder is not None:
        return [folder / plain.name]
    if plain.is_absolute():
        return [plain]
    beside = table.absolute().parent
    above = [parent / plain for parent in beside.parents]
    here = [Path.cwd() / plain]
    places = [beside / plain, *here, *above] if name.startswith(">") else [*here, beside / plain, *above]
    return list(dict.fromkeys(places))


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except (OSError, ValueError):  # no permission, a name that no file can have: _explain says so
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


def _refuse_collisions(names: Sequence[str], found: Sequence[Path], table: Path, folder: Path | None) -> None:
    """Two names may share a file only if both name it by its whole path; by file name alone they may be different stacks."""
    claims: dict[Path, _Claim] = {}
    clashes: list[str] = []
    for name, path in zip(names, found, strict=True):
        plain = os.path.normpath(name.removeprefix(">"))
        exact = folder is None and Path(plain).suffix == path.suffix
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
