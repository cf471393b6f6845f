"""Files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from .errors import ExportError


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
