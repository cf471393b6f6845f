"""A store of zarr at a URL as the place of an export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..checksum import crc32c
from ..errors import ExportError
from ..zarr_store import first_line, open_store
from .place import Output, Place, WrittenFile, bytes_of


class StorePlace(Place):
    """A store of zarr at a URL, in which an object appears as a whole."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.before_placing: Callable[[Place, Output], None] | None = None
        self._store: Any = open_store(url, read_only=False)

    def __str__(self) -> str:
        return self._url

    @contextmanager
    def create(self, name: str, *, head_bytes: int = 0, room: int = 0) -> Iterator[Output]:
        """See ``Place``; the whole file is in memory until it is sent."""
        from zarr.core.buffer import default_buffer_prototype

        output = _StoreOutput(name, head_bytes)
        yield output
        if self.before_placing is not None:
            self.before_placing(self, output)
        buffer = default_buffer_prototype().buffer.from_bytes(bytes(output.content))
        self._wait(self._store.set(name, buffer), name)

    def read(self, name: str) -> bytes | None:
        """See ``Place``."""
        from zarr.core.buffer import default_buffer_prototype

        found = self._wait(self._store.get(name, default_buffer_prototype()), name)
        return None if found is None else bytes(found.to_bytes())

    def names(self, folder: str) -> list[str]:
        """See ``Place``."""

        async def listed() -> list[str]:
            return [name async for name in self._store.list_dir(folder)]

        return sorted(self._wait(listed(), folder))

    def remove(self, name: str) -> None:
        """See ``Place``."""

        async def gone() -> None:
            for found in [key async for key in self._store.list_prefix(name + "/")]:
                await self._store.delete(found)
            if await self._store.exists(name):
                await self._store.delete(name)

        self._wait(gone(), name)

    def remove_empty(self, folder: str) -> None:
        """See ``Place``: there are no folders without files."""

    def remove_abandoned(self, seconds: float) -> None:
        """See ``Place``: nothing of a file is there before all of it is."""

    def holds(self, file: WrittenFile, *, checked: bool) -> bool:
        """See ``Place``."""
        if not checked:
            there = self._wait(self._store.exists(file.name), file.name)
            return bool(there) and int(self._wait(self._store.getsize(file.name), file.name)) == file.size
        content = self.read(file.name)
        return content is not None and ((len(content), crc32c(content)),) == file.parts

    def _wait(self, coroutine: Any, name: str) -> Any:
        from zarr.core.sync import sync

        try:
            return sync(coroutine)
        except Exception as error:  # whatever the library for this kind of URL raises
            raise ExportError(
                f"{self._url.rstrip('/')}/{name} cannot be reached: {first_line(error)}. What is finished stays; run the same export again "
                "to continue."
            ) from error


class _StoreOutput:
    """The same in memory."""

    def __init__(self, name: str, head_bytes: int) -> None:
        self._name, self._head_bytes = name, head_bytes
        self.content = bytearray(head_bytes)

    def write(self, piece: np.ndarray | bytes) -> None:
        """See ``Output``."""
        self.content += bytes_of(piece).data

    def write_head(self, content: bytes) -> None:
        """See ``Output``."""
        self.content[: self._head_bytes] = content

    @property
    def written(self) -> WrittenFile:
        """See ``Output``."""
        return WrittenFile(self._name, ((len(self.content), crc32c(bytes(self.content))),))
