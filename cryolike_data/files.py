"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError, ExportExistsError


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


@contextmanager
def whole_folder(path: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary folder beside ``path``, renamed to it at the end; removed if writing fails.

    Raises
    ------
    ExportExistsError
        if ``path`` exists, is not an empty folder, and ``overwrite`` is False
    """
    path = path.resolve()  # a link is followed, so that what it points to is replaced
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not replaceable(path):
        raise ExportExistsError(f"{path} holds something that was not written by an export and is never replaced; choose another place.")
    if taken and not overwrite:
        raise ExportExistsError(f"{path} exists already. Choose another place, or pass overwrite=True to replace it.")
    make_folder(path.parent)
    token = uuid.uuid4().hex[:8]
    partial, former = (path.with_name(f".{path.name}.{token}.{kind}") for kind in ("partial", "former"))
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            os.replace(path, former)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if former.exists() and not path.exists():
            os.replace(former, path)
        shutil.rmtree(former, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, or raise an ``ExportError`` that names what is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"The folder {path} cannot be made: {error}") from error
