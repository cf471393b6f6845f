"""Images read through zarr: those of compressed stores and of stores at a URL, which cannot be mapped into memory."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from .errors import StackError
from .lookahead import nowhere
from .zarr_layout import require_all_keys
from .zarr_store import Stamp, is_url, open_group, require_same, rust_works

if TYPE_CHECKING:
    import zarr

#: Chunks that lie one after the other are read in one call, up to about so many bytes.
_RUN_BYTES = 32 << 20
#: Calls at the same time: zarr takes milliseconds for each, and a server more.
_THREADS = 8

_CONFIGURING = threading.Lock()


def _renew_lock() -> None:
    """A fork may have left the lock behind in the hands of a thread that is no more."""
    global _CONFIGURING
    _CONFIGURING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class ZarrImages:
    """The images of one store, read in whole inner chunks. Safe to share between threads; pickles as where the store lies.

    Parameters
    ----------
    location : an absolute path or a URL
    dtype : the native dtype of the images
    stamp : of the store when it was opened
    """

    def __init__(self, location: str, dtype: np.dtype[Any], stamp: Stamp) -> None:
        self.location, self.dtype, self._stamp = location, dtype, stamp
        self._opened: tuple[int, zarr.Array[Any]] | None = None

    def locate(self, file: np.ndarray, image: np.ndarray) -> ZarrRows:
        """The images of a table whose row k is image ``image[k]`` of the store."""
        return ZarrRows(self, image)

    def read_into(self, image: np.ndarray, out: np.ndarray) -> None:
        """Copy image ``image[k]`` into ``out[k]`` for all k; each inner chunk is read once, and several at the same time.

        Raises
        ------
        StackError
            if a chunk is missing or cannot be read or decoded, or another store has taken the place of this one
        """
        require_same(self.location, self._stamp)
        array = self._array()
        order = np.argsort(image, kind="stable")
        runs = np.split(order, _cuts(image[order], array)) if len(order) else []

        def read(rows: np.ndarray) -> None:
            first, last = int(image[rows[0]]), int(image[rows[-1]]) + 1
            try:
                found = np.asarray(array[first:last])
                # zarr takes a file that is not there for zeros, as no images are.
                if not all(part.any() for part in _by_file(found, first, array)):
                    require_all_keys(self.location, array)
                out[rows] = found[image[rows] - first]
            except StackError:
                raise
            except Exception as error:  # of zarr, of a codec, or of the library for this kind of URL
                raise StackError(
                    f"Images {first} to {last - 1} of {self.location} cannot be read, copy or export it again: {error}"
                ) from error

        if len(runs) == 1:
            read(runs[0])
        elif runs:
            with ThreadPoolExecutor(min(_THREADS, len(runs))) as threads:
                list(threads.map(read, runs))

    def _array(self) -> zarr.Array[Any]:
        # A fork leaves behind the threads that zarr works with.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _open_images(self.location)
        return self._opened[1]

    def __reduce__(self) -> tuple[type[ZarrImages], tuple[Any, ...]]:
        return ZarrImages, (self.location, self.dtype, self._stamp)


class ZarrRows:
    """The images of a table's rows in a store."""

    def __init__(self, store: ZarrImages, image: np.ndarray) -> None:
        self._store, self._image = store, image

    def places(self, rows: np.ndarray) -> Iterable[None]:
        """Nothing is known before."""
        return nowhere(rows)

    def target(self, out: np.ndarray) -> np.ndarray:
        """The memory as it is."""
        return out

    def reading(self, rows: np.ndarray, target: np.ndarray, places: Tensor | None = None) -> Callable[[], None]:
        """What copies the images of these rows into an array for as many when called: nothing is done before."""
        return partial(self._store.read_into, self._image[rows], target)

    def view(self, rows: np.ndarray) -> None:
        """No image lies in memory as it is."""

    def in_memory(self, rows: np.ndarray) -> bool:
        """Nothing can be asked for."""
        return True

    def ask_ahead(self, rows: np.ndarray) -> bool:
        """Nothing to do: zarr opens and reads what it needs by itself."""
        return False


def _open_images(location: str) -> zarr.Array[Any]:
    """The array of images of a store, decoded by zarrs where that is installed and can do it."""
    import zarr

    group, _ = open_group(location)
    options = {}
    if not rust_works():
        options = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
    elif not is_url(location) and importlib.util.find_spec("zarrs") is not None:
        import zarrs  # noqa: F401 - its first versions are known to zarr only when they are imported

        options = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
    # The configuration is that of all threads, and two that change it at the same time would leave it changed.
    with _CONFIGURING, zarr.config.set(options):
        array: Any = group["images"]
    return cast("zarr.Array[Any]", array)


def _by_file(images: np.ndarray, first: int, array: zarr.Array[Any]) -> list[np.ndarray]:
    """Images from number ``first`` on, apart by the file (or the row of files) that they are in."""
    per_file = int((array.shards or array.chunks)[0])
    return np.split(images, range(per_file - first % per_file, len(images), per_file))


def _cuts(image: np.ndarray, array: zarr.Array[Any]) -> np.ndarray:
    """Where sorted numbers of images are cut into those read in one call: within chunks that follow each other, and not too many."""
    per_chunk = int(array.chunks[0])
    together = max(1, _RUN_BYTES // (per_chunk * int(np.prod(array.shape[1:])) * array.dtype.itemsize))
    chunk = image // per_chunk
    cuts: np.ndarray = 1 + np.flatnonzero((np.diff(chunk) > 1) | (np.diff(chunk // together) > 0))
    return cuts
