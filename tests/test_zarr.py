"""Zarr stores: what is in them for any reader of Zarr, ``ZarrDataset`` over them, and that a store is whole or not there."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import xarray
import zarr
from support import contents, ctf_columns, numbered_images, stored_images, uids, write_stack, write_table
from torch.utils.data import DataLoader

from cryolike_data import Collate, Downsample, IndexedDataset, ParticleDataset, ZarrDataset, __version__, export_zarr
from cryolike_data.demo import DemoProject
from cryolike_data.errors import ArgumentError, CryolikeDataError, ExportError, ExportExistsError, MissingStackError, StackError
from cryolike_data.export import finish, plan_export, run
from cryolike_data.export.mrc import plan_mrc
from cryolike_data.export.pixels import Pixels
from cryolike_data.export.place import LocalPlace
from cryolike_data.export.state import write_plan
from cryolike_data.export.zarr import ZarrFormat

N, BOX = 60, 32
IMAGE_BYTES = BOX * BOX * 4


@pytest.fixture
def particles(demo: DemoProject) -> ParticleDataset:
    return IndexedDataset(demo.indexed)


@pytest.fixture(scope="module")
def table(demo: DemoProject) -> np.ndarray:
    return np.load(demo.indexed, allow_pickle=False)


@pytest.fixture(scope="module")
def store(demo: DemoProject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all particles in nine shards of seven images, the last of them partial; tests read it only."""
    place = tmp_path_factory.mktemp("zarr") / "particles.zarr"
    return export_zarr(IndexedDataset(demo.indexed), place, shard_bytes=7 * IMAGE_BYTES)


def write_particles(folder: Path, images: np.ndarray, **columns: Any) -> IndexedDataset:
    """A data set of one stack and a table of its images in order."""
    n = len(images)
    write_stack(folder / "stack.mrc", images)
    blob = {"blob__path": ["stack.mrc"] * n, "blob__idx": np.arange(n, dtype="u4"), "blob__psize_A": np.full(n, 2, "f4")}
    return IndexedDataset(write_table(folder / "particles.cs", **blob, **columns))


def images_of(store: Path) -> zarr.Array[Any]:
    return zarr.open_group(str(store), mode="r")["images"]


def shards_of(store: Path) -> list[Path]:
    return sorted(path for path in (store / "images" / "c").rglob("*") if path.is_file())


def same_optics(a: Any, b: Any) -> bool:
    return dict(a.items()).keys() == dict(b.items()).keys() and all(torch.equal(value, getattr(b, name)) for name, value in a.items())


# --- what is in a store


def test_images_are_those_of_the_stacks_byte_for_byte(store, demo, table):
    found = images_of(store)[:]
    expected = stored_images(demo.folder, table)
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


COLUMNS = {
    "uid": ("uid", "<u8"),
    "sign": ("blob/sign", "<f4"),
    "pose": ("alignments3D/pose", "<f4"),
    "half_set": ("alignments3D/split", "<i8"),
    "ctf/voltage_kv": ("ctf/accel_kv", "<f4"),
    "ctf/spherical_aberration_mm": ("ctf/cs_mm", "<f4"),
    "ctf/amplitude_contrast": ("ctf/amp_contrast", "<f4"),
    "ctf/defocus_u": ("ctf/df1_A", "<f4"),
    "ctf/defocus_v": ("ctf/df2_A", "<f4"),
    "ctf/astigmatism_angle_rad": ("ctf/df_angle_rad", "<f4"),
    "ctf/phase_shift_rad": ("ctf/phase_shift_rad", "<f4"),
    "ctf/exposure_group": ("ctf/exp_group_id", "<i8"),
    "ctf/tilt_A": ("ctf/tilt_A", "<f4"),
    "ctf/anisomag": ("ctf/anisomag", "<f4"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_are_those_of_the_table(store, table, name):
    field, dtype = COLUMNS[name]
    found = zarr.open_group(str(store), mode="r")[name]
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found[:], table[field])


def test_shifts_are_in_angstrom(store, table):
    found = zarr.open_group(str(store), mode="r")["shift_A"]
    assert dict(found.attrs)["units"] == "angstrom"
    np.testing.assert_allclose(found[:], table["alignments3D/shift"] * table["alignments3D/psize_A"][:, None], rtol=1e-6)


def test_row_is_the_row_of_the_table_after_a_selection(particles, table, tmp_path):
    rows = [40, 3, 59]
    group = zarr.open_group(str(export_zarr(particles.select(rows), tmp_path / "some.zarr")), mode="r")
    assert group["row"][:].tolist() == rows
    np.testing.assert_array_equal(group["uid"][:], table["uid"][rows])
    assert group["images"].shape[0] == 3


def test_the_source_says_where_each_image_came_from(store, table):
    source = zarr.open_group(str(store), mode="r")["source"]
    names = np.array(source.attrs["blob_paths"], "S")
    np.testing.assert_array_equal(names[source["file"][:]], table["blob/path"])
    np.testing.assert_array_equal(source["image"][:], table["blob/idx"])


@pytest.mark.parametrize(
    ("name", "units"),
    [("ctf/defocus_u", "angstrom"), ("ctf/voltage_kv", "kilovolt"), ("ctf/spherical_aberration_mm", "millimeter"), ("pose", "radian")],
)
def test_columns_tell_their_units(store, name, units):
    assert dict(zarr.open_group(str(store), mode="r")[name].attrs)["units"] == units


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("images", ("particle", "y", "x")),
        ("uid", ("particle",)),
        ("shift_A", ("particle", "xy")),
        ("pose", ("particle", "rotation_vector")),
    ],
)
def test_axes_have_names(store, name, names):
    assert zarr.open_group(str(store), mode="r")[name].metadata.dimension_names == names


