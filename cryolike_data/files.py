"""Files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from .errors import ExportError
from .pages import libc

_KEEP_SIZE = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Writable(Protocol):
    """What takes bytes, such as a binary file."""

    def write(self, data: bytes, /) -> object:
        """Add bytes."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to ``path`` at the end; removed if writing fails."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    fallocate = getattr(libc(), "fallocate", None)  # not posix_fallocate, which writes into every block where the system cannot do it
    if size and fallocate is not None and fallocate(descriptor, _KEEP_SIZE, 0, size) != 0:
        code = ctypes.get_errno()
        if code in _FULL:
            raise OSError(code, os.strerror(code))
