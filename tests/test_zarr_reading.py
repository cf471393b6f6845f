"""Stores of every layout: mapped where their pixels lie bare in local files, read through zarr elsewhere, and never half there."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import socket
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from support import numbered_images, run_python, uids
from torch.utils.data import DataLoader
from zarr.codecs import BytesCodec, ShardingCodec, ZstdCodec

import cryolike_data.arena as arena_module
from cryolike_data import Collate, ZarrDataset, stream
from cryolike_data.errors import ArgumentError, CryolikeDataError, MissingDependencyError, StackError
from cryolike_data.shard import index_bytes, index_size, parse_index, read_index
from cryolike_data.stacks import Stacks
from cryolike_data.zarr_images import ZarrImages
from cryolike_data.zarr_store import FORMAT, is_url, open_store

N, BOX, CHUNK, SHARD = 20, 8, 3, 6
IMAGE_BYTES = BOX * BOX * 4
SHARDED = {"chunks": (CHUNK, BOX, BOX), "shards": (SHARD, BOX, BOX)}
ZSTD = {**SHARDED, "compressors": ZstdCodec(level=1)}
ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}

needs_zarrs = pytest.mark.skipif(importlib.util.find_spec("zarrs") is None, reason="zarrs is not installed")
needs_obstore = pytest.mark.skipif(importlib.util.find_spec("obstore") is None, reason="obstore is not installed")


def write_store(store: Any, images: np.ndarray, *, drop: tuple[str, ...] = (), **options: Any) -> Any:
    """A store of these images and of columns ``row``, ``uid`` and ``ctf/defocus_u``, written by zarr alone."""
    n, box = images.shape[:2]
    about = {"format": FORMAT, "box": box, "pixel_size_A": 1.5}
    group = zarr.create_group(str(store) if isinstance(store, Path) else store, attributes={"cryolike_data": about})
    options = {"chunks": (CHUNK, box, box), "compressors": None, "config": {"write_empty_chunks": True}, **options}
    group.create_array("images", shape=images.shape, dtype=images.dtype, **options)[:] = images
    columns = {"row": np.arange(n) + 100, "uid": uids(n), "ctf/defocus_u": np.linspace(1e4, 2e4, n, dtype="f4")}
    for name, column in columns.items():
        if name not in drop:
            group.create_array(name, shape=column.shape, dtype=column.dtype)[:] = column
    return store


@pytest.fixture
def images() -> np.ndarray:
    return numbered_images(N, BOX)


@pytest.fixture
def store(tmp_path: Path, images: np.ndarray) -> Path:
    """Four shards of two chunks of three images; the last has one chunk, and the last image of that is padding."""
    return write_store(tmp_path / "a.zarr", images, **SHARDED)


def shard(store: Path, number: int) -> Path:
    return store / f"images/c/{number}/0/0"


@pytest.fixture
def no_zarr(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from whose call on zarr may not read arrays."""

    def refuse(*_: Any) -> None:
        raise AssertionError("read through zarr")

    return lambda: monkeypatch.setattr(zarr.Array, "__getitem__", refuse)


def check(dataset: ZarrDataset, images: np.ndarray) -> None:
    rows = np.random.default_rng(0).integers(0, len(images), 50)
    np.testing.assert_array_equal(dataset.read(rows).numpy(), images[rows])
    np.testing.assert_array_equal(dataset.read(slice(None)).numpy(), images)


# --- mapped


BARE: dict[str, dict[str, Any]] = {
    "chunks in shards": SHARDED,
    "one chunk in a shard": {"chunks": (SHARD, BOX, BOX), "shards": (SHARD, BOX, BOX)},
    "one shard": {"chunks": (CHUNK, BOX, BOX), "shards": (10 * CHUNK, BOX, BOX)},
    "index at the start": {"chunks": (CHUNK, BOX, BOX), "shards": {"shape": (SHARD, BOX, BOX), "index_location": "start"}},
    "big-endian": {**SHARDED, "serializer": BytesCodec(endian="big")},
    "no shards": {},
    "no shards, big-endian": {"serializer": BytesCodec(endian="big")},
    "no shards, names with dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
}


