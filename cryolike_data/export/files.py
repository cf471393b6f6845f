"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ExportExistsError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to ``path`` at the end; removed if writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``path``, renamed to it at the end; removed if writing fails.

    Raises
    ------
    ExportExistsError
        if ``path`` exists, is not an empty folder, and ``overwrite`` is False
    """
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not overwrite:
        raise ExportExistsError(f"{path} exists already. Choose another place, or pass overwrite=True to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)
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
        if former.is_dir():
            shutil.rmtree(former)
        else:
            former.unlink(missing_ok=True)
