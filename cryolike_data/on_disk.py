"""What lies at a path, told from what this user may not look at."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from .errors import ArgumentError, MissingStackError

#: What the system says where nothing can be, by a name that is too long or by links that lead to each other.
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with the home folder that ``~`` stands for, unless something here has a name that begins so.

    Raises
    ------
    ArgumentError
        if it is nobody's home: what is written there would lie in a folder of that name
    """
    place = Path(os.path.expanduser(path))
    first = place.parts[0] if place.parts else ""
    if first.startswith("~") and not os.path.lexists(first):
        raise ArgumentError(f"{place} cannot be found: {first} is no user's home folder, and nothing here has that name.")
    return place


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to a file; a ``MissingStackError`` if the system does not say."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to a folder; a ``MissingStackError`` if the system does not say."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: str | os.PathLike[str]) -> int:
    """Kind and permissions of what is there; 0 if nothing is."""
    # Not by way of pathlib or os.path, which take what is closed to this user for not there, the one in newer Pythons only.
    try:
        return os.stat(path).st_mode
    except ValueError:  # a name with a zero byte
        return 0
    except OSError as error:
        if error.errno in _NOTHING:
            return 0
        raise MissingStackError(f"{os.fspath(path)} cannot be reached: {error.strerror}.") from error
