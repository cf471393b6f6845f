"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from .errors import ExportError
from .pages import libc

_KEEP_SIZE = 1
_SCRATCH = ".unfinished-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Writable(Protocol):
    """What takes bytes, such as a binary file."""

    def write(self, data: bytes, /) -> object:
        """Add bytes."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, which has to be there, renamed to ``path`` at the end; removed if writing fails."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # as ``is_partial`` knows it
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(name: str, of: str) -> bool:
    """Whether a file of this name is on the way to be the file ``of``, or was when a process was killed."""
    return re.fullmatch(rf"\.{re.escape(of)}\.[0-9a-f]{{8}}\.partial", name) is not None


@contextmanager
def whole_folder(path: Path, parts: Sequence[str]) -> Iterator[Path]:
    """A new folder in which to make these parts, which are in ``path`` at the end, in place of those that were.

    A folder that is there stays the one it is: it may be where a disk is mounted, or somebody's working directory. Parts come in the order
    given and go in the opposite one, so that where the last one is, all are.
    """
    is_new = not path.exists()
    make_folder(path.parent)
    with TemporaryDirectory(dir=path.parent if is_new else path, prefix=f".{path.name}.new-" if is_new else _SCRATCH) as scratch:
        made = Path(scratch, "new")
        made.mkdir()
        yield made
        if is_new:
            os.replace(made, path)
            return
        for old in [*(path / name for name in reversed(parts)), *unfinished(path)]:
            if os.path.lexists(old) and old != Path(scratch):
                os.replace(old, Path(scratch, old.name))
        for name in parts:
            os.replace(made / name, path / name)


def unfinished(path: Path) -> list[Path]:
    """Where ``whole_folder`` makes the parts of a folder that is there, for those who are at it or were killed."""
    return list(path.glob(f"{_SCRATCH}????????"))


def make_folder(path: Path) -> None:
    """Make a folder and those above it, or raise an ``ExportError`` that names what is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"The folder {path} cannot be made: {error}") from error


def keep_room(descriptor: int, size: int) -> None:
    """Have the system set aside room for so many bytes of a file that is about to be written, where it can (Linux); its size stays.

    All at once that takes less than with each piece that is written.

    Raises
    ------
    OSError
        if there is not enough room
    """
    # Not posix_fallocate, which writes into every block where the system cannot do it.
    if size and sys.platform == "linux" and libc().fallocate(descriptor, _KEEP_SIZE, 0, size) != 0:
        code = ctypes.get_errno()
        if code in _FULL:
            raise OSError(code, os.strerror(code))
