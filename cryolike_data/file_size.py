"""Sizes of files, looked at again and again while these are mapped: touching a map beyond the end of its file ends the process."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

from .errors import StackError

#: A file's size is looked at again when it was last looked at longer ago than this, seconds.
CHECK_EVERY = 1.0


@cache
def _statx() -> Any:
    # Through PyDLL, which keeps the interpreter lock: the call takes microseconds, and giving the lock up for each file would
    # hand it to a busy main thread for milliseconds.
    return getattr(ctypes.PyDLL(None, use_errno=True), "statx", None) if sys.platform == "linux" else None


_STATX_BUFFER = 256
_AT_FDCWD, _STATX_SIZE = -100, 0x200


def file_size(path: str) -> int:
    """Size of a file, bytes; -1 if it is gone, a ``StackError`` if the system does not say."""
    buffer = ctypes.create_string_buffer(_STATX_BUFFER)
    statx = _statx()
    if statx is not None and statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_SIZE, buffer) == 0:
        return int.from_bytes(buffer.raw[40:48], sys.byteorder)
    # An old C library, a container that forbids the call, or a file that is gone.
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1
    except OSError as error:  # a folder that was closed to this user meanwhile
        raise StackError(f"{path} cannot be reached any more: {error.strerror}.") from error
