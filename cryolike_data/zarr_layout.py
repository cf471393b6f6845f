"""How the images of a store lie in its files: those that need no decoding are stacks, and no file may be missing or cut short."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import StackError
from .mrc import Check, StackHeader
from .read_each import read_each
from .shard import REMEDY, read_index, single_chunk
from .stacks import Stacks

if TYPE_CHECKING:
    import zarr
    from zarr.abc.codec import Codec
    from zarr.abc.store import Store

#: Files of a web server that are asked for at the same time.
_CONCURRENT = 32


@dataclass(frozen=True)
class Layout:
    """How images are spread over chunks, and chunks over files.

    Attributes
    ----------
    images : of the array
    box : their side, pixels
    chunk : images in a chunk
    per_file : chunks in a file
    index : "start" or "end", where a file has the index of its chunks; None where a file is a chunk
    dtype : of a pixel in the file, byte order included; None where chunks are encoded otherwise (compressed)
    """

    images: int
    box: int
    chunk: int
    per_file: int
    index: str | None
    dtype: np.dtype[Any] | None


def layout_of(array: zarr.Array[Any]) -> Layout | None:
    """The layout of an array of images, or None if only zarr can find its way in it."""
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    n, ny, nx = array.shape
    if array.metadata.zarr_format != 3 or ny != nx or array.chunks[1:] != (ny, nx):
        return None
    codecs, shard, index = array.metadata.codecs, array.chunks, None
    if array.shards is not None and isinstance(codecs[0], ShardingCodec):
        sharding, shard = codecs[0], array.shards
        order, *checksum = sharding.index_codecs
        known = isinstance(order, BytesCodec) and _word(order.endian) == "little" and [type(codec) for codec in checksum] == [Crc32cCodec]
        if len(codecs) > 1 or not known or shard[1:] != (ny, nx):
            return None
        codecs, index = sharding.codecs, _word(sharding.index_location)
    return Layout(n, ny, array.chunks[0], shard[0] // array.chunks[0], index, _plain(codecs, np.dtype(array.dtype)))


def open_files(
    location: str, array: zarr.Array[Any], layout: Layout, pixel_size: float, check: Check
) -> tuple[Stacks, np.ndarray, np.ndarray] | None:
    """Make sure of all files of an array in a local store, and see them as stacks; ``check`` is called before one is mapped.

    Returns
    -------
    The stacks, and the file (int32) and the place in it (int64) of each image; None if pixels are encoded, or lie so that they
    cannot be addressed as images

    Raises
    ------
    StackError
        listing every file that is missing, damaged or cut short
    """
    n_chunks = -(-layout.images // layout.chunk)
    n_files = -(-n_chunks // layout.per_file)
    paths = [os.path.join(location, array.path, array.metadata.encode_chunk_key((k, 0, 0))) for k in range(n_files)]
    needed = np.minimum(layout.per_file, n_chunks - layout.per_file * np.arange(n_files))
    offsets = read_each(list(zip(paths, needed.tolist(), strict=True)), partial(_chunk_offsets, layout), "files of images")
    if layout.dtype is None:
        return None
    image_bytes = layout.box**2 * layout.dtype.itemsize
    starts = [int(in_file.min()) for in_file in offsets]
    places = [in_file - start for in_file, start in zip(offsets, starts, strict=True)]
    if any((in_file % image_bytes).any() for in_file in places):
        return None
    # Few headers for many files, which nearly all look alike.
    shapes = [(start, int(in_file.max()) // image_bytes + layout.chunk) for start, in_file in zip(starts, places, strict=True)]
    headers = {
        (start, count): StackHeader(layout.box, layout.box, count, layout.dtype, start, count, pixel_size) for start, count in set(shapes)
    }
    file = np.repeat(np.arange(n_files, dtype=np.int32), layout.per_file * layout.chunk)[: layout.images]
    first = np.concatenate(places) // image_bytes
    image = (first[:, None] + np.arange(layout.chunk)).reshape(-1)[: layout.images]
    return Stacks(paths, [headers[shape] for shape in shapes], check=check), file, image


def require_all_keys(location: str, array: zarr.Array[Any]) -> None:
    """Raise a ``StackError`` if a file of an array is missing, wherever the store lies: zarr takes such a file for one of zeros."""
    from zarr.core.sync import sync

    grid = [range(-(-length // size)) for length, size in zip(array.shape, array.shards or array.chunks, strict=True)]
    names = [array.metadata.encode_chunk_key(at) for at in product(*grid)]
    missing = sync(_missing(array.store_path.store, array.store_path.path, names))
    if missing:
        raise StackError(
            f"{location} lacks {len(missing)} of its {len(names)} files of {array.path} (first: {array.path}/{missing[0]}). {REMEDY}"
        )


def _word(value: Any) -> str:
    """The text of a word that zarr gives as an enum or as it is."""
    return str(getattr(value, "value", value))


def _plain(codecs: Sequence[Codec], dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype of pixels as these codecs write them, or None if they do more than that."""
    from zarr.codecs import BytesCodec

    codec, *more = codecs
    if more or not isinstance(codec, BytesCodec):
        return None
    return dtype.newbyteorder(">" if _word(codec.endian) == "big" else "<")


def _chunk_offsets(layout: Layout, file: tuple[str, int]) -> np.ndarray:
    """Where the first so many chunks of a file start, all of which have to be there."""
    path, needed = file
    found = single_chunk(path) if layout.index is None else read_index(path, layout.per_file, at_start=layout.index == "start")
    offsets, lengths = (values[:needed] for values in found)
    absent = int((offsets < 0).sum())
    if absent:
        raise StackError(
            f"{path} lacks {absent} of its {needed} chunks: its writer was stopped, or left out those of zeros alone. Export the store "
            "again, or write it with write_empty_chunks=True."
        )
    if layout.dtype is not None:
        due = layout.chunk * layout.box**2 * layout.dtype.itemsize
        wrong = lengths[lengths != due]
        if len(wrong):
            raise StackError(f"{path} is cut short or damaged: a chunk of it has {wrong[0]} bytes and not {due}. {REMEDY}")
    return offsets


async def _missing(store: Store, folder: str, names: Sequence[str]) -> list[str]:
    keys = [f"{folder}/{name}".lstrip("/") for name in names]
    try:
        present = {key async for key in store.list_prefix(f"{folder}/".lstrip("/"))}
    except Exception:  # a web server, for example, lists nothing
        limit = asyncio.Semaphore(_CONCURRENT)

        async def exists(key: str) -> bool:
            async with limit:
                return await store.exists(key)

        there = await asyncio.gather(*map(exists, keys))
        present = {key for key, found in zip(keys, there, strict=True) if found}
    return [name for name, key in zip(names, keys, strict=True) if key not in present]
