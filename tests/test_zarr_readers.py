"""Stores that other programs read: zarr-python, zarrs, tensorstore, xarray and dask, with equal values and few tasks."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import tensorstore
import xarray
import zarr
import zarrs  # noqa: F401 - the pipeline that is named below; missing, it is an error and hides no other reader
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import CTF_FIELDS, ctf_columns, numbered_images, uids, write_particles, write_stack, write_table

from cryolike_data import IndexedDataset, ZarrDataset, export_zarr
from cryolike_data.errors import ArgumentError
from cryolike_data.export import plan_export

#: Seven chunks of 118 images, two to a shard: the last shard lacks a chunk, and the last chunk is not full.
N, BOX, SHARD_BYTES = 820, 64, 4_300_000
COLUMNS: dict[str, Any] = {
    "blob__sign": np.full(N, -1, "f4"),
    "ctf__tetra_A": np.random.default_rng(1).normal(size=(N, 4)).astype("f4"),
    "alignments3D__split": np.arange(N, dtype="u4") % 2,
    "alignments3D__shift": np.random.default_rng(2).normal(size=(N, 2)).astype("f4"),
    "alignments3D__pose": np.random.default_rng(3).normal(size=(N, 3)).astype("f4"),
    "alignments3D__psize_A": np.full(N, 1.5, "f4"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "uncompressed": {},
    "zstd": {"compression": "zstd"},
    "blosc": {"compression": "blosc"},
    "zstd and rounded": {"compression": "zstd", "keep_bits": 7},
    "rounded only": {"keep_bits": 7},
    "blosc of float16": {"compression": "blosc", "dtype": "float16"},
    "one shard": {"shard_bytes": 1 << 30},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    return write_particles(tmp_path_factory.mktemp("source"), N, box=BOX, **COLUMNS)


@pytest.fixture(scope="module")
def stores(written: tuple[Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, dataset = tmp_path_factory.mktemp("stores"), IndexedDataset(written[0])
    for number, settings in enumerate(SETTINGS.values()):
        export_zarr(dataset, folder / f"{number}.zarr", **({"shard_bytes": SHARD_BYTES} | settings))
    return {name: folder / f"{number}.zarr" for number, name in enumerate(SETTINGS)}


def with_zarr(store: Path, name: str) -> np.ndarray:
    return np.asarray(zarr.open_group(store, mode="r")[name][:])


def with_zarrs(store: Path, name: str) -> np.ndarray:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        array = zarr.open_array(store, path=name, mode="r")
        assert type(array.async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
        return np.asarray(array[:])


def with_tensorstore(store: Path, name: str) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / name)}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


def with_xarray(store: Path, name: str) -> np.ndarray:
    group, _, name = name.rpartition("/")
    with xarray.open_zarr(store, group=group or None, consolidated=False) as opened:
        return np.asarray(opened[name].values)


def with_dask(store: Path, name: str) -> np.ndarray:
    return np.asarray(dask.array.from_zarr(str(store), component=name).compute(scheduler="synchronous"))


READERS: dict[str, Callable[[Path, str], np.ndarray]] = {
    "zarr": with_zarr,
    "zarrs": with_zarrs,
    "tensorstore": with_tensorstore,
    "xarray": with_xarray,
    "dask": with_dask,
}


def expected(images: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The images as they should be in a store, with rounding to the nearest and ties to even done by arithmetic in float64."""
    images = images.astype(settings.get("dtype", "f4"))
    if "keep_bits" not in settings:
        return images
    fraction, exponent = np.frexp(images.astype(float))
    steps = 2.0 ** (settings["keep_bits"] + 1)
    return np.ldexp(np.rint(fraction * steps) / steps, exponent).astype(images.dtype)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_images_are_equal(stores: dict[str, Path], images: np.ndarray, reader: str, settings: str) -> None:
    found, due = READERS[reader](stores[settings], "images"), expected(images, SETTINGS[settings])
    assert found.dtype == due.dtype
    np.testing.assert_array_equal(found, due)


@pytest.mark.parametrize("compression", [None, "zstd", "blosc"])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "f2"])
def test_every_pixel_type_is_read_by_all(tmp_path: Path, dtype: str, compression: Any) -> None:
    images = numbered_images(21, 16, dtype=dtype)
    dataset = dataset_of(tmp_path, images, imod_flags=0 if dtype == "u1" else None)
    store = export_zarr(dataset, tmp_path / "a.zarr", shard_bytes=10 * images[0].nbytes, compression=compression)
    for reader in READERS.values():
        found = reader(store, "images")
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("settings", SETTINGS)
def test_our_own_reader_gives_what_the_others_give(stores: dict[str, Path], images: np.ndarray, settings: str) -> None:
    rows = np.random.default_rng(0).permutation(N)[:300]
    np.testing.assert_array_equal(ZarrDataset(stores[settings]).read(rows), expected(images, SETTINGS[settings])[rows])