@pytest.mark.parametrize("name", ["images", "uid", "ctf/defocus_u"])
def test_nothing_is_compressed(store, name):
    array = zarr.open_group(str(store), mode="r")[name]
    assert array.compressors == ()
    assert array.filters == ()
    assert array.metadata.zarr_format == 3


def test_the_pixel_size_is_told_with_the_images(store):
    group = zarr.open_group(str(store), mode="r")
    assert group["images"].attrs["pixel_size_A"] == 2.0
    assert group.attrs["cryolike_data"]["pixel_size_A"] == 2.0
    assert group.attrs["cryolike_data"]["box"] == BOX


# --- shards


@pytest.mark.parametrize(
    ("shard_bytes", "chunk", "shard", "files"),
    [
        (1, 1, 1, 60),
        (7 * IMAGE_BYTES, 7, 7, 9),
        (8 * IMAGE_BYTES - 1, 7, 7, 9),
        (60 * IMAGE_BYTES, 60, 60, 1),
        (256 << 20, 60, 60, 1),
    ],
)
def test_small_shards_hold_as_many_images_as_fit(particles, tmp_path, shard_bytes, chunk, shard, files):
    store = export_zarr(particles, tmp_path / "a.zarr", shard_bytes=shard_bytes)
    images = images_of(store)
    assert (images.chunks, images.shards) == ((chunk, BOX, BOX), (shard, BOX, BOX))
    assert len(shards_of(store)) == files


@pytest.mark.parametrize(
    ("n", "box", "shard_bytes", "chunk", "shard"),
    [
        (70, 128, 5_000_000, 24, 72),  # 64 KiB, of which 32 fit into 2 MiB: 3 chunks, evened out, and all of them into a shard
        (70, 128, 4_000_000, 24, 48),  # two of these
        (50, 256, None, 17, 51),  # 256 KiB: 24 images, so that there are not too many chunks
        (20, 256, 5_000_000, 10, 10),  # no chunk is larger than a shard may be
    ],
)
def test_large_shards_hold_whole_chunks_of_about_two_megabytes_or_two_dozen_images(tmp_path, n, box, shard_bytes, chunk, shard):
    dataset = write_particles(tmp_path, numbered_images(n, box))
    images = images_of(export_zarr(dataset, tmp_path / "a.zarr", **({} if shard_bytes is None else {"shard_bytes": shard_bytes})))
    assert (images.chunks[0], images.shards[0]) == (chunk, shard)
    np.testing.assert_array_equal(images[:], numbered_images(n, box))


def test_a_shard_is_little_larger_than_its_images(store):
    sizes = [path.stat().st_size for path in shards_of(store)]
    assert all(7 * IMAGE_BYTES <= size < 7 * IMAGE_BYTES + 100 for size in sizes)


def test_a_source_of_zeros_still_has_all_its_shards(tmp_path):
    store = export_zarr(write_particles(tmp_path, np.zeros((6, 8, 8), "f4")), tmp_path / "a.zarr", shard_bytes=2 * 8 * 8 * 4)
    assert len(shards_of(store)) == 3


def test_images_read_in_several_steps_fill_a_shard_in_order(particles, demo, table, tmp_path, monkeypatch):
    monkeypatch.setattr("cryolike_data.export.pixels._PIECE_BYTES", 3 * IMAGE_BYTES)
    store = export_zarr(particles, tmp_path / "a.zarr", shard_bytes=8 * IMAGE_BYTES, downsample=Downsample(2, method="max"))
    expected = stored_images(demo.folder, table).reshape(N, 16, 2, 16, 2).max(axis=(2, 4))
    np.testing.assert_array_equal(images_of(store)[:], expected)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("piece_bytes", [1, 3 * 8 * 8 * 4])
def test_images_that_are_read_into_the_same_memory_stay_apart(tmp_path, monkeypatch, compression, piece_bytes):
    monkeypatch.setattr("cryolike_data.export.pixels._PIECE_BYTES", piece_bytes)
    images = numbered_images(20, 8)
    write_particles(tmp_path, images)
    write_stack(tmp_path / "stack.mrc", images, order=">")  # images that have to be copied
    store = export_zarr(IndexedDataset(tmp_path / "particles.cs"), tmp_path / "a.zarr", compression=compression)
    np.testing.assert_array_equal(images_of(store)[:], images)


@pytest.mark.parametrize("shard_bytes", [0, -1])
def test_a_shard_size_that_makes_no_sense_is_refused(particles, tmp_path, shard_bytes):
    with pytest.raises(ArgumentError, match="shard_bytes"):
        export_zarr(particles, tmp_path / "a.zarr", shard_bytes=shard_bytes)
    assert list(tmp_path.iterdir()) == []


# --- pixels that change


@pytest.mark.parametrize(("dtype", "order"), [("i1", "<"), ("i2", ">"), ("u2", "<"), ("f2", "<"), ("f4", ">")])
def test_pixels_keep_the_type_of_the_file_in_native_order(tmp_path, dtype, order):
    images = numbered_images(5, 8, dtype=dtype)
    dataset = write_particles(tmp_path, images)
    write_stack(tmp_path / "stack.mrc", images, order=order)
    dataset = IndexedDataset(tmp_path / "particles.cs")
    found = images_of(export_zarr(dataset, tmp_path / "a.zarr"))
    assert found.dtype == images.dtype
    np.testing.assert_array_equal(found[:], images)


