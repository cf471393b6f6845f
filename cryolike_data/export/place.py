"""Where an export goes: a local folder, or a store at a URL. Files appear in it whole or not at all, with their checksums."""

from __future__ import annotations

import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ..checksum import crc32c
from ..errors import ExportError
from ..files import keep_room, make_folder
from ..zarr_store import is_url

#: Folder of an export that is at work: its plan, what is finished, who is at it, and files that are being written.
STATE = ".export"
PARTIAL = f"{STATE}/partial"
#: Bytes that are read at a time to check a file.
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class WrittenFile:
    """A file that an export wrote.

    Attributes
    ----------
    name : below the target, with "/"
    parts : (bytes, CRC32C) of each stretch of the file, one after the other
    """

    name: str
    parts: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(size for size, _ in self.parts)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"name": self.name, "parts": [list(part) for part in self.parts]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> WrittenFile:
        """What ``to_json`` gave."""
        return cls(str(values["name"]), tuple((int(size), int(crc)) for size, crc in values["parts"]))


class Output(Protocol):
    """A file that is being written."""

    def write(self, piece: np.ndarray | bytes) -> None:
        """Add a piece, which may be changed as soon as this returns."""

    def write_head(self, content: bytes) -> None:
        """Fill the place that was left for it at the start; the last call."""

    @property
    def written(self) -> WrittenFile:
        """What was written."""


class Place(Protocol):
    """Files by name, each written whole or not at all.

    Attributes
    ----------
    before_placing : called with this place and a file that is whole before that is put into its place, which an error prevents
    """

    before_placing: Callable[[Place, Output], None] | None

    def create(self, name: str, *, head_bytes: int = 0, room: int = 0) -> AbstractContextManager[Output]:
        """A file to be written, which is in its place when the context ends without an error.

        ``head_bytes`` are left for its head; it will have ``room`` bytes, or more.
        """

    def write(self, name: str, content: bytes) -> WrittenFile:
        """Write a file of a single piece."""
        with self.create(name) as file:
            file.write(content)
        return file.written

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None if there is none."""

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, without the folder."""

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it; nothing happens if it is not there."""

    def remove_empty(self, folder: str) -> None:
        """Remove a folder and those in it as far as there is no file in them."""

    def remove_abandoned(self, seconds: float) -> None:
        """Remove what was being written and has not grown for so long: whoever wrote it is dead."""

    def holds(self, file: WrittenFile, *, checked: bool) -> bool:
        """Whether a file is there with its size, and if ``checked`` with its checksums."""


def open_place(target: str) -> Place:
    """The place that a path or URL means."""
    from .store_place import StorePlace

    return StorePlace(target) if is_url(target) else LocalPlace(Path(target))


class LocalPlace(Place):
    """A folder. Files are written below ``.export`` in it and renamed into their place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before_placing: Callable[[Place, Output], None] | None = None

    def __str__(self) -> str:
        return str(self.root)

    @contextmanager
    def create(self, name: str, *, head_bytes: int = 0, room: int = 0) -> Iterator[Output]:
        """See ``Place``; an ``ExportError`` names the file that cannot be written, and no part of it stays behind."""
        target, partial = self.root / name, self.root / PARTIAL / uuid.uuid4().hex
        make_folder(partial.parent)
        make_folder(target.parent)
        try:
            with explained(target):
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                with explained(target):
                    keep_room(descriptor, room)
                output = _LocalOutput(name, target, descriptor, head_bytes)
                yield output
            finally:
                with explained(target):  # a network file system may tell here that it is full
                    os.close(descriptor)
            if self.before_placing is not None:
                self.before_placing(self, output)
            with explained(target):
                os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        """See ``Place``."""
        with explained(self.root / name, "read"), suppress(FileNotFoundError, NotADirectoryError):
            return (self.root / name).read_bytes()
        return None

    def names(self, folder: str) -> list[str]:
        """See ``Place``."""
        with explained(self.root / folder, "listed"), suppress(FileNotFoundError, NotADirectoryError):
            return sorted(entry.name for entry in os.scandir(self.root / folder) if entry.is_file())
        return []

    def remove(self, name: str) -> None:
        """See ``Place``."""
        path = self.root / name
        with explained(path, "removed"):
            while path.is_dir() and not path.is_symlink():
                with suppress(FileNotFoundError):  # somebody else removes it too
                    shutil.rmtree(path)
            path.unlink(missing_ok=True)

    def remove_empty(self, folder: str) -> None:
        """See ``Place``."""
        for path, _, _ in os.walk(self.root / folder, topdown=False):
            with suppress(OSError):  # there is something in it
                os.rmdir(path)

    def remove_abandoned(self, seconds: float) -> None:
        """See ``Place``."""
        for name in self.names(PARTIAL):
            path = self.root / PARTIAL / name
            with suppress(FileNotFoundError):  # it was finished just now
                if time.time() - path.stat().st_mtime > seconds:
                    path.unlink()

    def holds(self, file: WrittenFile, *, checked: bool) -> bool:
        """See ``Place``."""
        path = self.root / file.name
        with explained(path, "read"), suppress(FileNotFoundError, NotADirectoryError):
            found = path.stat()  # not ``is_file``, which in newer Pythons takes what is closed to this user for not there
            if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
                return False
            if not checked:
                return True
            buffer = np.empty(min(file.size, _READ_BYTES), np.uint8)
            with path.open("rb", buffering=0) as stream:
                return all(_checksum_of(stream, size, buffer) == crc for size, crc in file.parts)
        return False