@pytest.mark.parametrize("layout", BARE)
def test_bare_pixels_are_mapped(tmp_path: Path, images: np.ndarray, layout: str, no_zarr: Any) -> None:
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, **BARE[layout]))
    assert isinstance(dataset.source, Stacks)
    no_zarr()
    check(dataset, images)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "f2", "f4", "f8"])
@pytest.mark.parametrize("layout", ["chunks in shards", "big-endian", "index at the start"])
def test_bare_pixels_of_every_type_are_mapped(tmp_path: Path, dtype: str, layout: str, no_zarr: Any) -> None:
    images = numbered_images(N, BOX, dtype=dtype)
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, **BARE[layout]))
    assert isinstance(dataset.source, Stacks)
    no_zarr()
    check(dataset, images)


@pytest.mark.skipif(sys.platform != "linux", reason="arenas are for Linux")
def test_shards_are_read_through_the_arena(store: Path, images: np.ndarray) -> None:
    dataset = ZarrDataset(store)
    check(dataset, images)
    assert isinstance(dataset.source._arena, arena_module.Arena)
    assert dataset.ask_ahead(np.arange(N)) in (True, False)


@needs_zarrs
def test_a_store_that_zarrs_wrote_is_mapped(tmp_path: Path, no_zarr: Any) -> None:
    import zarrs  # noqa: F401 - its first versions are known to zarr only when they are imported

    # Its threads write the chunks of a shard in any order.
    images = numbered_images(200, BOX)
    with zarr.config.set(ZARRS):
        path = write_store(tmp_path / "a.zarr", images, chunks=(2, BOX, BOX), shards=(100, BOX, BOX))
    dataset = ZarrDataset(path)
    assert isinstance(dataset.source, Stacks)
    no_zarr()
    check(dataset, images)


def rearrange(path: Path, places: list[int], *, step: int, at_start: bool = False) -> None:
    """Rewrite a shard with chunk j of it at byte ``step * places[j]``, after the index if that is at the start."""
    offsets, lengths = read_index(path, len(places))
    raw = path.read_bytes()
    moved = np.array(places) * step + (index_size(len(places)) if at_start else 0)
    pixels = bytearray(int((moved + lengths).max()))
    for old, new, length in zip(offsets.tolist(), moved.tolist(), lengths.tolist(), strict=True):
        pixels[new : new + length] = raw[old : old + length]
    index = index_bytes(moved, lengths)
    path.write_bytes(index + bytes(pixels)[len(index) :] if at_start else bytes(pixels) + index)


def test_chunks_may_lie_in_any_order_and_apart(store: Path, images: np.ndarray, no_zarr: Any) -> None:
    for number, places in enumerate([[4, 0], [1, 9], [3, 0]]):
        rearrange(shard(store, number), places, step=IMAGE_BYTES)
    dataset = ZarrDataset(store)
    assert isinstance(dataset.source, Stacks)
    np.testing.assert_array_equal(zarr.open_group(str(store), mode="r")["images"][:], images)
    no_zarr()
    check(dataset, images)