@pytest.mark.parametrize(("dtype", "expected"), [("float16", "f2"), ("float32", "f4"), ("float64", "f8"), (torch.float16, "f2")])
def test_pixels_are_written_as_asked(particles, demo, table, tmp_path, dtype, expected):
    found = images_of(export_zarr(particles, tmp_path / "a.zarr", dtype=dtype))
    assert found.dtype == np.dtype(expected)
    np.testing.assert_array_equal(found[:], stored_images(demo.folder, table).astype(expected))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "double", np.float32, ""])
def test_a_pixel_type_that_is_not_known_is_refused(particles, tmp_path, dtype):
    with pytest.raises(ArgumentError, match="float16, float32, float64"):
        export_zarr(particles, tmp_path / "a.zarr", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_pixels_too_large_for_float16_are_not_written_as_infinity(tmp_path):
    images = numbered_images(5, 8)
    images[3, 2, 2] = 1e5
    dataset = write_particles(tmp_path, images)
    with pytest.raises(ExportError, match="float16"):
        export_zarr(dataset, tmp_path / "a.zarr", dtype="float16")
    with pytest.raises(StackError, match="not finished"):
        ZarrDataset(tmp_path / "a.zarr")
    assert [path for path in contents(tmp_path / "a.zarr") if not path.startswith(".export/")] == []


@pytest.mark.parametrize(
    ("dtype", "pixel", "downsample"),
    [
        ("float16", 7e4, None),
        ("float16", 1e39, None),
        ("float32", 1e39, None),
        ("float32", 1e41, Downsample(2)),
        ("float16", 1e39, Downsample(2, method="max")),
    ],
)
@pytest.mark.parametrize("infinite", [False, True])
def test_pixels_of_float64_that_do_not_fit_are_not_written_as_infinity(tmp_path, dtype, pixel, downsample, infinite):
    source = export_zarr(write_particles(tmp_path, numbered_images(5, 8)), tmp_path / "source.zarr", dtype="float64")
    images = np.memmap(shards_of(source)[0], "f8", "r+", 0, (5, 8, 8))
    images[3, 2, 2] = pixel
    if infinite:
        images[1, 0, 0], images[2, 0, 0] = np.inf, np.nan
    images.flush()
    with pytest.raises(ExportError, match=r"larger than float(16|32) can hold .*; normalize them, or export (float32|a float64 store)\."):
        export_zarr(ZarrDataset(source), tmp_path / "a.zarr", dtype=dtype, downsample=downsample)
    assert [path for path in contents(tmp_path / "a.zarr") if not path.startswith(".export/")] == []


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65500), ("float32", 3.4e38), ("float64", 1.79e308)])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_pixels_that_are_rounded_do_not_become_infinity(tmp_path, dtype, largest, compression):
    images = numbered_images(5, 8)
    images[3, 2, 2] = np.inf
    dataset = write_particles(tmp_path / "one", images)
    with pytest.warns(UserWarning, match="1 of 5 images have pixels that are NaN or infinite"):
        kept = export_zarr(dataset, tmp_path / "a.zarr", dtype=dtype, keep_bits=6, compression=compression)
    assert np.argwhere(~np.isfinite(images_of(kept)[:])).tolist() == [[3, 2, 2]]
    if dtype == "float64":  # which no stack holds
        return
    images[4, 0, 0] = -largest
    dataset = write_particles(tmp_path / "other", images)
    with pytest.raises(ExportError, match=f"larger than {dtype} can hold rounded to 6 bits"):
        export_zarr(dataset, tmp_path / "b.zarr", dtype=dtype, keep_bits=6, compression=compression)
    with pytest.raises(StackError, match="not finished"):
        ZarrDataset(tmp_path / "b.zarr")


@pytest.mark.parametrize("dtype", ["f2", "f4"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_pixels_that_are_nan_stay_so_when_others_are_rounded(tmp_path, dtype, compression):
    images = numbered_images(5, 8, dtype=dtype)
    bits = images.view(f"u{images.itemsize}")
    quiet = np.array(np.nan, dtype).view(bits.dtype)
    sign, ones = 1 << (8 * images.itemsize - 1), 2 ** (8 * images.itemsize) - 1
    bits[3, 0, :4] = [quiet, ones, ones ^ sign, np.array(np.inf, dtype).view(bits.dtype) + 1]
    images[4, 0, 0] = np.inf
    dataset = write_particles(tmp_path, images)
    with pytest.warns(UserWarning, match="2 of 5 images have pixels that are NaN or infinite"):
        found = images_of(export_zarr(dataset, tmp_path / "a.zarr", keep_bits=6, compression=compression))[:]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(images))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(images))


def test_downsampled_images_are_means_and_the_pixel_size_follows(particles, demo, table, tmp_path):
    store = export_zarr(particles, tmp_path / "a.zarr", downsample=Downsample(factor=4, method="mean"))
    expected = stored_images(demo.folder, table).reshape(N, 8, 4, 8, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(images_of(store)[:], expected, atol=1e-6)
    assert ZarrDataset(store).pixel_size == 8.0
    assert ZarrDataset(store).box == 8


@pytest.mark.parametrize("downsample", [None, Downsample(box=360)], ids=str)
def test_the_pixel_size_of_images_that_keep_their_size_stays_to_the_last_digit(tmp_path, downsample):
    assert 0.83 * 360 / 360 != 0.83
    write_stack(tmp_path / "stack.mrc", numbered_images(1, 360))
    blob = {"blob__path": ["stack.mrc"], "blob__idx": np.zeros(1, "u4"), "blob__psize_A": np.full(1, 0.83, "f4")}
    dataset = IndexedDataset(write_table(tmp_path / "particles.cs", **blob, **ctf_columns(1)))
    assert ZarrDataset(export_zarr(dataset, tmp_path / "a.zarr", downsample=downsample)).pixel_size == 0.83
    assert Collate(downsample=downsample)(dataset[[0]]).pixel_size == 0.83


def test_downsampling_of_integers_gives_float32(tmp_path):
    images = numbered_images(5, 8, dtype="i1")
    store = export_zarr(write_particles(tmp_path, images), tmp_path / "a.zarr", downsample=Downsample(2, method="mean"))
    found = images_of(store)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:], images.reshape(5, 4, 2, 4, 2).astype(float).mean(axis=(2, 4)), atol=1e-5)