def test_the_last_shard_lacks_a_chunk_and_the_last_chunk_is_not_full(stores: dict[str, Path]) -> None:
    array = zarr.open_array(stores["uncompressed"], path="images", mode="r")
    assert (array.chunks[0], array.shards[0]) == (118, 236)
    assert len(list((stores["uncompressed"] / "images/c").iterdir())) == 4
    assert 3 * 236 < N < 3 * 236 + 118


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("uid", "uid"),
        ("pose", "alignments3D/pose"),
        ("half_set", "alignments3D/split"),
        ("sign", "blob/sign"),
        ("ctf/defocus_u", "ctf/df1_A"),
        ("ctf/exposure_group", "ctf/exp_group_id"),
        ("ctf/tetrafoil_A", "ctf/tetra_A"),
        ("source/image", "blob/idx"),
    ],
)
def test_columns_are_equal(stores: dict[str, Path], written: tuple[Path, np.ndarray], reader: str, name: str, column: str) -> None:
    np.testing.assert_array_equal(READERS[reader](stores["uncompressed"], name), np.load(written[0])[column])


# --- names and units


def test_every_array_begins_with_the_particles_and_names_its_axes(stores: dict[str, Path]) -> None:
    group = zarr.open_group(stores["uncompressed"], mode="r")
    found = {name: array.metadata.dimension_names for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}
    assert found["images"] == ("particle", "y", "x")
    assert (found["pose"], found["shift_A"]) == (("particle", "rotation_vector"), ("particle", "xy"))
    for name, axes in found.items():
        assert axes[0] == "particle", name
        assert len(axes) == group[name].ndim, name
        assert all(axes), name


def test_xarray_shows_particles_with_axes_and_units(stores: dict[str, Path]) -> None:
    with xarray.open_zarr(stores["uncompressed"], consolidated=False) as opened:
        assert dict(opened.sizes) == {"particle": N, "y": BOX, "x": BOX, "rotation_vector": 3, "xy": 2}
        assert opened["images"].dims == ("particle", "y", "x")
        assert opened["images"].attrs["pixel_size_A"] == 1.5
        assert {name: opened[name].attrs["units"] for name in ("pose", "shift_A")} == {"pose": "radian", "shift_A": "angstrom"}
    with xarray.open_zarr(stores["uncompressed"], group="ctf", consolidated=False) as optics:
        assert optics["defocus_u"].dims == ("particle",)
        units = {name: optics[name].attrs["units"] for name in ("voltage_kv", "spherical_aberration_mm", "defocus_u", "phase_shift_rad")}
    assert units == {
        "voltage_kv": "kilovolt",
        "spherical_aberration_mm": "millimeter",
        "defocus_u": "angstrom",
        "phase_shift_rad": "radian",
    }


# --- bit rounding and compression


@limits(max_examples=20, deadline=None)
@given(arrays(np.float32, (4, 8, 8), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)), st.integers(1, 22))
def test_rounded_pixels_are_as_near_as_the_bits_allow(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray, keep_bits: int) -> None:
    folder = tmp_path_factory.mktemp("rounded")
    found = with_zarr(export_zarr(dataset_of(folder, pixels), folder / "a.zarr", keep_bits=keep_bits), "images")
    assert (np.abs(found.astype(float) - pixels) <= 2.0 ** -(keep_bits + 1) * np.abs(pixels.astype(float))).all()
    assert not (found.view(np.uint32) & np.uint32((1 << (23 - keep_bits)) - 1)).any()


@pytest.mark.parametrize(("dtype", "keep_bits"), [("float16", 4), ("float16", 10), ("float64", 30), ("float64", 4)])
def test_other_precisions_are_rounded_too(tmp_path: Path, dtype: str, keep_bits: int) -> None:
    pixels = numbered_images(10, 8).astype(dtype)
    dataset = dataset_of(tmp_path, numbered_images(10, 8))
    found = with_zarr(export_zarr(dataset, tmp_path / "a.zarr", dtype=dtype, keep_bits=keep_bits), "images")
    assert found.dtype == dtype
    assert (np.abs(found - pixels) <= 2.0 ** -(keep_bits + 1) * np.abs(pixels)).all()
    dropped = np.finfo(dtype).nmant - keep_bits
    assert not (found.view(f"u{found.itemsize}") & np.array((1 << dropped) - 1, f"u{found.itemsize}")).any()


def test_integers_have_no_mantissa_to_round(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, numbered_images(10, 8).astype("i2"))
    with pytest.raises(ArgumentError, match="keep_bits rounds floating pixels, and these are int16"):
        export_zarr(dataset, tmp_path / "a.zarr", keep_bits=4)


def test_pixels_that_are_no_numbers_stay_so(tmp_path: Path) -> None:
    pixels = numbered_images(10, 8)
    pixels[3, :3, 0] = np.nan, np.inf, -np.inf
    with pytest.warns(UserWarning, match="1 of 10 images have pixels that are NaN or infinite"):
        store = export_zarr(dataset_of(tmp_path, pixels), tmp_path / "a.zarr", keep_bits=4, compression="blosc")
    found = with_zarr(store, "images")
    np.testing.assert_array_equal(found[3, :3, 0], pixels[3, :3, 0])
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(pixels))