def test_chunks_that_do_not_lie_at_whole_images_are_read_through_zarr(store: Path, images: np.ndarray) -> None:
    rearrange(shard(store, 1), [0, 10], step=IMAGE_BYTES // 2 - 1)
    dataset = ZarrDataset(store)
    assert isinstance(dataset.source, ZarrImages)
    check(dataset, images)


# --- read through zarr


ENCODED: dict[str, dict[str, Any]] = {
    "compressed shards": ZSTD,
    "compressed chunks": {"compressors": ZstdCodec(level=1)},
    "several filters": {**SHARDED, "compressors": [ZstdCodec(level=1), zarr.codecs.Crc32cCodec()]},
    "transposed": {**SHARDED, "filters": zarr.codecs.TransposeCodec(order=(0, 2, 1))},
    "chunks of part of an image": {"chunks": (CHUNK, BOX // 2, BOX)},
    "shards of part of an image": {"chunks": (CHUNK, BOX // 2, BOX // 2), "shards": (SHARD, BOX // 2, BOX)},
    "an index without checksum": {
        "chunks": (SHARD, BOX, BOX),
        "serializer": ShardingCodec(chunk_shape=(CHUNK, BOX, BOX), index_codecs=[BytesCodec()]),
    },
}


@pytest.mark.parametrize("pipeline", ["zarr", pytest.param("zarrs", marks=needs_zarrs)])
@pytest.mark.parametrize("layout", ENCODED)
def test_other_pixels_are_read_through_zarr(
    tmp_path: Path, images: np.ndarray, layout: str, pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pipeline == "zarr":
        monkeypatch.setattr("cryolike_data.zarr_images.rust_works", lambda: False)
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, **ENCODED[layout]))
    assert isinstance(dataset.source, ZarrImages)
    check(dataset, images)
    assert type(dataset.source._array().async_array.codec_pipeline).__name__.startswith("Zarrs") == (pipeline == "zarrs")
    assert zarr.config.get("codec_pipeline.path") != ZARRS["codec_pipeline.path"]


@pytest.mark.parametrize("dtype", ["i1", "f2", "f8"])
@pytest.mark.parametrize("endian", ["little", "big"])
def test_compressed_pixels_keep_their_type(tmp_path: Path, dtype: str, endian: str) -> None:
    images = numbered_images(N, BOX, dtype=dtype)
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, **ZSTD, serializer=BytesCodec(endian=endian)))
    assert dataset.read([0]).numpy().dtype == images.dtype
    check(dataset, images)


def test_few_chunks_are_read_in_one_call(tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[slice] = []
    read = zarr.Array.__getitem__
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda self, key: calls.append(key) or read(self, key))
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, **ZSTD))
    dataset.read([1, 16, 2, 4, 4])  # of chunks 0, 5, 0, 1 and 1
    assert sorted((key.start, key.stop) for key in calls) == [(1, 5), (16, 17)]
    monkeypatch.setattr("cryolike_data.zarr_images._RUN_BYTES", 2 * CHUNK * IMAGE_BYTES)
    calls.clear()
    dataset.read(np.arange(N))
    assert sorted((key.start, key.stop) for key in calls) == [(0, 6), (6, 12), (12, 18), (18, 20)]


def test_threads_share_a_compressed_store(tmp_path: Path, images: np.ndarray) -> None:
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, **ZSTD))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                check(dataset, images)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert zarr.config.get("codec_pipeline.path") != ZARRS["codec_pipeline.path"]


def test_a_compressed_chunk_that_is_damaged_is_an_error_that_names_the_store(tmp_path: Path, images: np.ndarray) -> None:
    store = write_store(tmp_path / "a.zarr", images, **ZSTD)
    raw = bytearray(shard(store, 1).read_bytes())
    raw[:8] = bytes(8)
    shard(store, 1).write_bytes(raw)
    with pytest.raises(StackError, match=r"Images 6 to 8 of .*a\.zarr cannot be read"):
        ZarrDataset(store).read([8, 6])


# --- at a URL


@pytest.fixture
def url(images: np.ndarray, request: pytest.FixtureRequest) -> str:
    """A store in memory, under a name of its own."""
    name = f"memory://{request.node.name}.zarr"
    return write_store(zarr.storage.FsspecStore.from_url(name), images, **SHARDED) and name


def test_a_store_at_a_url_is_read_through_zarr(url: str, images: np.ndarray) -> None:
    dataset = ZarrDataset(url)
    assert isinstance(dataset.source, ZarrImages)
    check(dataset, images)
    np.testing.assert_array_equal(dataset.particles.uid, uids(N))
    assert url in repr(dataset)