def test_the_attributes_tell_how_the_images_were_made(particles, tmp_path):
    store = export_zarr(particles, tmp_path / "a.zarr", downsample=Downsample(box=20))
    told = zarr.open_group(str(store), mode="r").attrs["cryolike_data"]
    assert told["downsample"] == {"factor": None, "box": 20, "method": "fourier"}
    assert told["version"] == __version__
    assert told["source"] == {"kind": "IndexedDataset", "box": BOX, "pixel_size_A": 2.0}


@pytest.mark.shared
def test_real_particles_at_box_128_have_a_pixel_size_of_3_275(shared, tmp_path):
    dataset = IndexedDataset(shared / "real/empiar_10076/empiar_10076_7.cs")
    store = export_zarr(dataset, tmp_path / "a.zarr", downsample=Downsample(box=128))
    assert images_of(store).shape == (7, 128, 128)
    assert ZarrDataset(store).pixel_size == pytest.approx(3.275, rel=1e-5)


# --- other readers


def test_xarray_opens_images_and_columns(store, demo, table):
    with xarray.open_zarr(store, consolidated=False) as opened:
        assert dict(opened.sizes) == {"particle": N, "y": BOX, "x": BOX, "rotation_vector": 3, "xy": 2}
        np.testing.assert_array_equal(opened["images"][5:9].values, stored_images(demo.folder, table[5:9]))
        np.testing.assert_array_equal(opened["uid"].values, table["uid"])


def test_xarray_opens_the_optics(store, table):
    with xarray.open_zarr(store, group="ctf", consolidated=False) as opened:
        np.testing.assert_array_equal(opened["defocus_u"].values, table["ctf/df1_A"])
        assert opened["defocus_u"].attrs["units"] == "angstrom"


def test_xarray_splits_images_at_whole_chunks(store):
    with xarray.open_zarr(store, consolidated=False) as opened:
        assert opened["images"].chunks[0] == (7,) * 8 + (4,)


# --- ZarrDataset


@pytest.mark.parametrize("rows", [[0], [5, 5, -1, 0], [59, 0, 30, 31, 7, 6], slice(3, 50, 9), np.arange(N) % 7 == 2, []], ids=str)
def test_batches_are_those_of_the_source(store, particles, rows):
    ours, theirs = ZarrDataset(store).batch(rows), particles.batch(rows)
    for name in ("images", "index", "uid", "pose", "shift_A"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert same_optics(ours.ctf, theirs.ctf)
    assert ours.pixel_size == theirs.pixel_size


def test_the_particles_are_those_of_the_source(store, particles):
    ours, theirs = ZarrDataset(store).particles, particles.particles
    for name in ("row", "uid", "box", "pixel_size", "half_set", "sign"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_selections_work_as_on_the_source(store, particles):
    chosen = ZarrDataset(store, select=lambda p: p.ctf.exposure_group == 3)
    expected = particles.select(particles.particles.ctf.exposure_group == 3)
    assert torch.equal(chosen.read(slice(None)), expected.read(slice(None)))
    assert torch.equal(chosen.select([4, 1]).read([1, 0]), expected.read([1, 4]))


def test_a_table_without_optics_poses_or_uids_makes_a_store_too(tmp_path):
    dataset = ZarrDataset(export_zarr(write_particles(tmp_path, numbered_images(5, 8)), tmp_path / "a.zarr"))
    batch = dataset.batch([4])
    assert (batch.ctf, batch.pose, batch.shift_A) == (None, None, None)
    assert batch.uid.tolist() == [0]
    assert sorted(path.name for path in (tmp_path / "a.zarr").iterdir()) == ["images", "row", "source", "uid", "zarr.json"]


def test_a_store_of_a_store_is_the_same(store, tmp_path):
    again = export_zarr(ZarrDataset(store), tmp_path / "again.zarr", shard_bytes=10 * IMAGE_BYTES)
    first, second = (zarr.open_group(str(path), mode="r") for path in (store, again))
    for name in ("images", "row", "uid", "pose", "ctf/defocus_u"):
        np.testing.assert_array_equal(first[name][:], second[name][:])


def test_a_store_may_be_moved(store, particles, tmp_path):
    shutil.copytree(store, tmp_path / "moved")
    assert torch.equal(ZarrDataset(tmp_path / "moved").read([8]), particles.read([8]))


def test_a_relative_path_survives_a_change_of_the_working_directory(store, particles, monkeypatch):
    monkeypatch.chdir(store.parent)
    dataset = ZarrDataset(store.name)
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).read([8]), particles.read([8]))


def test_a_data_set_pickles_without_images(store):
    pickled = pickle.dumps(ZarrDataset(store))
    assert len(pickled) < 250 * N
    assert len(pickle.loads(pickled)) == N


def test_a_plain_loader_gives_every_particle_once(store, particles):
    loader = DataLoader(ZarrDataset(store), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))
    uid = torch.cat([batch.uid for batch in loader])
    assert sorted(uid.tolist()) == sorted(particles.batch(slice(None)).uid.tolist())


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_worker_processes_read_the_same_batches(store, particles, method):
    dataset = ZarrDataset(store)
    dataset.read([0])
    loader = DataLoader(dataset, batch_size=25, num_workers=1, collate_fn=Collate(), multiprocessing_context=method, timeout=60)
    assert torch.equal(torch.cat([batch.images for batch in loader]), particles.read(slice(None)))


