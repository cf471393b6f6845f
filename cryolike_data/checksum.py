"""CRC32C of large buffers, the checksum of Zarr and of our manifests, without holding the interpreter lock."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import google_crc32c  # comes with zarr
import numpy as np


def crc32c(data: np.ndarray | bytes, crc: int = 0) -> int:
    """The checksum of bytes, or of what came before (whose checksum is ``crc``) and these bytes.

    Parameters
    ----------
    data : bytes, or a contiguous array of any dtype
    crc : checksum of what came before
    """
    extend = _extend()
    if extend is None or isinstance(data, bytes):
        return int(google_crc32c.extend(crc, data))
    return int(extend(crc, data.ctypes.data, data.nbytes))


@cache
def _extend() -> Any:
    """The function of the C library in google_crc32c, which that calls with the lock held; None where it cannot be had by itself."""
    try:
        from google_crc32c import _crc32c

        extend = ctypes.CDLL(_crc32c.__file__).crc32c_extend
    except (ImportError, OSError, AttributeError):
        return None
    extend.restype, extend.argtypes = ctypes.c_uint32, [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
    return extend