def test_a_missing_shard_at_a_url_is_an_error(url: str) -> None:
    import fsspec

    fsspec.filesystem("memory").rm(url.removeprefix("memory:/") + "/images/c/2/0/0")
    with pytest.raises(StackError, match=r"lacks 1 of its 4 files .*images/c/2/0/0"):
        ZarrDataset(url)


def test_a_missing_store_at_a_url_is_named() -> None:
    with pytest.raises(StackError, match=r"memory://nothing\.zarr is not a Zarr store"):
        ZarrDataset("memory://nothing.zarr")


@pytest.mark.parametrize("url", ["nonsense://a/b.zarr", "nonsense:///b.zarr"])
def test_a_kind_of_url_that_nothing_knows_is_refused(url: str) -> None:
    with pytest.raises(CryolikeDataError, match=r"nonsense:.* cannot be opened.*nonsense"):
        ZarrDataset(url)


def test_a_kind_of_url_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("cryolike_data.zarr_store._obstore", lambda *_, **__: None)
    monkeypatch.setattr(zarr.storage.FsspecStore, "from_url", lacking)
    with pytest.raises(MissingDependencyError, match=r"s3://bucket/a\.zarr cannot be opened: Install s3fs.*Install obstore"):
        ZarrDataset("s3://bucket/a.zarr")


@needs_obstore
def test_object_stores_are_opened_with_obstore() -> None:
    assert isinstance(open_store("s3://bucket/a.zarr", read_only=True), zarr.storage.ObjectStore)
    assert open_store("s3://bucket/a.zarr", read_only=True).read_only
    assert not open_store("s3://bucket/a.zarr", read_only=False).read_only


def test_local_folders_are_no_urls() -> None:
    assert is_url("s3://bucket/a.zarr")
    assert not is_url("a.zarr")
    assert not is_url(Path("/data/a.zarr"))
    with pytest.raises(ArgumentError, match="without file://"):
        is_url("file:///data/a.zarr")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The address of a web server over the folder of the test, which lists nothing."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@needs_obstore
def test_a_store_on_a_web_server_is_read_and_checked_without_a_listing(tmp_path: Path, images: np.ndarray, served: str) -> None:
    store = write_store(tmp_path / "a.zarr", images, compressors=ZstdCodec())
    dataset = ZarrDataset(f"{served}/a.zarr")
    check(dataset, images)
    assert dataset.particles.row.tolist() == list(range(100, 100 + N))
    shard(store, 3).unlink()
    with pytest.raises(StackError, match=r"lacks 1 of its 7 files .*images/c/3/0/0"):
        ZarrDataset(f"{served}/a.zarr")


# --- files that are not whole


def test_every_shard_that_is_not_whole_is_listed(store: Path) -> None:
    raw = bytearray(shard(store, 0).read_bytes())
    raw[-10] ^= 1
    shard(store, 0).write_bytes(raw)
    os.truncate(shard(store, 1), 1000)
    shard(store, 2).unlink()
    os.truncate(shard(store, 3), 7)
    with pytest.raises(StackError, match="4 of 4 files of images cannot be read") as caught:
        ZarrDataset(store)
    lines = str(caught.value).splitlines()
    for number, said in enumerate(["does not match its checksum", "cut short", "is missing", "has 7 of 36 bytes"]):
        assert str(shard(store, number)) in lines[1 + number]
        assert said in lines[1 + number]
        assert "export the store again" in lines[1 + number]


