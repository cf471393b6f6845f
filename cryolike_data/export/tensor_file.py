"""Files that ``torch.load`` reads, written piece by piece: what stands around the numbers of a tensor in such a file."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=8)
def around_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What stands before and after the numbers of a contiguous tensor in a file that ``torch.load(weights_only=True)`` reads.

    The checksum that the ZIP archive has for the numbers is left out, as ``torch.serialization.set_crc32_options(False)`` does:
    it would take longer than writing them. ``torch.load`` does not look at it, ``unzip`` would miss it.

    Parameters
    ----------
    shape, dtype : of the tensor
    """
    file = _FileWithHole()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype, device="cpu"), file)  # type: ignore[arg-type]
    before = file.stretch(0)
    after = file.stretch(len(before) + torch.Size(shape).numel() * dtype.itemsize)
    return before, after


class _FileWithHole(io.RawIOBase):
    """Keeps what is written and where, and nothing of what is passed over."""

    def __init__(self) -> None:
        self._writes: list[tuple[int, bytes]] = []
        self._position = 0

    def write(self, data: Any) -> int:
        self._writes.append((self._position, bytes(data)))
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def stretch(self, start: int) -> bytes:
        """What was written without a gap from a position on."""
        found = b""
        for position, data in sorted(self._writes):
            if position == start + len(found):
                found += data
        return found
