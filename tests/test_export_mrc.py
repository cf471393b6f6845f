"""MRC stacks with the tables that point at them: valid files, equal images, and what CryoSPARC, RELION and this package read of them."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from cryosparc.dataset import Dataset
from scipy.spatial.transform import Rotation
from support import contents, ctf_columns, numbered_images, stored_images, uids, write_particles, write_stack, write_table

from cryolike_data import Downsample, IndexedDataset, JobDirectoryDataset, ZarrDataset, export_zarr
from cryolike_data.ctf import ctf_values, half_plane
from cryolike_data.demo import DemoProject, project_model
from cryolike_data.errors import ArgumentError, ExportError, ExportExistsError, MissingDependencyError, TableError
from cryolike_data.export import export_mrc

N, BOX = 10, 8
POSES = {
    "alignments3D__split": (np.arange(N) % 3 == 0).astype(np.uint32),
    "alignments3D__shift": np.random.default_rng(1).normal(scale=3, size=(N, 2)).astype("f4"),
    "alignments3D__pose": np.random.default_rng(2).normal(scale=1.5, size=(N, 3)).astype("f4"),
    "alignments3D__psize_A": np.full(N, 1.1, np.float32),
}
SHIFT_A = POSES["alignments3D__shift"].astype(float) * float(np.float32(1.1))


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, np.ndarray]:
    return write_particles(tmp_path / "source", N, box=BOX, **POSES)


def dataset_of(folder: Path, images: np.ndarray, **oddity: Any) -> IndexedDataset:
    """A data set of one stack with these images."""
    n = len(images)
    write_stack(folder / "a.mrc", images, pixel_size=1.5, **oddity)
    columns = {"uid": uids(n), "blob__path": ["a.mrc"] * n, "blob__idx": np.arange(n, dtype="u4"), "blob__psize_A": np.full(n, 1.5, "f4")}
    return IndexedDataset(write_table(folder / "a.cs", **columns, **ctf_columns(n)))


def stacks(folder: Path) -> list[Path]:
    return sorted((folder / "particles").iterdir())


def header(stack: Path) -> Any:
    with mrcfile.open(stack, header_only=True) as mrc:
        return mrc.header.copy()


def images_of(stack: Path) -> np.ndarray:
    """The images of a stack; a stack of one image is an image to mrcfile."""
    data = mrcfile.read(stack)
    return data.reshape(-1, *data.shape[-2:])


def exported(folder: Path) -> np.ndarray:
    """The images of all stacks of an export, in order."""
    return np.concatenate([images_of(stack) for stack in stacks(folder)])


def star(folder: Path) -> tuple[Any, Any]:
    blocks = starfile.read(folder / "particles.star", always_dict=True)
    assert list(blocks) == ["optics", "particles"]
    return blocks["optics"], blocks["particles"]


def star_images(folder: Path, names: list[str]) -> np.ndarray:
    """The images that names in a star file mean, from the folder of the star file."""
    places = [name.split("@") for name in names]
    return np.stack([images_of(folder / path)[int(number) - 1] for number, path in places])


def assert_valid(stack: Path) -> None:
    told = io.StringIO()
    assert mrcfile.validate(stack, print_file=told), told.getvalue()


# --- the stacks


@pytest.mark.parametrize("dtype", ["f4", "f2", "i1", "i2", "u2"])
def test_every_pixel_type_is_kept_in_valid_stacks_whose_last_is_shorter(tmp_path: Path, dtype: str) -> None:
    images = numbered_images(N, BOX, dtype=dtype)
    export_mrc(dataset_of(tmp_path / "source", images), tmp_path / "out", batch_size=4)
    assert [path.name for path in stacks(tmp_path / "out")] == [f"stack_{k:06d}.mrcs" for k in range(3)]
    for stack in stacks(tmp_path / "out"):
        assert_valid(stack)
    assert [len(mrcfile.read(stack)) for stack in stacks(tmp_path / "out")] == [4, 4, 2]
    assert exported(tmp_path / "out").dtype == dtype
    np.testing.assert_array_equal(exported(tmp_path / "out"), images)


def test_unsigned_bytes_which_mrc_has_no_mode_for_become_float32(tmp_path: Path) -> None:
    images = numbered_images(N, BOX, dtype="u1")
    export_mrc(dataset_of(tmp_path / "source", images, imod_flags=0), tmp_path / "out")
    assert_valid(tmp_path / "out/particles/stack_000000.mrcs")
    assert exported(tmp_path / "out").dtype == np.float32
    np.testing.assert_array_equal(exported(tmp_path / "out"), images)


@pytest.mark.parametrize("contrast", ["stored", "positive"])
def test_double_precision_which_mrc_has_no_mode_for_becomes_float32(tmp_path: Path, contrast: Any) -> None:
    cs, images = write_particles(tmp_path / "source", N, box=BOX, blob__sign=np.full(N, -1, "f4"))
    store = export_zarr(IndexedDataset(cs), tmp_path / "a.zarr", dtype="float64")
    export_mrc(ZarrDataset(store), tmp_path / "out", contrast=contrast)
    assert_valid(tmp_path / "out/particles/stack_000000.mrcs")
    assert exported(tmp_path / "out").dtype == np.float32
    np.testing.assert_array_equal(exported(tmp_path / "out"), images if contrast == "stored" else -images)


def test_foreign_byte_order_becomes_little_endian(tmp_path: Path) -> None:
    images = numbered_images(N, BOX)
    export_mrc(dataset_of(tmp_path / "source", images, order=">"), tmp_path / "out")
    assert_valid(tmp_path / "out/particles/stack_000000.mrcs")
    assert (tmp_path / "out/particles/stack_000000.mrcs").read_bytes()[1024:] == images.astype("<f4").tobytes()


def test_stacks_are_stacks_of_images_and_tell_the_pixel_size(ds: IndexedDataset, tmp_path: Path) -> None:
    export_mrc(ds, tmp_path / "out", batch_size=4)
    with mrcfile.open(tmp_path / "out/particles/stack_000002.mrcs") as mrc:
        assert mrc.is_image_stack()
        assert mrc.data.shape == (2, BOX, BOX)
        assert mrc.voxel_size.tolist() == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(np.random.default_rng(0).normal(1e4, 1, (800, 64, 64)), id="large-offset"),
        pytest.param(np.random.default_rng(0).normal(1, 1e-6, (40, 32, 32)), id="little-noise"),
        pytest.param(np.random.default_rng(0).normal(0, 1, (40, 32, 32)) * np.logspace(-3, 3, 40)[:, None, None], id="uneven"),
        pytest.param(np.random.default_rng(0).normal(0, 1, (800, 64, 64)) + np.linspace(0, 100, 800)[:, None, None], id="drifting"),
    ],
)
def test_the_header_tells_the_statistics_of_all_pixels(tmp_path: Path, images: np.ndarray) -> None:
    pixels = images.astype("f4")
    export_mrc(dataset_of(tmp_path / "source", pixels), tmp_path / "out")
    (stack,) = stacks(tmp_path / "out")
    assert_valid(stack)
    told = header(stack)
    assert (told.dmin, told.dmax) == (pixels.min(), pixels.max())
    assert told.dmean == pytest.approx(pixels.mean(dtype=float), rel=2e-7)
    assert told.rms == pytest.approx(pixels.std(dtype=float), rel=2e-3)


@pytest.mark.parametrize("scale", [1, 1000])
def test_images_of_mean_zero_are_valid(tmp_path: Path, scale: float) -> None:
    images = np.random.default_rng(0).normal(size=(100, 64, 64))
    images -= images.mean(axis=(1, 2), keepdims=True)
    export_mrc(dataset_of(tmp_path / "source", (scale * images).astype("f4")), tmp_path / "out")
    assert_valid(tmp_path / "out/particles/stack_000000.mrcs")


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
def test_statistics_of_pixels_that_are_no_numbers_are_marked_as_not_determined(tmp_path: Path, worst: float) -> None:
    images = numbered_images(N, BOX)
    images[3, 4, 5] = worst
    with pytest.warns(UserWarning, match="1 of 10 images have pixels that are NaN or infinite"):
        export_mrc(dataset_of(tmp_path / "source", images), tmp_path / "out")
    (stack,) = stacks(tmp_path / "out")
    told = header(stack)
    assert (told.dmin, told.dmax, told.dmean, told.rms) == (0, -1, -2, -1)
    assert stack.read_bytes()[1024:] == images.tobytes()


# --- smaller images, half precision


@pytest.mark.parametrize("method", ["mean", "fourier"])
def test_smaller_images_have_a_larger_pixel_size_and_shifts_of_their_own(
    ds: IndexedDataset, images: np.ndarray, tmp_path: Path, method: Any
) -> None:
    table = export_mrc(ds, tmp_path / "out", downsample=Downsample(box=4, method=method), batch_size=4)
    for stack in stacks(tmp_path / "out"):
        assert_valid(stack)
        told = header(stack)
        assert (told.nx, told.ny, told.mode, told.cella.x / told.mx) == (4, 4, 2, 3)
        assert told.cellb.tolist() == (90, 90, 90)
    if method == "mean":
        np.testing.assert_allclose(exported(tmp_path / "out"), images.reshape(N, 4, 2, 4, 2).mean(axis=(2, 4)), atol=1e-6)
    columns = np.load(table)
    assert (columns["blob/psize_A"] == 3).all()
    assert (columns["blob/shape"] == 4).all()
    # The middle of a block of two pixels of 1.5 A is half a pixel beyond the first of them.
    shift_A, close = SHIFT_A + (0.75 if method == "mean" else 0), {"rtol": 3e-7, "atol": 3e-7 if method == "mean" else 0}
    np.testing.assert_allclose(columns["alignments3D/shift"] * columns["alignments3D/psize_A"][:, None], shift_A, **close)
    optics, particles = star(tmp_path / "out")
    assert (optics["rlnImagePixelSize"][0], optics["rlnImageSize"][0]) == (3, 4)
    np.testing.assert_allclose(particles[["rlnOriginXAngst", "rlnOriginYAngst"]], shift_A, **close)
    read = IndexedDataset(table)
    assert (read.box, read.pixel_size) == (4, 3)
    np.testing.assert_allclose(read.particles.shift_A, shift_A, **close)


def write_gaussians(folder: Path, n: int, box: int, *, pixel_size: float) -> IndexedDataset:
    """Particles of one stack, each a Gaussian that its shift brings to pixel box // 2."""
    shift = np.random.default_rng(3).uniform(-2, 2, (n, 2)).astype("f4")
    x, y = (box // 2 - shift[:, axis, None, None].astype(float) for axis in (0, 1))
    at = np.arange(box)
    images = np.exp(-((at - x) ** 2 + (at[:, None] - y) ** 2) / (2 * (box / 12) ** 2)).astype("f4")
    write_stack(folder / "a.mrc", images)
    table = {"uid": uids(n), "blob__path": ["a.mrc"] * n, "blob__idx": np.arange(n, dtype="u4"), **ctf_columns(n)}
    sizes = dict.fromkeys(("blob__psize_A", "alignments3D__psize_A"), np.full(n, pixel_size, "f4"))
    return IndexedDataset(write_table(folder / "a.cs", **table, **sizes, alignments3D__shift=shift))


@pytest.mark.parametrize(("box", "new"), [(48, 24), (48, 16), (48, 12), (45, 15), (75, 15), (42, 21), (44, 11), (48, 48)], ids=str)
@pytest.mark.parametrize("method", ["fourier", "mean", "max"])
def test_shifts_centre_the_particles_in_smaller_images(tmp_path: Path, box: int, new: int, method: Any) -> None:
    source = write_gaussians(tmp_path, 100, box, pixel_size=1.5)
    downsample = Downsample(box=new, method=method)
    table = export_mrc(source, tmp_path / "out", downsample=downsample)
    _, rows = star(tmp_path / "out")
    read = IndexedDataset(table)
    stored = ZarrDataset(export_zarr(source, tmp_path / "a.zarr", downsample=downsample))
    images = read.read(slice(None)).numpy().astype(float)
    position = (np.arange(new) - new // 2) * read.pixel_size
    x, y = ((images.sum(axis=axis) * position).sum(axis=1) / images.sum(axis=(1, 2)) for axis in (1, 2))
    for shift in (read.particles.shift_A, stored.particles.shift_A, rows[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()):
        away = np.stack([x, y], axis=1) + shift
        # The largest of a block leans to one side or the other, and over many to none.
        np.testing.assert_allclose(away.mean(axis=0) if method == "max" else away, 0, atol=0.05 * 1.5)


def test_particles_without_shifts_get_none_by_downsampling(tmp_path: Path) -> None:
    table, _ = write_particles(tmp_path / "source", N, box=BOX)
    downsample = Downsample(box=4, method="mean")
    assert IndexedDataset(export_mrc(IndexedDataset(table), tmp_path / "out", downsample=downsample)).particles.shift_A is None
    assert ZarrDataset(export_zarr(IndexedDataset(table), tmp_path / "a.zarr", downsample=downsample)).particles.shift_A is None


def test_what_an_export_adds_to_the_shifts_is_told_with_it(ds: IndexedDataset, tmp_path: Path) -> None:
    before = ds.particles.shift_A.copy()
    for method, expected in (("mean", 0.75), ("fourier", None)):
        export_mrc(ds, tmp_path / method, downsample=Downsample(box=4, method=method))
        assert json.loads((tmp_path / method / "export.json").read_text())["settings"].get("added_shift_A") == expected
    np.testing.assert_array_equal(ds.particles.shift_A, before)


def test_float16_halves_the_files_and_stays_valid(tmp_path: Path) -> None:
    images = numbered_images(400, 64)
    export_mrc(dataset_of(tmp_path / "source", images), tmp_path / "out", dtype="float16")
    (stack,) = stacks(tmp_path / "out")
    assert stack.stat().st_size == 1024 + images.nbytes // 2
    assert header(stack).mode == 12
    assert_valid(stack)
    np.testing.assert_array_equal(exported(tmp_path / "out"), images.astype("f2"))


@pytest.mark.parametrize("dtype", ["f4", "u2"])
def test_pixels_too_large_for_float16_are_refused_and_nothing_is_sealed(tmp_path: Path, dtype: str) -> None:
    images = numbered_images(N, BOX, dtype=dtype)
    images[7, 0, 0] = 65535
    dataset = dataset_of(tmp_path / "source", images)
    with pytest.raises(ExportError, match=r"larger than float16 can hold.*normalize them, or export float32"):
        export_mrc(dataset, tmp_path / "out", dtype="float16", batch_size=4)
    assert not {"particles.cs", "particles.star", "export.json"} & set(os.listdir(tmp_path / "out"))
    export_mrc(dataset, tmp_path / "out", dtype="float32", batch_size=4, overwrite=True)
    np.testing.assert_array_equal(exported(tmp_path / "out"), images)


@pytest.mark.parametrize("dtype", ["float64", "int16", "bfloat16"])
def test_pixel_types_that_it_does_not_write_are_refused(ds: IndexedDataset, tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ArgumentError, match="float16"):
        export_mrc(ds, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


# --- the CryoSPARC table


def test_the_table_names_equal_images_from_any_place(
    ds: IndexedDataset, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_mrc(ds, tmp_path / "out", batch_size=4)
    (tmp_path / "far").mkdir()
    shutil.move(tmp_path / "out", tmp_path / "far/moved")
    for place in (tmp_path, tmp_path / "far/moved", Path("/")):
        monkeypatch.chdir(place)
        for table in (tmp_path / "far/moved/particles.cs", os.path.relpath(tmp_path / "far/moved/particles.cs")):
            np.testing.assert_array_equal(IndexedDataset(table).read(slice(None)), images)


def test_the_table_keeps_what_is_known_of_the_particles(ds: IndexedDataset, tmp_path: Path) -> None:
    source = np.load(tmp_path / "source/J1/particles.cs")
    read = IndexedDataset(export_mrc(ds, tmp_path / "out", batch_size=4)).particles
    np.testing.assert_array_equal(read.uid, source["uid"])
    for ours, theirs in (
        ("defocus_u", "df1_A"),
        ("defocus_v", "df2_A"),
        ("astigmatism_angle_rad", "df_angle_rad"),
        ("voltage_kv", "accel_kv"),
    ):
        np.testing.assert_array_equal(getattr(read.ctf, ours), source[f"ctf/{theirs}"])
    np.testing.assert_array_equal(read.pose, source["alignments3D/pose"])
    np.testing.assert_array_equal(read.half_set, source["alignments3D/split"])
    np.testing.assert_allclose(read.shift_A, SHIFT_A, rtol=3e-7)


def test_cryosparc_tools_reads_the_table(ds: IndexedDataset, images: np.ndarray, tmp_path: Path) -> None:
    source = np.load(tmp_path / "source/J1/particles.cs")
    loaded = Dataset.load(export_mrc(ds, tmp_path / "out", batch_size=4))
    assert len(loaded) == N
    for name in (*(name for name in source.dtype.names if name.startswith("ctf/")), "uid", "alignments3D/pose", "alignments3D/split"):
        np.testing.assert_array_equal(np.asarray(loaded[name]), source[name], err_msg=name)
    shift_A = np.asarray(loaded["alignments3D/shift"]) * np.asarray(loaded["alignments3D/psize_A"])[:, None]
    np.testing.assert_allclose(shift_A, SHIFT_A, rtol=3e-7)
    places = zip(loaded["blob/path"], loaded["blob/idx"], strict=True)
    found = np.stack([mrcfile.read(tmp_path / "out" / path.removeprefix(">"))[number] for path, number in places])
    np.testing.assert_array_equal(found, images)


def test_the_order_is_that_of_the_data_set(ds: IndexedDataset, images: np.ndarray, tmp_path: Path) -> None:
    rows = [7, 2, 9, 2, 0]
    table = export_mrc(ds.select(rows), tmp_path / "out", batch_size=2)
    np.testing.assert_array_equal(np.load(table)["uid"], uids(N)[rows])
    np.testing.assert_array_equal(exported(tmp_path / "out"), images[rows])
    assert star(tmp_path / "out")[1]["rlnImageName"][3] == "000002@particles/stack_000001.mrcs"


def test_2d_alignments_become_rotations_about_the_viewing_axis(tmp_path: Path) -> None:
    angle = np.linspace(-3, 3, N).astype("f4")
    columns = {"alignments2D__pose": angle, "alignments2D__shift": np.ones((N, 2), "f4"), "alignments2D__psize_A": np.full(N, 2, "f4")}
    table, _ = write_particles(tmp_path / "source", N, **columns)
    found = np.load(export_mrc(IndexedDataset(table), tmp_path / "out"))
    np.testing.assert_array_equal(found["alignments3D/pose"], np.stack([0 * angle, 0 * angle, angle], axis=1))
    particles = star(tmp_path / "out")[1]
    np.testing.assert_allclose(particles["rlnAnglePsi"], np.rad2deg(angle.astype(float)), rtol=1e-11)
    assert (particles[["rlnAngleRot", "rlnAngleTilt"]] == 0).all(axis=None)
    assert (particles[["rlnOriginXAngst", "rlnOriginYAngst"]] == 2).all(axis=None)


# --- the star file


def test_the_star_file_names_equal_images(ds: IndexedDataset, images: np.ndarray, tmp_path: Path) -> None:
    export_mrc(ds, tmp_path / "out", batch_size=4)
    names = star(tmp_path / "out")[1]["rlnImageName"].tolist()
    assert (names[0], names[-1]) == ("000001@particles/stack_000000.mrcs", "000002@particles/stack_000002.mrcs")
    np.testing.assert_array_equal(star_images(tmp_path / "out", names), images)


def test_the_star_file_holds_optics_poses_shifts_and_half_sets(ds: IndexedDataset, tmp_path: Path) -> None:
    source = np.load(tmp_path / "source/J1/particles.cs")
    export_mrc(ds, tmp_path / "out")
    optics, particles = star(tmp_path / "out")
    told = optics[["rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnImagePixelSize", "rlnImageSize"]]
    assert told.to_numpy().tolist() == [[300, 2.7, 0.1, 1.5, BOX]]
    np.testing.assert_array_equal(particles["rlnDefocusU"].to_numpy(np.float32), source["ctf/df1_A"])
    np.testing.assert_array_equal(particles["rlnDefocusV"].to_numpy(np.float32), source["ctf/df2_A"])
    np.testing.assert_array_equal(np.deg2rad(particles["rlnDefocusAngle"].to_numpy()).astype("f4"), source["ctf/df_angle_rad"])
    np.testing.assert_array_equal(particles["rlnRandomSubset"], source["alignments3D/split"] + 1)
    np.testing.assert_allclose(particles[["rlnOriginXAngst", "rlnOriginYAngst"]], SHIFT_A, rtol=3e-7)
    euler = Rotation.from_euler("ZYZ", particles[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(), degrees=True)
    vector = Rotation.from_rotvec(source["alignments3D/pose"].astype(float))
    np.testing.assert_allclose(euler.as_matrix(), vector.as_matrix(), atol=1e-10)


def test_what_a_star_file_cannot_tell_is_said_and_stays_in_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table, _ = write_particles(tmp_path / "source", N, box=BOX, ctf__trefoil_A=np.ones((N, 2), "f4"))
    read = IndexedDataset(export_mrc(IndexedDataset(table), tmp_path / "out"))
    assert caplog.text.count("trefoil_A: left out of the star file") == 1
    assert (read.particles.ctf.trefoil_A == 1).all()


def test_exposure_groups_become_optics_groups(demo: DemoProject, tmp_path: Path) -> None:
    table = np.load(demo.indexed)
    export_mrc(IndexedDataset(demo.indexed), tmp_path / "out", batch_size=25)
    optics, particles = star(tmp_path / "out")
    of = optics.set_index("rlnOpticsGroup").loc[particles["rlnOpticsGroup"]]
    np.testing.assert_array_equal(of["rlnVoltage"].to_numpy(np.float32), table["ctf/accel_kv"])
    np.testing.assert_array_equal(of["rlnAmplitudeContrast"].to_numpy(np.float32), table["ctf/amp_contrast"])
    assert optics[["rlnImagePixelSize", "rlnImageSize"]].to_numpy().tolist() == [[2, 32]] * 2


def test_particles_without_optics_are_refused_with_both_remedies_before_anything_is_written(tmp_path: Path) -> None:
    table, images = write_particles(tmp_path / "source", N, box=BOX, **dict.fromkeys(ctf_columns(1)))
    dataset = IndexedDataset(table)
    with pytest.raises(TableError, match=r"star file needs the optics.*passthrough=.*star=False"):
        export_mrc(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    read = IndexedDataset(export_mrc(dataset, tmp_path / "out", star=False))
    assert sorted(os.listdir(tmp_path / "out")) == ["export.json", "particles", "particles.cs"]
    np.testing.assert_array_equal(read.read(slice(None)), images)
    assert read.particles.ctf is None


def test_without_starfile_nothing_is_written(ds: IndexedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starfile", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "cryolike-data\[star\]"'):
        export_mrc(ds, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_mrc(ds, tmp_path / "out", star=False).is_file()


# --- other sources, and what is in the place already


def test_a_job_directory_is_exported(demo: DemoProject, tmp_path: Path) -> None:
    dataset = JobDirectoryDataset(demo.folder, demo.downsampled_job_number)
    read = IndexedDataset(export_mrc(dataset, tmp_path / "out", batch_size=25))
    table = np.load(demo.folder / "J5/J5_passthrough_particles.cs")
    sources = sorted((demo.folder / "J5/downsample").glob("*.mrc"))
    np.testing.assert_array_equal(exported(tmp_path / "out"), np.concatenate([mrcfile.read(path) for path in sources]))
    np.testing.assert_array_equal(read.particles.uid, table["uid"])
    assert (read.box, read.pixel_size) == (16, 4)
    for stack in stacks(tmp_path / "out"):
        assert_valid(stack)


def test_the_tables_of_a_job_directory_are_known_to_an_export(demo: DemoProject) -> None:
    dataset = JobDirectoryDataset(demo.folder, demo.job_number)
    tables = [str(demo.folder / "J4" / name) for name in ("J4_passthrough_particles.cs", "restacked_particles.cs")]
    for chosen in (dataset, dataset[3:]):
        assert sorted(chosen.tables) == tables


def test_a_store_goes_to_stacks_and_back_with_the_same_bytes(demo: DemoProject, tmp_path: Path) -> None:
    export_zarr(IndexedDataset(demo.indexed), tmp_path / "a.zarr", shard_bytes=100_000)
    table = export_mrc(ZarrDataset(tmp_path / "a.zarr"), tmp_path / "out", batch_size=25)
    export_zarr(IndexedDataset(table), tmp_path / "b.zarr", shard_bytes=100_000)
    np.testing.assert_array_equal(exported(tmp_path / "out"), stored_images(demo.folder, np.load(demo.indexed)))
    assert len(contents(tmp_path / "a.zarr/images")) > 2
    assert contents(tmp_path / "a.zarr/images") == contents(tmp_path / "b.zarr/images")
    one, other = ZarrDataset(tmp_path / "a.zarr").particles.columns(), ZarrDataset(tmp_path / "b.zarr").particles.columns()
    for name in one.keys() - {"row", "shift_A"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    np.testing.assert_allclose(one["shift_A"], other["shift_A"], rtol=3e-7)


def test_other_files_in_the_folder_are_left_alone(ds: IndexedDataset, tmp_path: Path) -> None:
    write_stack(tmp_path / "out/particles/mine.mrcs", numbered_images(1, BOX))
    export_mrc(ds, tmp_path / "out", batch_size=4)
    export_mrc(ds, tmp_path / "out", batch_size=5, overwrite=True)
    assert [path.name for path in stacks(tmp_path / "out")] == ["mine.mrcs", "stack_000000.mrcs", "stack_000001.mrcs"]


@pytest.mark.parametrize("opened", ["out", "link"])
def test_an_export_never_replaces_the_particles_that_it_reads(ds: IndexedDataset, tmp_path: Path, opened: str) -> None:
    export_mrc(ds, tmp_path / "out", batch_size=4)
    (tmp_path / "link").symlink_to("out")
    before = contents(tmp_path / "out")
    again = IndexedDataset(tmp_path / opened / "particles.cs")
    with pytest.raises(ExportExistsError, match="overwrite=True"):
        export_mrc(again, tmp_path / "out", batch_size=5)
    with pytest.raises(ExportError, match="holds the particles that are to be exported"):
        export_mrc(again, tmp_path / "out", batch_size=5, overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("n", [N, 70_000])  # of more than 65,536 rows, columns are read again and again
def test_an_export_never_replaces_the_table_that_it_reads(tmp_path: Path, n: int) -> None:
    write_stack(tmp_path / "out/stacks/a.mrc", numbered_images(1, BOX))
    blob = {"blob__path": ["stacks/a.mrc"] * n, "blob__idx": np.zeros(n, "u4"), "blob__psize_A": np.full(n, 1.5, "f4")}
    table = write_table(tmp_path / "out/particles.cs", uid=uids(n), **blob, location__micrograph_uid=uids(n, seed=1), **ctf_columns(n))
    before = contents(tmp_path / "out")
    with pytest.raises(ExportError, match=r"holds the particles that are to be exported \(.*particles\.cs\)"):
        export_mrc(IndexedDataset(table).select(slice(None, None, 2)), tmp_path / "out", overwrite=True, star=False)
    assert contents(tmp_path / "out") == before


def test_an_export_never_replaces_what_its_columns_are_joined_from(tmp_path: Path) -> None:
    n = 4
    write_stack(tmp_path / "a.mrc", numbered_images(n, BOX))
    blob = {"blob__path": ["a.mrc"] * n, "blob__idx": np.arange(n, dtype="u4"), "blob__psize_A": np.full(n, 1.5, "f4")}
    table = write_table(tmp_path / "blob.cs", uid=uids(n), **blob)
    optics = write_table(tmp_path / "out/particles.cs", uid=uids(n), **ctf_columns(n))
    (tmp_path / "optics.cs").symlink_to(optics)
    before = contents(tmp_path / "out")
    for passthrough in (optics, tmp_path / "optics.cs"):
        with pytest.raises(ExportError, match="holds the particles that are to be exported"):
            export_mrc(IndexedDataset(table, passthrough=passthrough), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("content", ["{}", '{"format": "A4", "units": "mm"}', "my own notes", ""])
def test_a_file_of_somebody_else_that_has_the_name_of_the_manifest_is_not_replaced_unasked(
    ds: IndexedDataset, tmp_path: Path, content: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/export.json").write_text(content)
    with pytest.raises(ExportExistsError, match=r"export\.json.*overwrite=True"):
        export_mrc(ds, tmp_path / "out")
    assert (tmp_path / "out/export.json").read_text() == content
    export_mrc(ds, tmp_path / "out", overwrite=True)
    assert len(IndexedDataset(tmp_path / "out/particles.cs")) == N


@pytest.mark.shared
def test_real_particles_give_the_star_file_of_the_depositors(shared: Path, tmp_path: Path) -> None:
    folder = shared / "real/empiar_10076"
    export_mrc(IndexedDataset(folder / "empiar_10076_7.cs", folder=folder), tmp_path / "out", batch_size=3)
    optics, particles = star(tmp_path / "out")
    real = starfile.read(folder / "empiar_10076_7.star")
    for name in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"):
        np.testing.assert_allclose(particles[name], real[name], rtol=2e-7, err_msg=name)
    of = optics.set_index("rlnOpticsGroup").loc[particles["rlnOpticsGroup"]]
    for name in ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"):
        np.testing.assert_allclose(of[name], real[name], rtol=2e-7, err_msg=name)
    np.testing.assert_allclose(of["rlnImagePixelSize"], real["rlnDetectorPixelSize"] * 1e4 / real["rlnMagnification"], rtol=1e-4)
    expected = star_images(folder, real["rlnImageName"].tolist())
    np.testing.assert_array_equal(star_images(tmp_path / "out", particles["rlnImageName"].tolist()), expected)
    for stack in stacks(tmp_path / "out"):
        assert_valid(stack)


# --- contrast


SIGNS = np.array([-1, 1, -1, -1, 1, -1, -1, -1, 1, -1], "f4")


@pytest.mark.parametrize("dtype", ["f4", "f2", "i1", "i2", "u2"])
@pytest.mark.parametrize("sign", [np.full(N, -1, "f4"), SIGNS], ids=["dark", "mixed"])
@pytest.mark.parametrize("downsample", [None, Downsample(box=6), Downsample(factor=2, method="mean")], ids=str)
def test_dark_particles_become_bright_ones(tmp_path: Path, dtype: str, sign: np.ndarray, downsample: Downsample | None) -> None:
    images = numbered_images(N, BOX, dtype=dtype)
    if dtype in ("i1", "i2"):
        images[0, 0, 0] = np.iinfo(images.dtype).min  # whose negative is none of this type
    cs, _ = write_particles(tmp_path / "source", N, box=BOX, stacks=1, blob__sign=sign, **POSES)
    write_stack(tmp_path / "source/J1/extract/stack_0.mrc", images[np.argsort(np.load(cs)["blob/idx"])], pixel_size=1.5)
    dataset = IndexedDataset(cs)
    stored = dataset.read(slice(None)).float()
    expected = (stored if downsample is None else downsample(stored)) * torch.from_numpy(sign)[:, None, None]
    export_mrc(dataset, tmp_path / "out", downsample=downsample, contrast="positive", batch_size=4)
    found = exported(tmp_path / "out")
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert found.dtype == ("f2" if dtype == "f2" and downsample is None else "f4")
    again = IndexedDataset(tmp_path / "out/particles.cs")
    assert (again.particles.sign == 1).all()
    np.testing.assert_array_equal(again.particles.uid, dataset.particles.uid)


def test_bright_particles_stay_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cs, images = write_particles(tmp_path / "source", N, box=BOX, blob__sign=np.ones(N, "f4"), **POSES)
    export_mrc(IndexedDataset(cs), tmp_path / "as stored")
    export_mrc(IndexedDataset(cs), tmp_path / "positive", contrast="positive")
    assert contents(tmp_path / "as stored") == contents(tmp_path / "positive")
    np.testing.assert_array_equal(exported(tmp_path / "positive"), images)
    assert not caplog.records


def test_a_star_file_of_dark_particles_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cs, _ = write_particles(tmp_path / "source", N, box=BOX, blob__sign=np.full(N, -1, "f4"), **POSES)
    export_mrc(IndexedDataset(cs), tmp_path / "a", star=False)
    export_mrc(IndexedDataset(cs), tmp_path / "b", contrast="positive")
    assert not caplog.records
    export_mrc(IndexedDataset(cs), tmp_path / "c")
    assert 'RELION takes particles to be bright: contrast="positive"' in caplog.text
    with pytest.raises(ExportExistsError):
        export_mrc(IndexedDataset(cs), tmp_path / "c", contrast="positive")  # which is another export


@pytest.mark.parametrize(
    ("sign", "told"),
    [
        (None, "no such column"),
        (np.zeros(N, "f4"), f"it is 0 in row 0, one of {N} such rows. Leave them out"),
        (np.array([1, -1, np.nan] + [1] * (N - 3), "f4"), "it is nan in row 2, one of 1 such rows. Leave them out"),
    ],
    ids=["no sign", "zeros", "one is NaN"],
)
def test_nothing_is_turned_where_the_contrast_is_not_known(tmp_path: Path, sign: np.ndarray | None, told: str) -> None:
    cs, _ = write_particles(tmp_path, N, box=BOX, **({} if sign is None else {"blob__sign": sign}))
    with pytest.raises(TableError, match=f"needs blob/sign, .*{told}"):
        export_mrc(IndexedDataset(cs), tmp_path / "out", contrast="positive")
    with pytest.raises(ArgumentError, match="contrast is one of"):
        export_mrc(IndexedDataset(cs), tmp_path / "out", contrast="white")  # type: ignore[arg-type]


def test_relion_predicts_the_images_that_were_turned(demo: DemoProject, tmp_path: Path) -> None:
    """CTF times projection, as RELION makes them of a positive density, resembles what was exported."""
    dataset = IndexedDataset(demo.indexed)
    export_mrc(dataset, tmp_path, contrast="positive", dtype="float32")
    with np.load(demo.truth) as file:
        truth = dict(file)
    projections = project_model(truth, truth["rotvec"], truth["shift_A"], dataset.box, dataset.pixel_size)
    ctf = ctf_values(dataset.particles.ctf, *half_plane(dataset.box, dataset.pixel_size))
    predicted = torch.fft.irfft2(torch.fft.rfft2(projections.double()) * ctf, s=projections.shape[-2:])
    ours = torch.from_numpy(exported(tmp_path))
    alike = [float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten()]))[0, 1]) for a, b in zip(ours, predicted, strict=True)]
    assert min(alike) > 0.1
    assert np.median(alike) > 0.25  # in noise
