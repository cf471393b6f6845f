"""Where a store of particles lies, in a local folder or at a URL, how it is opened, and which layout it has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, MissingDependencyError, MissingStackError, StackError
from .on_disk import expanded, is_folder

if TYPE_CHECKING:
    import zarr
    from zarr.abc.store import Store

#: Version of the layout, in the attribute ``cryolike_data/format``.
FORMAT = 1

Location = str | os.PathLike[str]
#: What changes when another store takes the place of one; empty for one at a URL.
Stamp = tuple[int, ...]

#: The process that first used the threads of a Rust library (obstore, zarrs).
_rust_process: int | None = None


def is_url(location: Location) -> bool:
    """Whether a store lies at a URL (``s3://...``) and not in a local folder.

    Raises
    ------
    ArgumentError
        if it is a ``file://`` URL
    """
    text = os.fspath(location)
    if text.startswith("file://"):
        raise ArgumentError(f"{text} is a local folder; pass its path without file:// in front.")
    return "://" in text


def absolute(location: Location) -> str:
    """A location that stays the same when the working directory changes."""
    return os.fspath(location) if is_url(location) else str(expanded(location).absolute())


def stamp_of(location: str) -> Stamp:
    """What changes when another store takes the place of a local one; nothing at a URL."""
    if is_url(location):
        return ()
    try:
        status = os.stat(os.path.join(location, "zarr.json"))
    except (OSError, ValueError):  # a name with a zero byte
        return ()
    return status.st_size, status.st_mtime_ns


def require_same(location: str, stamp: Stamp) -> None:
    """Raise a ``StackError`` if another store has taken the place of one with this stamp."""
    if stamp_of(location) != stamp:
        raise StackError(f"{location} has changed since it was opened; open the data set again.")


def open_store(location: Location, *, read_only: bool) -> Store:
    """What zarr reads and writes a store with: a folder by itself, a URL through obstore where that knows it, else through fsspec.

    Parameters
    ----------
    location : a local folder or a URL
    read_only : whether nothing may be written

    Raises
    ------
    MissingDependencyError
        if there is no package for this kind of URL
    StackError
        if something (an account, a region) is lacking to open the URL
    """
    from zarr.storage import FsspecStore, LocalStore

    text = absolute(location)
    if not is_url(text):
        return LocalStore(text, read_only=read_only)
    try:
        return _obstore(text, read_only=read_only) or FsspecStore.from_url(text, read_only=read_only)
    except ImportError as error:
        remedy = "Install obstore." if rust_works() else "Forked processes cannot use obstore: start them with spawn, or install that."
        raise MissingDependencyError(f"{text} cannot be opened: {error}. {remedy}") from error
    except Exception as error:  # whatever the library for this kind of URL raises
        raise StackError(f"{text} cannot be opened: {first_line(error)}.") from error


def open_group(location: str) -> tuple[zarr.Group, dict[str, Any]]:
    """The group of a store that ``export_zarr`` wrote, to be read, and what its attribute ``cryolike_data`` says.

    Raises
    ------
    MissingStackError
        if there is no such folder
    StackError
        if it is not such a store, or cannot be read
    MissingDependencyError
        if there is no package for this kind of URL
    """
    import zarr

    if not is_url(location) and not is_folder(location):
        raise MissingStackError(f"There is no Zarr store {location}.")
    store = open_store(location, read_only=True)
    try:
        group = zarr.open_group(store, mode="r")
        layout: Any = group.attrs.asdict().get("cryolike_data")
        ours = isinstance(layout, dict) and "images" in group
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise StackError(f"{location} is not a Zarr store: {error}") from error
    except Exception as error:  # whatever the library for this kind of URL raises
        raise StackError(f"{location} cannot be read: {first_line(error)}.") from error
    if not ours:
        raise StackError(f"{location} was not written by cryolike_data.export_zarr; open it with zarr itself.")
    if layout.get("format") != FORMAT:
        raise StackError(f"{location} has layout {layout.get('format')}; this version of cryolike_data reads layout {FORMAT}. Upgrade it.")
    return group, layout


def rust_works() -> bool:
    """Whether libraries in Rust can be used: after a fork their threads are gone, and a call would wait for them for ever."""
    global _rust_process
    _rust_process = _rust_process or os.getpid()
    return _rust_process == os.getpid()


def _obstore(url: str, *, read_only: bool) -> Store | None:
    """A store that uses obstore, or None where that is not installed, cannot be used, or does not know this kind of URL."""
    try:
        import obstore
        from zarr.storage import ObjectStore
    except ImportError:
        return None
    try:
        scheme = obstore.parse_scheme(url)
    except obstore.exceptions.BaseError:
        return None
    # Each memory store of obstore is a new one, while those of fsspec are found again by their name.
    if scheme == "memory" or not rust_works():
        return None
    plain: Any = {"client_options": {"allow_http": True}} if url.startswith("http://") else {}
    return ObjectStore(obstore.store.from_url(url, **plain), read_only=read_only)


def first_line(error: Exception) -> str:
    """What an error of a library says, without what may follow of its own workings."""
    return str(error).partition("\n")[0] or type(error).__name__
