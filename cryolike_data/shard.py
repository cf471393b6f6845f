"""The format of one shard of a Zarr v3 array (``sharding_indexed``): chunks in any order, and an index that says where each lies.

The index holds offset and length of every chunk as little-endian uint64, both 2**64 - 1 for a chunk that is absent, then the
CRC32C of all that, and stands at the end or the start of the file. Here they are int64, and -1 for what is absent.
"""

from __future__ import annotations

import os

import numpy as np

from .checksum import crc32c
from .errors import StackError

_CRC_BYTES = 4
#: What to do about a file that is not whole.
REMEDY = "Copy or export the store again."


def remedy_of(error: Exception) -> str:
    """What to say after why a file was not read; nothing where that is not permitted, which no copy of it would be either."""
    return "" if isinstance(error, PermissionError) else f" {REMEDY}"


def index_size(n_chunks: int) -> int:
    """Bytes of the index of a shard of so many chunks."""
    return 16 * n_chunks + _CRC_BYTES


def index_bytes(offsets: np.ndarray, lengths: np.ndarray) -> bytes:
    """The index of a shard whose chunks start at ``offsets`` and have ``lengths`` bytes; -1 in both for an absent one."""
    index = np.stack([offsets, lengths], axis=1).astype("<i8").tobytes()
    return index + crc32c(index).to_bytes(_CRC_BYTES, "little")


def parse_index(raw: bytes, n_chunks: int, path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where the chunks of a shard start and how long they are.

    Parameters
    ----------
    raw : the bytes of the index
    n_chunks : chunks in the shard, absent ones counted
    path : the file, for messages

    Returns
    -------
    (n_chunks,) int64 offsets and lengths in bytes, -1 in both for an absent chunk

    Raises
    ------
    StackError
        if these bytes are not the index of such a shard
    """
    if len(raw) != index_size(n_chunks):
        raise StackError(
            f"{path} is cut short: the index of its {n_chunks} chunks has {len(raw)} of {index_size(n_chunks)} bytes. {REMEDY}"
        )
    index, checksum = raw[:-_CRC_BYTES], int.from_bytes(raw[-_CRC_BYTES:], "little")
    if crc32c(index) != checksum:
        raise StackError(f"{path} is cut short or damaged: the index of its chunks does not match its checksum. {REMEDY}")
    offsets, lengths = np.frombuffer(index, "<i8").astype(np.int64).reshape(n_chunks, 2).T
    if ((offsets < 0) != (lengths < 0)).any() or min(offsets.min(initial=0), lengths.min(initial=0)) < -1:
        raise StackError(f"{path} is damaged: the index of its chunks makes no sense. {REMEDY}")
    return offsets, lengths


def read_index(path: str | os.PathLike[str], n_chunks: int, *, at_start: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The same as ``parse_index``, from a file, which has to be as long as its chunks need.

    Parameters
    ----------
    path : the shard
    n_chunks : chunks in it, absent ones counted
    at_start : whether the index is at the start of the file, and not at its end

    Raises
    ------
    StackError
        if the file is missing, cut short or damaged
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(0 if at_start else max(0, size - index_size(n_chunks)))
            offsets, lengths = parse_index(file.read(index_size(n_chunks)), n_chunks, path)
    except OSError as error:
        raise _unreadable(path, error) from error
    beyond = int((lengths > size - offsets).sum())
    if beyond:
        raise StackError(f"{path} is cut short: {beyond} of its {n_chunks} chunks end beyond its {size} bytes. {REMEDY}")
    return offsets, lengths


def single_chunk(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """The same as ``read_index`` for a chunk that is a file of its own, without an index."""
    try:
        return np.zeros(1, np.int64), np.full(1, os.stat(path).st_size, np.int64)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: OSError) -> StackError:
    what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return StackError(f"{path} {what}.{remedy_of(error)}")