class _LocalOutput:
    """A file with its checksums, written as the pieces come: whoever wants to overlap that with other work runs several."""

    def __init__(self, name: str, target: Path, descriptor: int, head_bytes: int) -> None:
        self._name, self._target, self._descriptor, self._head_bytes = name, target, descriptor, head_bytes
        self._head_crc = self._crc = self._size = 0
        if head_bytes:
            os.lseek(descriptor, head_bytes, os.SEEK_SET)

    def write(self, piece: np.ndarray | bytes) -> None:
        """See ``Output``."""
        flat = bytes_of(piece)
        # Right before it is written, while it is in the cache.
        self._crc, self._size = crc32c(flat, self._crc), self._size + len(flat)
        _write_all(self._descriptor, flat, self._target)

    def write_head(self, content: bytes) -> None:
        """See ``Output``."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        _write_all(self._descriptor, bytes_of(content), self._target)
        self._head_crc = crc32c(content)

    @property
    def written(self) -> WrittenFile:
        """See ``Output``."""
        head = ((self._head_bytes, self._head_crc),) if self._head_bytes else ()
        return WrittenFile(self._name, (*head, (self._size, self._crc)))


def bytes_of(piece: np.ndarray | bytes) -> np.ndarray:
    """A piece of a file, byte by byte."""
    return np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else np.ascontiguousarray(piece).reshape(-1).view(np.uint8)


def _write_all(descriptor: int, flat: np.ndarray, target: Path) -> None:
    """All of it: a system call may write less."""
    left = memoryview(flat)  # type: ignore[arg-type]
    with explained(target):
        while len(left):
            left = left[os.write(descriptor, left) :]


def _checksum_of(stream: BinaryIO, size: int, buffer: np.ndarray) -> int:
    """CRC32C of the next bytes of a file."""
    crc = 0
    while size:
        got = stream.readinto(buffer[: min(size, len(buffer))])  # type: ignore[attr-defined]
        if not got:
            return -1
        crc, size = crc32c(buffer[:got], crc), size - got
    return crc


@contextmanager
def explained(target: Path | str, done: str = "written") -> Iterator[None]:
    """What the system says of a file or folder that cannot be written, as an ``ExportError``."""
    try:
        yield
    except PermissionError as error:
        raise ExportError(
            f"{target} cannot be {done}: {error.strerror}. Choose another place, or have its owner allow it; users who share an export "
            "work with umask 002, in a folder of their group that has mode 2775."
        ) from error
    except OSError as error:
        raise ExportError(
            f"{target} cannot be {done}: {error.strerror or error}. What is finished stays; run the same export again to continue."
        ) from error