# --- what is no store


@pytest.mark.parametrize("name", ["absent.zarr", "a\0b/absent.zarr"])
def test_a_folder_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(MissingStackError, match=r"absent\.zarr"):
        ZarrDataset(tmp_path / name)


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file.zarr").write_text("not a store")
    with pytest.raises(CryolikeDataError, match=r"file\.zarr"):
        ZarrDataset(tmp_path / "file.zarr")


def test_an_empty_folder_is_no_store(tmp_path):
    with pytest.raises(StackError, match="is not a Zarr store"):
        ZarrDataset(tmp_path)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_store_of_another_program_is_refused(tmp_path, zarr_format):
    group = zarr.create_group(str(tmp_path / "other.zarr"), zarr_format=zarr_format)
    group.create_array("images", shape=(3, 4, 4), dtype="f4")
    with pytest.raises(StackError, match="was not written by cryolike_data"):
        ZarrDataset(tmp_path / "other.zarr")


@pytest.mark.parametrize("harm", ["no images", "an attribute of somebody else"])
def test_what_lacks_a_part_of_a_store_is_refused(store, tmp_path, harm):
    place = shutil.copytree(store, tmp_path / "other.zarr")
    if harm == "no images":
        shutil.rmtree(place / "images")
    else:
        zarr.open_group(str(place)).attrs["cryolike_data"] = "mine"
    with pytest.raises(StackError, match="was not written by cryolike_data"):
        ZarrDataset(place)


def test_an_array_alone_is_refused(tmp_path):
    zarr.create_array(str(tmp_path / "array.zarr"), shape=(3, 4, 4), dtype="f4")
    with pytest.raises(StackError, match=r"array\.zarr"):
        ZarrDataset(tmp_path / "array.zarr")


def test_a_layout_of_the_future_is_refused(store, tmp_path):
    place = shutil.copytree(store, tmp_path / "future.zarr")
    group = zarr.open_group(str(place))
    group.attrs["cryolike_data"] = dict(group.attrs["cryolike_data"]) | {"format": 99}
    with pytest.raises(StackError, match=r"layout 99.*Upgrade"):
        ZarrDataset(place)


def test_a_missing_shard_is_an_error_and_not_zeros(store, tmp_path):
    # Zarr takes a chunk that is not there for one of fill values: a copy that was cut short would read as empty images.
    place = shutil.copytree(store, tmp_path / "cut.zarr")
    shards_of(place)[4].unlink()
    with pytest.raises(CryolikeDataError, match=r"cut\.zarr"):
        ZarrDataset(place).read(slice(None))


def test_a_shard_cut_short_is_an_error(store, tmp_path):
    place = shutil.copytree(store, tmp_path / "cut.zarr")
    shard = shards_of(place)[4]
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CryolikeDataError, match=r"cut\.zarr"):
        ZarrDataset(place).read(slice(None))


@pytest.mark.parametrize("lost", ["ctf/defocus_u/c/0", "ctf/phase_shift_rad/c/0", "ctf/phase_shift_rad/zarr.json", "pose", "uid/c/0"])
def test_columns_of_a_store_that_was_copied_in_part_are_an_error_and_not_zeros(store, tmp_path, lost):
    place = shutil.copytree(store, tmp_path / "part.zarr")
    if (place / lost).is_dir():
        shutil.rmtree(place / lost)
    else:
        (place / lost).unlink()
    with pytest.raises(StackError, match=rf"part\.zarr lacks .*{lost.split('/c/')[0].removesuffix('/zarr.json')}.*Copy or export"):
        _ = ZarrDataset(place).particles.ctf


@pytest.mark.parametrize("damaged", ["ctf/defocus_u/c/0", "ctf/defocus_u/zarr.json", "pose/zarr.json", "source/zarr.json"])
@pytest.mark.parametrize("left", [0, 111])
def test_columns_that_are_damaged_are_an_error_that_names_them(store, tmp_path, damaged, left):
    place = shutil.copytree(store, tmp_path / "cut.zarr")
    (place / damaged).write_bytes((place / damaged).read_bytes()[:left])
    with pytest.raises(StackError, match=r"(ctf/defocus_u|pose|The manifest) of .*cut\.zarr cannot be read: .* Copy or export"):
        _ = ZarrDataset(place).particles.ctf


def test_a_store_that_does_not_say_its_pixel_size_is_refused(store, tmp_path):
    place = shutil.copytree(store, tmp_path / "cut.zarr")
    (place / "zarr.json").write_text((place / "zarr.json").read_text().replace("pixel_size_A", "pixel_size_?"))
    with pytest.raises(StackError, match=r"cut\.zarr does not say .*pixel size"):
        ZarrDataset(place)


# --- whole or not at all


@pytest.fixture
def taken(particles: ParticleDataset, tmp_path: Path) -> Path:
    """A store of three images in a place that a test may change."""
    return export_zarr(particles.select([0, 1, 2]), tmp_path / "taken.zarr")


def test_an_existing_store_is_not_replaced_unless_asked(particles, taken):
    before = contents(taken.parent)
    with pytest.raises(ExportExistsError, match="overwrite=True"):
        export_zarr(particles, taken)
    assert contents(taken.parent) == before