@pytest.mark.parametrize(
    ("compression", "codecs"),
    [
        (None, []),
        ("zstd", [("zstd", {"level": 3})]),
        ("blosc", [("blosc", {"cname": "zstd", "clevel": 3, "shuffle": "bitshuffle", "typesize": 2})]),
    ],
)
def test_chunks_are_compressed_by_the_codec_that_was_asked_for(tmp_path: Path, compression: Any, codecs: list[Any]) -> None:
    dataset = dataset_of(tmp_path, numbered_images(10, 8))
    store = export_zarr(dataset, tmp_path / "a.zarr", dtype="float16", compression=compression)
    (shards,) = json.loads((store / "images/zarr.json").read_text())["codecs"]
    first, *used = shards["configuration"]["codecs"]
    assert first["name"] == "bytes"
    assert [codec["name"] for codec in used] == [name for name, _ in codecs]
    for codec, (_, settings) in zip(used, codecs, strict=True):
        assert settings.items() <= codec["configuration"].items()


def test_fewer_bits_compress_better(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, numbered_images(200, 32))

    def size(name: str, **settings: Any) -> int:
        store = export_zarr(dataset, tmp_path / name, **settings)
        return sum(path.stat().st_size for path in (store / "images/c").rglob("*") if path.is_file())

    raw, zstd, blosc = size("a"), size("b", compression="zstd"), size("c", compression="blosc")
    assert size("d", compression="zstd", keep_bits=7) < 0.7 * zstd < zstd < raw
    assert size("e", compression="blosc", keep_bits=7) < 0.5 * blosc < blosc < raw
    assert size("f", compression="blosc", keep_bits=3) < size("e2", compression="blosc", keep_bits=7)
    assert size("g", keep_bits=7) == raw


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep_bits": 0}, "1 to 23"),
        ({"keep_bits": 24}, "1 to 23"),
        ({"keep_bits": 11, "dtype": "float16"}, "1 to 10"),
        ({"compression": "gzip"}, "zstd, blosc"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        export_zarr(dataset_of(tmp_path, numbered_images(3, 8)), tmp_path / "a.zarr", **settings)
    assert not (tmp_path / "a.zarr").exists()


def test_bits_of_integers_cannot_be_rounded(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="keep_bits"):
        export_zarr(dataset_of(tmp_path, numbered_images(3, 8, dtype="i2")), tmp_path / "a.zarr", keep_bits=7)


def dataset_of(folder: Path, images: np.ndarray, **oddity: Any) -> IndexedDataset:
    """A data set of one stack with these images."""
    n = len(images)
    write_stack(folder / "a.mrc", images, **oddity)
    columns = {"uid": uids(n), "blob__path": ["a.mrc"] * n, "blob__idx": np.arange(n, dtype="u4"), "blob__psize_A": np.full(n, 1.5, "f4")}
    return IndexedDataset(write_table(folder / "a.cs", **columns, **ctf_columns(n)))


# --- a million images


@pytest.fixture(scope="module", params=[64, 128, 256, 512])
def million(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An array of a million images without any file of images, laid out as a plan of their export says."""
    box, n, folder = request.param, 1_000_000, tmp_path_factory.mktemp("million")
    write_stack(folder / "a.mrc", np.empty((0, box, box), "f4"), nz=n)
    os.truncate(folder / "a.mrc", 1024 + n * box * box * 4)
    with (folder / "a.mrc").open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<i", n))
    fields = {"uid": "<u8", "blob/path": "S5", "blob/idx": "<u4", "blob/psize_A": "<f4"} | CTF_FIELDS
    table = np.zeros(n, list(fields.items()))
    table["uid"], table["blob/path"], table["blob/idx"], table["blob/psize_A"] = np.arange(1, n + 1), b"a.mrc", np.arange(n), 1.5
    np.save(folder / "a.npy", table)
    layout = plan_export(IndexedDataset(folder / "a.npy"), folder / "a.zarr").format.settings()
    zarr.create_array(
        folder / "million.zarr",
        name="images",
        shape=(n, box, box),
        dtype=layout["dtype"],
        chunks=(layout["chunk"], box, box),
        shards=(layout["shard"], box, box),
        dimension_names=("particle", "y", "x"),
    )
    return folder / "million.zarr"


def test_dask_makes_few_tasks_of_a_million_images(million: Path) -> None:
    array = dask.array.from_zarr(str(million), component="images")
    assert array.shape[0] == 1_000_000
    assert len(dict(array.__dask_graph__())) <= 50_000


def test_xarray_makes_few_tasks_of_a_million_images(million: Path) -> None:
    with xarray.open_zarr(million, consolidated=False, chunks={}) as opened:
        assert len(dict(opened["images"].data.__dask_graph__())) <= 50_000