@pytest.mark.parametrize("layout", ["no shards", "index at the start", "compressed shards", "compressed chunks"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_files_that_are_not_whole_are_errors_in_every_layout(tmp_path: Path, images: np.ndarray, layout: str, harm: str) -> None:
    store = write_store(tmp_path / "a.zarr", images, **(BARE | ENCODED)[layout])
    if harm == "cut":
        os.truncate(shard(store, 1), shard(store, 1).stat().st_size - 10)
    else:
        shard(store, 1).unlink()
    with pytest.raises(StackError, match=r"a\.zarr"):
        ZarrDataset(store).read(slice(None))


def test_a_shard_cut_short_behind_its_index_is_noticed_when_the_store_is_opened(tmp_path: Path, images: np.ndarray) -> None:
    store = write_store(tmp_path / "a.zarr", images, **BARE["index at the start"])
    os.truncate(shard(store, 1), shard(store, 1).stat().st_size - 10)
    with pytest.raises(StackError, match=r"c/1/0/0 is cut short: 1 of its 2 chunks"):
        ZarrDataset(store)


def test_chunks_that_were_left_out_of_a_shard_are_an_error_and_not_zeros(tmp_path: Path, images: np.ndarray) -> None:
    images[6:9] = 0
    store = write_store(tmp_path / "a.zarr", images, **SHARDED, config={"write_empty_chunks": False})
    with pytest.raises(StackError, match=r"c/1/0/0 lacks 1 of its 2 chunks.*write_empty_chunks=True"):
        ZarrDataset(store)


def test_a_chunk_of_the_wrong_length_is_an_error(store: Path) -> None:
    path = shard(store, 1)
    offsets, lengths = read_index(path, 2)
    path.write_bytes(path.read_bytes()[: -index_size(2)] + index_bytes(offsets, lengths - 4))
    with pytest.raises(StackError, match=r"a chunk of it has 764 bytes and not 768"):
        ZarrDataset(store)


@pytest.mark.parametrize("offset", [1000, 2**62, 2**63 - 1])
def test_a_chunk_beyond_the_end_of_its_shard_is_an_error(store: Path, offset: int) -> None:
    path = shard(store, 1)
    lengths = read_index(path, 2)[1]
    path.write_bytes(path.read_bytes()[: -index_size(2)] + index_bytes(np.array([0, offset]), lengths))
    with pytest.raises(StackError, match=r"c/1/0/0 is cut short: 1 of its 2 chunks end beyond"):
        ZarrDataset(store)


def test_a_shard_that_shrinks_later_is_an_error(store: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "CHECK_EVERY", -1.0)
    dataset = ZarrDataset(store)
    check(dataset, images)
    os.truncate(shard(store, 2), IMAGE_BYTES)
    with pytest.raises(StackError, match=r"images/c/2/0/0 has shrunk"):
        dataset.read([12])
    np.testing.assert_array_equal(dataset.read([0, 19]).numpy(), images[[0, 19]])


def test_a_store_whose_images_are_of_another_size_than_it_says_is_refused(tmp_path: Path, images: np.ndarray) -> None:
    store = write_store(tmp_path / "a.zarr", images)
    zarr.open_group(str(store)).attrs["cryolike_data"] = {"format": FORMAT, "box": 16, "pixel_size_A": 1.5}
    with pytest.raises(StackError, match="16 x 16"):
        ZarrDataset(store)


# --- the index of a shard


@st.composite
def indexes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths of some chunks, -1 in both where one is absent."""
    number = st.integers(0, 2**63 - 1)
    chunks = draw(st.lists(st.one_of(st.just((-1, -1)), st.tuples(number, number)), max_size=20))
    offsets, lengths = np.array(chunks, np.int64).reshape(-1, 2).T
    return offsets, lengths


@given(indexes())
def test_an_index_reads_back_as_written(index: tuple[np.ndarray, np.ndarray]) -> None:
    found = parse_index(index_bytes(*index), len(index[0]), "shard")
    np.testing.assert_array_equal(found, index)


@given(indexes(), st.integers(0, 2**31), st.integers(1, 255))
def test_an_index_with_a_changed_byte_is_refused(index: tuple[np.ndarray, np.ndarray], place: int, change: int) -> None:
    raw = bytearray(index_bytes(*index))
    raw[place % len(raw)] ^= change
    with pytest.raises(StackError, match="checksum"):
        parse_index(bytes(raw), len(index[0]), "shard")


@pytest.mark.parametrize("pair", [(-1, 5), (5, -1), (-2, 5), (-2, -2)])
def test_an_index_that_makes_no_sense_is_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(StackError, match="shard is damaged"):
        parse_index(index_bytes(*np.array([(0, 8), pair]).T), 2, "shard")


def test_an_index_is_the_one_that_zarr_writes(store: Path) -> None:
    for number, (offsets, lengths) in enumerate([([0, 768], [768, 768])] * 3 + [([0, -1], [768, -1])]):
        raw = shard(store, number).read_bytes()[-index_size(2) :]
        assert index_bytes(np.array(offsets), np.array(lengths)) == raw
        np.testing.assert_array_equal(parse_index(raw, 2, "shard"), [offsets, lengths])


# --- columns


def test_opening_and_reading_images_reads_no_columns(store: Path, images: np.ndarray, no_zarr: Any) -> None:
    no_zarr()
    dataset = ZarrDataset(store)
    assert len(dataset) == N
    assert (dataset.box, dataset.pixel_size) == (BOX, 1.5)
    np.testing.assert_array_equal(dataset.select([4, 2])[[1]].images.numpy(), images[[2]])


def test_columns_are_those_of_the_store(store: Path) -> None:
    particles = ZarrDataset(store).particles[[3, 1]]
    assert particles.row.tolist() == [103, 101]
    np.testing.assert_array_equal(particles.uid, uids(N)[[3, 1]])
    np.testing.assert_array_equal(particles.ctf.defocus_u, np.linspace(1e4, 2e4, N, dtype="f4")[[3, 1]])
    assert particles.pose is particles.shift_A is particles.half_set is particles.sign is None


def test_a_store_without_uids_is_not_whole(tmp_path: Path, images: np.ndarray) -> None:
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, drop=("uid",)))
    with pytest.raises(StackError, match=r"a\.zarr lacks uid"):
        _ = dataset.particles.ctf


def test_a_column_of_another_length_is_an_error(store: Path) -> None:
    zarr.open_group(str(store)).create_array("pose", shape=(N - 1, 3), dtype="f4")
    with pytest.raises(StackError, match=r"a\.zarr lacks pose of its 20 particles"):
        _ = ZarrDataset(store).particles.uid


@pytest.mark.parametrize(("more", "later_ns"), [("", 1), (" ", 0)], ids=["time", "size"])
def test_columns_of_a_store_that_took_the_place_of_the_one_opened_are_refused(store: Path, more: str, later_ns: int) -> None:
    dataset, seal = ZarrDataset(store), store / "zarr.json"
    before = seal.stat().st_mtime_ns
    seal.write_text(seal.read_text() + more)
    os.utime(seal, ns=(before + later_ns,) * 2)
    with pytest.raises(StackError, match=r"a\.zarr has changed since it was opened"):
        _ = dataset.particles.uid


# --- streams, workers and pickles


@pytest.mark.parametrize("options", [SHARDED, ZSTD], ids=["bare", "compressed"])
def test_a_store_streams(tmp_path: Path, images: np.ndarray, options: dict[str, Any]) -> None:
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, **options))
    batches = [(batch.index.numpy(), batch.images.numpy().copy()) for batch in stream(dataset, batch_size=7, shuffle=True, seed=1)]
    rows = np.concatenate([rows for rows, _ in batches])
    assert sorted(rows.tolist()) == list(range(N))
    np.testing.assert_array_equal(np.concatenate([read for _, read in batches]), images[rows])


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("options", [SHARDED, ZSTD], ids=["bare", "compressed"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_worker_processes_read_the_same(tmp_path: Path, images: np.ndarray, options: dict[str, Any], method: str) -> None:
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, **options))
    check(dataset, images)  # so that threads of zarr, and of zarrs where that is installed, are there to be lost in a fork
    loader = DataLoader(dataset, batch_size=8, num_workers=1, collate_fn=Collate(), multiprocessing_context=method, timeout=60)
    batches = list(loader)
    np.testing.assert_array_equal(torch.cat([batch.images for batch in batches]).numpy(), images)
    np.testing.assert_array_equal(torch.cat([batch.uid for batch in batches]).numpy().view("u8"), uids(N))


@pytest.mark.parametrize("options", [{"chunks": (100, 4, 4), "shards": (500, 4, 4)}, {"compressors": ZstdCodec()}], ids=["bare", "zstd"])
def test_pickles_are_small_and_read_for_themselves(tmp_path: Path, options: dict[str, Any]) -> None:
    images = numbered_images(3000, 4)
    dataset = ZarrDataset(write_store(tmp_path / "a.zarr", images, **{"chunks": (100, 4, 4)} | options))
    check(dataset, images)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 25 * 3000
    check(pickle.loads(pickled), images)
    assert pickle.loads(pickled).particles.row.tolist() == list(range(100, 3100))


FORKED = """
    import os, sys
    from cryolike_data.zarr_store import open_store
    open_store("s3://bucket/a.zarr", read_only=True)
    if os.fork() == 0:
        try:
            open_store("s3://bucket/a.zarr", read_only=True)
        except ImportError as error:
            print(error, flush=True)
        else:
            print("spawn: fsspec", flush=True)
        os._exit(0)
    os.wait()
"""


@needs_obstore
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_wait_for_threads_of_obstore_that_are_gone() -> None:
    run = run_python(FORKED)
    assert run.returncode == 0, run.stderr
    assert "spawn" in run.stdout


@needs_obstore
def test_a_url_at_which_nobody_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # which is free again
    with pytest.raises(StackError, match=rf"^http://127\.0\.0\.1:{port}/a\.zarr cannot be read: "):
        ZarrDataset(f"http://127.0.0.1:{port}/a.zarr")


# --- what happens to a store while it is open


@pytest.mark.parametrize("rows", [[0, 7, 19], [7], [4, 7], slice(None)], ids=["some", "one", "across a border", "all"])
def test_a_compressed_shard_that_goes_missing_is_an_error_and_not_zeros(tmp_path: Path, images: np.ndarray, rows: Any) -> None:
    store = write_store(tmp_path / "a.zarr", images, **ZSTD)
    dataset = ZarrDataset(store)
    np.testing.assert_array_equal(dataset.read(rows).numpy(), images[rows])
    shard(store, 1).unlink()
    with pytest.raises(StackError, match=r"lacks 1 of its 4 files of images \(first: images/c/1/0/0\)"):
        dataset.read(rows)
    np.testing.assert_array_equal(dataset.read([0, 19]).numpy(), images[[0, 19]])


def test_a_shard_that_goes_missing_at_a_url_is_an_error_and_not_zeros(url: str, images: np.ndarray) -> None:
    import fsspec

    dataset = ZarrDataset(url)
    check(dataset, images)
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/") + "/images/c/2/0/0")
    with pytest.raises(StackError, match=r"lacks 1 of its 4 files .*images/c/2/0/0"):
        dataset.read(slice(None))


def test_images_of_zeros_alone_are_read(tmp_path: Path, images: np.ndarray) -> None:
    images[SHARD : 2 * SHARD] = 0
    check(ZarrDataset(write_store(tmp_path / "a.zarr", images, **ZSTD)), images)


@pytest.mark.parametrize("options", [SHARDED, ZSTD], ids=["bare", "compressed"])
def test_images_of_a_store_that_took_the_place_of_the_one_opened_are_refused(
    tmp_path: Path, images: np.ndarray, options: dict[str, Any]
) -> None:
    store = write_store(tmp_path / "a.zarr", images, **options)
    dataset = ZarrDataset(store)
    np.testing.assert_array_equal(dataset.read([0]).numpy(), images[[0]])
    shutil.rmtree(store)
    write_store(store, images[::-1], **options)
    os.utime(store / "zarr.json", ns=(0, 0))
    with pytest.raises(StackError, match=r"a\.zarr has changed since it was opened"):
        dataset.read([7])