def test_overwriting_leaves_nothing_of_the_store_before(particles, taken, tmp_path):
    export_zarr(particles.select([7, 8]), taken, overwrite=True)
    export_zarr(particles.select([7, 8]), tmp_path / "fresh.zarr")
    assert contents(taken) == contents(tmp_path / "fresh.zarr")
    assert sorted(os.listdir(tmp_path)) == ["fresh.zarr", "taken.zarr"]


def test_a_store_is_not_overwritten_with_a_part_of_itself(taken):
    # It would be removed before it is read.
    before = contents(taken)
    with pytest.raises(ExportError, match="holds the particles that are to be exported"):
        export_zarr(ZarrDataset(taken).select([2, 0]), taken, overwrite=True)
    assert contents(taken) == before


def test_a_store_is_not_overwritten_with_what_is_read_from_it_through_a_link(taken, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    before = contents(taken)
    with pytest.raises(ExportError, match="holds the particles that are to be exported"):
        export_zarr(ZarrDataset(tmp_path / "link" / taken.name).select([2, 0]), taken, overwrite=True)
    assert contents(taken) == before


@pytest.mark.parametrize("rows", [slice(None), [1]], ids=str)
def test_a_compressed_store_is_not_overwritten_with_what_is_read_from_it(particles, tmp_path, rows):
    place = export_zarr(particles, tmp_path / "a.zarr", compression="zstd")
    (tmp_path / "link").symlink_to(tmp_path)
    before = contents(place)
    for opened in (place, tmp_path / "link" / "a.zarr"):
        with pytest.raises(ExportError, match="holds the particles that are to be exported"):
            export_zarr(ZarrDataset(opened).select(rows), place, downsample=Downsample(box=16), overwrite=True)
    assert contents(place) == before


def test_columns_of_a_store_are_not_overwritten_with_what_is_read_from_it(particles, taken, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    before = contents(taken)
    for opened, place in (
        (taken, taken / "ctf"),
        (tmp_path / "link" / taken.name, taken / "ctf"),
        (taken, tmp_path / "link/taken.zarr/ctf"),
    ):
        with pytest.raises(ExportError, match=r"ctf holds the particles that are to be exported \(.*taken\.zarr\)"):
            export_zarr(ZarrDataset(opened).select([2, 0]), place, overwrite=True)
    assert contents(taken) == before


def test_a_part_of_a_store_replaces_another_store_beside_it(particles, taken, tmp_path):
    other = export_zarr(particles, tmp_path / "other.zarr")
    source = pickle.loads(pickle.dumps(ZarrDataset(taken).select([2, 0])))
    export_zarr(source, other, overwrite=True)
    assert torch.equal(ZarrDataset(other).read([0, 1]), particles.read([2, 0]))


def test_an_empty_folder_is_a_place_for_a_store(particles, tmp_path):
    (tmp_path / "a.zarr").mkdir()
    assert len(ZarrDataset(export_zarr(particles, tmp_path / "a.zarr"))) == N


def test_overwriting_through_a_link_leaves_nothing_else_behind(particles, taken, tmp_path):
    (tmp_path / "link.zarr").symlink_to(taken)
    export_zarr(particles, tmp_path / "link.zarr", overwrite=True)
    assert len(ZarrDataset(tmp_path / "link.zarr")) == N
    assert sorted(os.listdir(tmp_path)) == ["link.zarr", "taken.zarr"]


def test_overwriting_a_store_whose_images_were_moved_leaves_them_alone(particles, taken, tmp_path):
    (taken / "images").rename(tmp_path / "elsewhere")
    (taken / "images").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    export_zarr(particles, taken, overwrite=True)
    assert contents(tmp_path / "elsewhere") == before
    assert contents(taken) == contents(export_zarr(particles, tmp_path / "fresh.zarr"))


def test_overwriting_never_removes_what_lies_beside_an_export_of_another_kind(particles, tmp_path):
    # A folder with an export that was stopped is no store, though it holds ".export" too.
    place = tmp_path / "project"
    write_plan(LocalPlace(place), plan_mrc(particles, place).about)
    (place / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(ExportExistsError, match="project"):
        export_zarr(particles, place, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwriting_replaces_stores_and_nothing_else(particles, tmp_path, kind):
    place = tmp_path / "project"
    if kind == "folder":
        (place / "J1").mkdir(parents=True)
        (place / "J1" / "raw_data.mrc").write_bytes(b"years of work")
    else:
        place.write_bytes(b"years of work")
    before = contents(tmp_path)
    with pytest.raises(ExportExistsError, match="project"):
        export_zarr(particles, place, overwrite=True)
    assert contents(tmp_path) == before


ERRORS = [KeyboardInterrupt(), OSError(5, "Input/output error")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", [1, 3])
def test_an_interrupted_export_cannot_be_opened_and_ends_as_an_undisturbed_one(particles, store, tmp_path, error, call):
    with interrupted(call, error):
        export_zarr(particles, tmp_path / "a.zarr", shard_bytes=7 * IMAGE_BYTES)
    with pytest.raises(StackError, match=r"a\.zarr is an export that is not finished .*Run the same export again"):
        ZarrDataset(tmp_path / "a.zarr")
    found = contents(tmp_path / "a.zarr")
    assert sorted(path for path in found if not path.startswith(".export/")) == [f"images/c/{k}/0/0" for k in range(call - 1)]
    assert [path for path in found if "partial" in path or "runs" in path] == []
    export_zarr(particles, tmp_path / "a.zarr", shard_bytes=7 * IMAGE_BYTES)
    assert contents(tmp_path / "a.zarr") == contents(store)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("overwrite", [False, True], ids=["the same call without overwrite", "the same call"])
def test_an_interrupted_replacement_is_no_store_and_ends_as_an_undisturbed_one(particles, taken, store, error, overwrite):
    with interrupted(3, error):
        export_zarr(particles, taken, shard_bytes=7 * IMAGE_BYTES, overwrite=True)
    with pytest.raises(StackError, match="not finished"):
        ZarrDataset(taken)
    kept = {path: path.stat().st_ino for path in shards_of(taken)}
    assert len(kept) == 2
    export_zarr(particles, taken, shard_bytes=7 * IMAGE_BYTES, overwrite=overwrite)
    assert contents(taken) == contents(store)
    assert {path: path.stat().st_ino for path in kept} == kept


def test_a_replacement_stopped_while_it_removes_what_was_there_is_no_mix(particles, taken, store, monkeypatch):
    # Before the first removal the old store is whole; after it nothing opens.
    remove, seen = LocalPlace.remove, []

    def stopping(self: LocalPlace, name: str) -> None:
        if not name.startswith(".export"):
            seen.append(name)
            if len(seen) == 3:
                raise KeyboardInterrupt
        remove(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(LocalPlace, "remove", stopping)
        with pytest.raises(KeyboardInterrupt):
            export_zarr(particles, taken, shard_bytes=7 * IMAGE_BYTES, overwrite=True)
    assert seen[0] == "zarr.json"
    with pytest.raises(StackError, match="not finished"):
        ZarrDataset(taken)
    with pytest.raises(ExportExistsError, match="overwrite=True"):
        export_zarr(particles.select([0, 1, 2]), taken)
    export_zarr(particles, taken, shard_bytes=7 * IMAGE_BYTES)
    assert contents(taken) == contents(store)


@contextmanager
def interrupted(call: int, error: BaseException) -> Iterator[None]:
    """An export, unit by unit, that fails by ``error`` after the first piece of the images of its unit number ``call``, from 1."""
    pieces, calls, threads = Pixels.pieces, iter(range(1, sys.maxsize)), torch.get_num_threads()

    def failing(*args: Any, **options: Any) -> Iterator[torch.Tensor]:
        stops = next(calls) >= call
        for images in pieces(*args, **options):
            yield images
            if stops:
                raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pixels, "pieces", failing)
        torch.set_num_threads(1)  # one unit at a time
        try:
            with pytest.raises(type(error)):
                yield
        finally:
            torch.set_num_threads(threads)


def test_an_empty_selection_is_refused(particles, tmp_path):
    with pytest.raises(CryolikeDataError):
        export_zarr(particles.select([]), tmp_path / "a.zarr")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def url() -> Iterator[str]:
    """A place in a memory file system, empty before and after."""
    place = f"memory://test-{uuid.uuid4().hex}/particles.zarr"
    yield place
    fsspec.filesystem("memory").rm(place.rpartition("/")[0], recursive=True)


def objects(url: str) -> dict[str, bytes]:
    """Every object below a URL, by its name there."""
    files, root = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    return {path.removeprefix(root + "/"): files.cat_file(path) for path in files.find(root)}


def test_a_url_gets_the_store_that_a_folder_gets(particles, store, url):
    assert export_zarr(particles, url, shard_bytes=7 * IMAGE_BYTES) == url
    assert {name: hashlib.sha256(content).hexdigest() for name, content in objects(url).items()} == contents(store)


def test_a_store_at_a_url_reads_as_its_source(particles, url):
    batch = ZarrDataset(export_zarr(particles, url)).batch([59, 0, 7])
    expected = particles.batch([59, 0, 7])
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(batch.uid, expected.uid)
    assert same_optics(batch.ctf, expected.ctf)


def test_an_interrupted_export_to_a_url_ends_as_an_undisturbed_one(particles, store, url, monkeypatch):
    with interrupted(3, KeyboardInterrupt()):
        export_zarr(particles, url, shard_bytes=7 * IMAGE_BYTES)
    with pytest.raises(StackError, match="not finished"):
        ZarrDataset(url)
    assert sorted(name for name in objects(url) if name.startswith("images/")) == ["images/c/0/0/0", "images/c/1/0/0"]
    written = count_units(monkeypatch)
    export_zarr(particles, url, shard_bytes=7 * IMAGE_BYTES)
    assert sorted(written) == list(range(2, 9))
    assert {name: hashlib.sha256(content).hexdigest() for name, content in objects(url).items()} == contents(store)


@pytest.mark.parametrize("error", [PermissionError(13, "Access denied"), RuntimeError("Access denied\n\nDebug source: ...")], ids=str)
def test_an_object_that_cannot_be_written_is_named_with_the_reason(particles, store, url, monkeypatch, error):
    put = zarr.storage.FsspecStore.set

    async def failing(self: Any, key: str, *args: Any) -> None:
        if key == "images/c/3/0/0":
            raise error
        await put(self, key, *args)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.storage.FsspecStore, "set", failing)
        with pytest.raises(ExportError, match=rf"{url}/images/c/3/0/0 cannot be reached: .*Access denied\. What is finished stays"):
            export_zarr(particles, url, shard_bytes=7 * IMAGE_BYTES)
    with pytest.raises(StackError, match="not finished"):
        ZarrDataset(url)
    export_zarr(particles, url, shard_bytes=7 * IMAGE_BYTES)
    assert {name: hashlib.sha256(content).hexdigest() for name, content in objects(url).items()} == contents(store)


def test_a_damaged_object_at_a_url_is_written_again(particles, store, url, monkeypatch):
    export_zarr(particles, url, shard_bytes=7 * IMAGE_BYTES)
    name = url.removeprefix("memory:/") + "/images/c/4/0/0"
    files = fsspec.filesystem("memory")
    files.pipe_file(name, files.cat_file(name)[:-1] + b"?")
    written = count_units(monkeypatch)
    export_zarr(particles, url, shard_bytes=7 * IMAGE_BYTES)
    assert written == [4]
    assert {name: hashlib.sha256(content).hexdigest() for name, content in objects(url).items()} == contents(store)


def test_overwriting_at_a_url_leaves_nothing_of_what_was_there(particles, url):
    with interrupted(3, KeyboardInterrupt()):
        export_zarr(particles, url, shard_bytes=7 * IMAGE_BYTES)
    with pytest.raises(ExportExistsError, match="overwrite=True"):
        export_zarr(particles, url)
    export_zarr(particles, url, overwrite=True)
    assert [name for name in objects(url) if name.startswith("images/c/")] == ["images/c/0/0/0"]
    export_zarr(particles.select([3]), url, overwrite=True)
    assert torch.equal(ZarrDataset(url).read([0]), particles.read([3]))


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}//"])
def test_a_store_at_a_url_is_not_overwritten_with_what_is_read_from_it(particles, url, spelling):
    export_zarr(particles, url)
    before = objects(url)
    for source, target in ((url, spelling.format(url)), (spelling.format(url), url)):
        with pytest.raises(ExportError, match="holds the particles that are to be exported"):
            export_zarr(ZarrDataset(source).select([2, 0]), target, overwrite=True)
    assert objects(url) == before


@pytest.mark.parametrize("source", ["compressed", "url"])
@pytest.mark.parametrize("there", ["finished", "stopped"])
def test_a_store_that_changed_in_place_is_another_source(particles, tmp_path, source, there, request):
    place = request.getfixturevalue("url") if source == "url" else tmp_path / "source.zarr"
    compression = None if source == "url" else "zstd"
    export_zarr(particles, place, compression=compression, downsample=Downsample(box=16))
    target, settings = tmp_path / "a.zarr", {"format": "zarr", "shard_bytes": 7 * IMAGE_BYTES}
    plan = plan_export(ZarrDataset(place), target, **settings)
    run(plan, units=None if there == "finished" else plan.units)
    before = contents(target)
    assert plan_export(ZarrDataset(place), target, **settings).about == plan.about
    # The same particles, columns and settings: only the pixels are others.
    export_zarr(particles, place, compression=compression, downsample=Downsample(box=16, method="max"), overwrite=True)
    with pytest.raises(ExportExistsError, match=r"the input stacks .* differ"):
        run(plan_export(ZarrDataset(place), target, **settings))
    if there == "stopped":
        with pytest.raises(ExportError, match="have changed while they were exported"):
            finish(plan)
    assert contents(target) == before


def test_a_shard_of_a_compressed_store_that_is_replaced_makes_another_source(particles, tmp_path):
    place = export_zarr(particles, tmp_path / "source.zarr", compression="zstd", shard_bytes=7 * IMAGE_BYTES)
    first = plan_export(ZarrDataset(place), tmp_path / "a.zarr").about["inputs"]
    os.utime(shards_of(place)[3], ns=(0, 0))
    second = plan_export(ZarrDataset(place), tmp_path / "a.zarr").about["inputs"]
    assert {name for name in first if first[name] != second[name]} == {"stacks"}


def test_a_source_at_a_url_that_is_gone_is_told(particles, tmp_path, url):
    source = ZarrDataset(export_zarr(particles, url))
    assert source.particles.uid.any()
    files = fsspec.filesystem("memory")
    files.rm(url.removeprefix("memory:/"), recursive=True)
    with pytest.raises(MissingStackError, match="1 of 1 stacks are gone"):
        plan_export(source, tmp_path / "a.zarr")
    files.pipe_file(url.removeprefix("memory:/") + "/a", b"")


@pytest.mark.parametrize("kind", ["zarr", "mrc"])
def test_a_url_that_means_a_local_folder_is_refused(particles, tmp_path, kind):
    with pytest.raises(ArgumentError, match=r"a\.zarr is a local folder; pass its path without local://"):
        plan_export(particles, f"local://{tmp_path}/a.zarr", format=kind)
    assert os.listdir(tmp_path) == []


def test_overwriting_at_a_url_replaces_stores_and_nothing_else(particles, url):
    fsspec.filesystem("memory").pipe_file(url.removeprefix("memory:/") + "/J1/raw_data.mrc", b"years of work")
    before = objects(url)
    with pytest.raises(ExportExistsError, match=r"particles\.zarr"):
        export_zarr(particles, url, overwrite=True)
    assert objects(url) == before


def count_units(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units that are written from now on."""
    write_unit, written = ZarrFormat.write_unit, []

    def counting(self: ZarrFormat, dataset: ParticleDataset, unit: int, *args: Any) -> Any:
        written.append(unit)
        return write_unit(self, dataset, unit, *args)

    monkeypatch.setattr(ZarrFormat, "write_unit", counting)
    return written


def test_a_home_directory_is_expanded(particles, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export_zarr(particles, "~/new/folder/a.zarr") == tmp_path / "new/folder/a.zarr"
    assert len(ZarrDataset("~/new/folder/a.zarr")) == N


def test_the_files_that_are_read_stay_as_they_are(particles, demo, tmp_path):
    before = contents(demo.folder)
    export_zarr(particles, tmp_path / "a.zarr", downsample=Downsample(2))
    assert contents(demo.folder) == before


def test_optics_of_one_group_of_particles_round_trip_beyond_the_store(tmp_path):
    dataset = write_particles(tmp_path, numbered_images(5, 8), uid=uids(5), **ctf_columns(5))
    loaded = ZarrDataset(export_zarr(dataset, tmp_path / "a.zarr"))
    assert same_optics(loaded.batch([3, 1]).ctf, dataset.batch([3, 1]).ctf)
