"""CryoLike stacks: contents, grids, what happens to results that are there already, and what must not be written at all.

Numbers of defects are those of CryoLike in the list that the project keeps (section 2.3): each has a test that it is not repeated.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    centred,
    contents,
    ctf_columns,
    load_cryolike_stack,
    numbered_images,
    polar_images,
    stored_images,
    uids,
    write_stack,
    write_table,
)

from cryolike_data import Downsample, ImageDescriptor, IndexedDataset, ParticleDataset, ZarrDataset, export_cryolike, export_zarr, plots
from cryolike_data import convert_particle_stacks_from_indexed_cryosparc_file as convert
from cryolike_data.demo import DemoProject
from cryolike_data.errors import (
    ArgumentError,
    CryolikeDataError,
    ExportError,
    ExportExistsError,
    MissingDependencyError,
    MissingStackError,
    MixedParticlesError,
    TableError,
)
from cryolike_data.export import cryolike, plan_export
from cryolike_data.export.pixels import Pixels
from cryolike_data.transforms import PolarTransform

BOX, PIXEL_SIZE = 32, 2.0
GRID = ImageDescriptor.from_individual_values(BOX, PIXEL_SIZE, n_inplanes=8)
HALF_GRID = ImageDescriptor.from_individual_values(BOX // 2, 2 * PIXEL_SIZE, n_inplanes=8)


@pytest.fixture
def particles(demo: DemoProject) -> ParticleDataset:
    """The 37 particles of one exposure group."""
    return IndexedDataset(demo.indexed, select=lambda p: p.ctf.exposure_group == 0)


@pytest.fixture
def table(demo: DemoProject) -> np.ndarray:
    """The rows of the table that ``particles`` holds."""
    whole = np.load(demo.indexed, allow_pickle=False)
    return whole[whole["ctf/exp_group_id"] == 0]


@pytest.fixture
def images(demo: DemoProject, table: np.ndarray) -> np.ndarray:
    """The stored images of ``particles``, read by other means."""
    return stored_images(demo.folder, table)


def write_particles(folder: Path, images: np.ndarray, *, pixel_size: float = PIXEL_SIZE, with_uid: bool = True, **changes: Any) -> Path:
    """One stack and the table of its images in order; ``changes`` replace columns, None leaves one out."""
    n = len(images)
    write_stack(folder / "stack.mrc", images)
    columns = {"uid": uids(n)} if with_uid else {}
    columns |= {"blob__path": ["stack.mrc"] * n, "blob__idx": np.arange(n, dtype="u4"), "blob__psize_A": np.full(n, pixel_size, "f4")}
    columns |= {**ctf_columns(n), **changes}
    return write_table(folder / "particles.cs", **{name: column for name, column in columns.items() if column is not None})


def all_stacks(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """All stacks of a folder, one after the other; of the metadata, the columns that have a value for each particle."""
    stacks = [load_cryolike_stack(folder, number) for number in range(len(list((folder / "phys").iterdir())))]
    keys = ("defocusU", "defocusV", "defocusAngle", "phaseShift", "uid", "row")
    metadata = {key: np.concatenate([stack[2][key] for stack in stacks]) for key in keys}
    return np.concatenate([stack[0] for stack in stacks]), np.concatenate([stack[1] for stack in stacks]), metadata


def blocks(images: np.ndarray, factor: int) -> np.ndarray:
    """(N, D / factor, D / factor, factor * factor): the pixels of each block."""
    n, box = len(images), images.shape[-1] // factor
    return images.reshape(n, box, factor, box, factor).transpose(0, 1, 3, 2, 4).reshape(n, box, box, -1)


@contextmanager
def stopped(owner: Any, name: str, call: int, error: BaseException, told: type[BaseException] | None = None) -> Iterator[Any]:
    """An export, stack by stack, that fails because call number ``call`` (from 1) of a function, and all later ones, raise."""
    function, calls, threads = getattr(owner, name), iter(range(1, sys.maxsize)), torch.get_num_threads()

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) >= call:
            raise error
        return function(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, failing)
        torch.set_num_threads(1)  # one stack at a time
        try:
            with pytest.raises(told or type(error)) as caught:
                yield caught
        finally:
            torch.set_num_threads(threads)


# --- contents


def test_rows_keep_the_order_of_the_table(particles, table, images, tmp_path):
    export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    phys, _, metadata = all_stacks(tmp_path)
    np.testing.assert_allclose(phys, centred(images), atol=1e-6)
    np.testing.assert_array_equal(metadata["uid"], table["uid"])
    np.testing.assert_array_equal(metadata["defocusU"], table["ctf/df1_A"])


def test_rows_keep_the_order_of_a_selection(particles, table, images, tmp_path):
    rows = [30, 2, 17, 3]
    export_cryolike(particles.select(rows), tmp_path, descriptor=GRID)
    phys, _, metadata = load_cryolike_stack(tmp_path)
    np.testing.assert_allclose(phys, centred(images[rows]), atol=1e-6)
    np.testing.assert_array_equal(metadata["uid"], table["uid"][rows])


def test_stacks_of_many_images_keep_the_order(tmp_path):
    images = numbered_images(150, 8)
    path = write_particles(tmp_path, images)
    grid = ImageDescriptor.from_individual_values(8, PIXEL_SIZE, n_inplanes=8)
    export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=grid, batch_size=140)
    phys, fourier, _ = all_stacks(tmp_path / "out")
    expected = polar_images(centred(images), radius_max=2, n_inplanes=8)
    np.testing.assert_allclose(phys, centred(images), atol=1e-6)
    assert np.abs(fourier - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_stack_holds_a_batch_and_the_last_one_the_rest(particles, tmp_path):
    written = export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    assert written == [tmp_path / "fft" / f"particles_fourier_stack_{k:06d}.npz" for k in range(4)]
    assert [int(load_cryolike_stack(tmp_path, k)[2]["n_images"]) for k in range(4)] == [10, 10, 10, 7]


@pytest.mark.parametrize(("precision", "dtype", "tolerance"), [("single", np.complex64, 1e-5), ("double", np.complex128, 1e-9)])
def test_transforms_are_those_of_the_saved_images(particles, tmp_path, precision, dtype, tolerance):
    grid = ImageDescriptor.from_individual_values(BOX, PIXEL_SIZE, precision, n_inplanes=8)
    export_cryolike(particles, tmp_path, descriptor=grid)
    phys, fourier, metadata = load_cryolike_stack(tmp_path)
    expected = polar_images(phys, radius_max=BOX / 4, n_inplanes=8)
    assert fourier.dtype == dtype
    assert str(metadata["precision"]) == precision
    assert np.abs(fourier - expected).max() < tolerance * np.abs(expected).max()


def test_uid_and_row_lead_back_to_the_table(demo, particles, tmp_path):
    export_cryolike(particles, tmp_path, descriptor=GRID)
    metadata = load_cryolike_stack(tmp_path)[2]
    whole = np.load(demo.indexed, allow_pickle=False)
    assert metadata["uid"].dtype == np.uint64
    assert metadata["uid"].max() > 2**63
    np.testing.assert_array_equal(whole["uid"][metadata["row"]], metadata["uid"])
    np.testing.assert_array_equal(whole["ctf/exp_group_id"][metadata["row"]], 0)


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_nothing_that_is_written_needs_unpickling(particles, tmp_path, suffix):
    export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    files = sorted(tmp_path.rglob(f"*{suffix}"))
    assert len(files) == {".pt": 8, ".npz": 5}[suffix]
    for path in files:
        if suffix == ".pt":
            assert isinstance(torch.load(path, weights_only=True), torch.Tensor)
        else:
            with np.load(path, allow_pickle=False) as file:
                assert {file[key].dtype.hasobject for key in file.files} == {False}


@pytest.mark.parametrize("kind", ["phys", "fft"])
def test_tensors_are_saved_without_the_storage_of_their_neighbours(particles, tmp_path, kind):
    # Defect 1: torch.save of a view writes everything the view looks into.
    export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=4)
    for path in (tmp_path / kind).glob("*.pt"):
        tensor = torch.load(path, weights_only=True)
        payload = tensor.numel() * tensor.element_size()
        assert payload <= path.stat().st_size < payload + 4096


def test_defocus_u_is_the_larger_one_and_the_ctf_stays_the_same(tmp_path):
    # CryoLike takes |U - V|: rows with U < V would be turned by 90 degrees.
    u, v, angle = np.array([9000, 12000, 10000], "f4"), np.array([12000, 9000, 10000], "f4"), np.array([0.3, 0.3, -1.2], "f4")
    path = write_particles(tmp_path, numbered_images(3, BOX), ctf__df1_A=u, ctf__df2_A=v, ctf__df_angle_rad=angle)
    export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID)
    written = load_cryolike_stack(tmp_path / "out")[2]
    at = np.linspace(0, np.pi, 7)[:, None]
    assert (written["defocusU"] >= written["defocusV"]).all()
    assert written["defocusAngle"].dtype == np.float32
    defocus = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (at - angle))
    half_astigmatism = np.abs(written["defocusU"] - written["defocusV"]) / 2
    as_cryolike = (written["defocusU"] + written["defocusV"]) / 2 + half_astigmatism * np.cos(2 * (at - written["defocusAngle"]))
    np.testing.assert_allclose(as_cryolike, defocus, rtol=1e-6)


def test_the_same_export_writes_the_same_bytes(particles, tmp_path):
    for name in ("first", "second"):
        export_cryolike(particles, tmp_path / name, descriptor=GRID, batch_size=20)
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert [path for path in first | second if first.get(path) != second.get(path)] == []


def test_a_phase_shift_is_kept(tmp_path):
    phase_shift = np.array([0.1, 1.2, 0.7], "f4")
    path = write_particles(tmp_path, numbered_images(3, BOX), ctf__phase_shift_rad=phase_shift)
    export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID)
    np.testing.assert_array_equal(load_cryolike_stack(tmp_path / "out")[2]["phaseShift"], phase_shift)


def test_a_missing_phase_shift_is_none(tmp_path):
    path = write_particles(tmp_path, numbered_images(3, BOX), ctf__phase_shift_rad=None)
    export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID)
    assert load_cryolike_stack(tmp_path / "out")[2]["phaseShift"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("dtype", "order"), [("f2", "<"), ("i1", "<"), ("i2", "<"), ("u2", "<"), ("f4", ">"), ("i2", ">")])
def test_every_pixel_type_and_byte_order_is_converted(tmp_path, dtype, order):
    # Defect 18: integers and big-endian files fail.
    images = numbered_images(4, BOX, dtype=dtype)
    path = write_particles(tmp_path, images)
    write_stack(tmp_path / "stack.mrc", images, order=order)
    export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID)
    np.testing.assert_allclose(load_cryolike_stack(tmp_path / "out")[0], centred(images), atol=1e-6)


def test_the_files_that_are_read_stay_as_they_are(particles, demo, tmp_path):
    # Defect 20: centring in place, through a read-only map, ends the process.
    before = contents(demo.folder)
    export_cryolike(particles, tmp_path, descriptor=GRID)
    assert contents(demo.folder) == before


def test_a_zarr_store_of_the_particles_gives_the_same_stacks(particles, tmp_path):
    export_zarr(particles, tmp_path / "particles.zarr")
    export_cryolike(ZarrDataset(tmp_path / "particles.zarr"), tmp_path / "from_zarr", descriptor=GRID)
    export_cryolike(particles, tmp_path / "direct", descriptor=GRID)
    from_zarr, direct = load_cryolike_stack(tmp_path / "from_zarr"), load_cryolike_stack(tmp_path / "direct")
    np.testing.assert_array_equal(from_zarr[1], direct[1])
    for key in ("uid", "row", "defocusU", "defocusAngle", "voltage", "pixel_size"):
        np.testing.assert_array_equal(from_zarr[2][key], direct[2][key])


# --- constant images and NaN


def test_constant_images_give_zeros_and_a_warning_that_counts_them(tmp_path):
    # Defect 17: NaN without a word.
    images = numbered_images(5, BOX)
    images[[1, 3]] = [[[0.0]], [[7.3]]]
    path = write_particles(tmp_path, images)
    with pytest.warns(UserWarning, match="2 of 5 images are constant"):
        export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID)
    phys, fourier, _ = load_cryolike_stack(tmp_path / "out")
    assert np.flatnonzero((phys == 0).all(axis=(1, 2))).tolist() == [1, 3]
    assert np.flatnonzero((fourier == 0).all(axis=(1, 2))).tolist() == [1, 3]
    assert np.isfinite(phys).all()
    assert np.isfinite(fourier).all()


def test_the_warning_counts_the_constant_images_of_the_whole_export(tmp_path):
    images = numbered_images(140, 8)
    images[[0, 70, 139]] = 1.0
    path = write_particles(tmp_path, images)
    with pytest.warns(UserWarning, match="constant") as told:
        export_cryolike(
            IndexedDataset(path), tmp_path / "out", descriptor=ImageDescriptor.from_individual_values(8, PIXEL_SIZE), batch_size=100
        )
    assert [str(warning.message).split(" images")[0] for warning in told] == ["3 of 140"]


def test_a_nan_stays_within_its_own_image(tmp_path):
    images = numbered_images(4, BOX)
    images[2, 0, 0] = np.nan
    path = write_particles(tmp_path, images)
    with pytest.warns(UserWarning, match="1 of 4 images have pixels that are NaN or infinite"):
        export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID)
    phys, fourier, _ = load_cryolike_stack(tmp_path / "out")
    assert np.isfinite(phys[[0, 1, 3]]).all()
    assert np.isfinite(fourier[[0, 1, 3]]).all()


# --- grids and downsampling


@pytest.mark.parametrize("descriptor", [GRID, HALF_GRID], ids=["of the images as read", "of the images as written"])
@pytest.mark.parametrize("method", ["mean", "max", "fourier"])
def test_the_grid_follows_the_downsampling(particles, tmp_path, descriptor, method):
    # Defect 4: the npz keeps the grid of the images before downsampling, and the polar grid lies beyond their Nyquist frequency.
    export_cryolike(particles, tmp_path, descriptor=descriptor, downsample=Downsample(factor=2, method=method))
    phys, fourier, metadata = load_cryolike_stack(tmp_path)
    assert metadata["n_pixels"].tolist() == [BOX // 2, BOX // 2]
    assert metadata["pixel_size"].tolist() == [2 * PIXEL_SIZE, 2 * PIXEL_SIZE]
    assert metadata["radius_max"] == BOX / 2 / 4
    assert str(metadata["downsampling"]) == f"Downsample(factor=2, method={method!r})"
    assert phys.shape == (37, BOX // 2, BOX // 2)
    expected = polar_images(phys, radius_max=BOX / 2 / 4, n_inplanes=8)
    assert np.abs(fourier - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_box_that_does_not_divide_keeps_the_field_of_view(particles, tmp_path):
    export_cryolike(particles, tmp_path, descriptor=GRID, downsample=Downsample(box=20))
    metadata = load_cryolike_stack(tmp_path)[2]
    assert metadata["n_pixels"].tolist() == [20, 20]
    assert metadata["pixel_size"] * 20 == pytest.approx(BOX * PIXEL_SIZE)


def test_a_grid_that_stops_before_nyquist_keeps_its_extent(particles, tmp_path):
    coarse = ImageDescriptor.from_individual_values(BOX, PIXEL_SIZE, resolution_factor=0.25, n_inplanes=8)
    export_cryolike(particles, tmp_path, descriptor=coarse, downsample=Downsample(factor=2))
    assert load_cryolike_stack(tmp_path)[2]["radius_max"] == coarse.radius_max


@pytest.mark.parametrize("descriptor", [GRID, HALF_GRID], ids=["of the images as read", "of the images as written"])
def test_a_scalar_pixel_size_is_that_of_the_images_as_read(demo, table, tmp_path, descriptor):
    # Defect 5: a scalar pixel size overwrites that of the reduced grid, and the box shrinks to half.
    np.save(tmp_path / "group.npy", table)
    convert(
        descriptor,
        tmp_path / "group.npy",
        demo.folder / "J1/extract",
        folder_output=tmp_path,
        pixel_size=PIXEL_SIZE,
        downsample_factor=2,
        flag_plots=False,
    )
    metadata = load_cryolike_stack(tmp_path)[2]
    assert (metadata["n_pixels"] * metadata["pixel_size"]).tolist() == [BOX * PIXEL_SIZE, BOX * PIXEL_SIZE]


@pytest.mark.parametrize("pixel_size", ["", "two", 0, 1j], ids=repr)
def test_a_pixel_size_that_is_none_is_an_error_that_names_it(demo, table, tmp_path, pixel_size):
    np.save(tmp_path / "group.npy", table)
    with pytest.raises(ArgumentError, match="pixel_size is a positive number"):
        convert(GRID, tmp_path / "group.npy", demo.folder / "J1/extract", folder_output=tmp_path, pixel_size=pixel_size, flag_plots=False)


def test_the_descriptor_beside_the_stacks_is_that_of_their_grid(particles, tmp_path):
    export_cryolike(particles, tmp_path, descriptor=GRID, downsample=Downsample(factor=2))
    metadata = load_cryolike_stack(tmp_path)[2]
    with np.load(tmp_path / "fft" / "image_descriptor.npz", allow_pickle=False) as file:
        assert len(file.files) == 11
        for key in file.files:
            np.testing.assert_array_equal(file[key], metadata[key])


def test_a_descriptor_that_fits_neither_grid_is_refused_before_anything_is_written(particles, tmp_path):
    with pytest.raises(ArgumentError, match=r"64 px of 1\.3 A(.|\n)*32 px of 2 A(.|\n)*16 px of 4 A"):
        export_cryolike(
            particles,
            tmp_path / "out",
            descriptor=ImageDescriptor.from_individual_values(64, 1.3),
            downsample=Downsample(factor=2),
        )
    assert not (tmp_path / "out").exists()


def test_a_descriptor_of_another_kind_is_refused_with_the_remedy(particles, tmp_path):
    theirs = type("ImageDescriptor", (), {"__module__": "cryolike.metadata.image_descriptor"})()
    with pytest.raises(ArgumentError, match=r"not a cryolike\.metadata\.image_descriptor\.ImageDescriptor; .* save\(\)"):
        export_cryolike(particles, tmp_path / "out", descriptor=theirs)


def test_the_descriptor_file_of_the_caller_stays_as_it_is(particles, tmp_path):
    GRID.save(tmp_path / "params.npz")
    before = (tmp_path / "params.npz").read_bytes()
    export_cryolike(particles, tmp_path / "out", descriptor=tmp_path / "params.npz", downsample=Downsample(factor=2))
    assert (tmp_path / "params.npz").read_bytes() == before


def test_the_descriptor_object_of_the_caller_stays_as_it_is(particles, tmp_path):
    mine = ImageDescriptor.from_individual_values(BOX, PIXEL_SIZE, n_inplanes=8)
    export_cryolike(particles, tmp_path, descriptor=mine, downsample=Downsample(factor=2))
    assert mine == GRID


@pytest.mark.parametrize("factor", [3, 2, 2.0, np.int64(4)])
def test_downsampling_by_any_factor_that_divides_takes_whole_blocks(tmp_path, factor):
    # Defect 19: an odd factor, and 2.0, are refused.
    images = numbered_images(3, 24)
    path = write_particles(tmp_path, images)
    convert(
        ImageDescriptor.from_individual_values(24, PIXEL_SIZE, n_inplanes=8),
        path,
        folder_output=tmp_path / "out",
        downsample_factor=factor,
        flag_plots=False,
    )
    np.testing.assert_allclose(load_cryolike_stack(tmp_path / "out")[0], centred(blocks(images, int(factor)).mean(axis=-1)), atol=1e-6)


def test_downsample_type_max_takes_the_largest_pixel(tmp_path):
    images = numbered_images(3, BOX)
    path = write_particles(tmp_path, images)
    convert(GRID, path, folder_output=tmp_path / "out", downsample_factor=2, downsample_type="max", flag_plots=False)
    np.testing.assert_allclose(load_cryolike_stack(tmp_path / "out")[0], centred(blocks(images, 2).max(axis=-1)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"downsample_factor": 5}, "does not divide a box of 32 pixels; factors that do: 1, 2, 4, 8, 16, 32"),
        ({"downsample_factor": 0}, "downsample_factor"),
        ({"downsample_factor": -2}, "downsample_factor"),
        ({"downsample_factor": 1.5}, "factor=1.5"),
        ({"downsample_factor": True}, "downsample_factor"),
        ({"downsample_factor": float("nan")}, "factor=nan"),
        ({"downsample_factor": "2"}, "factor"),
        ({"downsample_factor": None}, "factor"),
        ({"downsample_factor": 2, "downsample_type": "median"}, "median"),
        ({"downsample_factor": 1, "downsample_type": "median"}, "median"),
    ],
    ids=str,
)
def test_a_downsampling_that_cannot_be_is_refused_before_anything_is_written(tmp_path, options, told):
    # Defect 19: zero and negative factors, and unknown types, pass in silence; a remainder is dropped.
    path = write_particles(tmp_path, numbered_images(3, BOX))
    with pytest.raises(ArgumentError, match=told):
        convert(GRID, path, folder_output=tmp_path / "out", flag_plots=False, **options)
    assert not (tmp_path / "out").exists()


# --- results that are there already


@pytest.mark.parametrize("batch_size", [10, 25])
def test_a_second_run_into_the_folder_is_refused_before_anything_changes(particles, tmp_path, batch_size):
    # Defect 16: the tensors are replaced, then the npz is refused.
    export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    before = contents(tmp_path)
    with pytest.raises(ExportExistsError, match=r"particles is 37 there and 20 here.*settings\.box is 32 there and 16.*overwrite=True"):
        export_cryolike(particles.select(slice(0, 20)), tmp_path, descriptor=HALF_GRID, downsample=Downsample(2), batch_size=batch_size)
    assert contents(tmp_path) == before


def test_overwriting_leaves_nothing_of_the_run_before(particles, tmp_path):
    export_cryolike(particles, tmp_path / "out", descriptor=GRID, batch_size=5, plots=False)
    (tmp_path / "out" / "plots").mkdir()
    (tmp_path / "out" / "plots" / "power_spectrum_stack_000003.png").touch()
    export_cryolike(particles, tmp_path / "out", descriptor=GRID, batch_size=20, overwrite=True)
    export_cryolike(particles, tmp_path / "fresh", descriptor=GRID, batch_size=20)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_overwriting_keeps_what_is_not_a_stack(particles, tmp_path):
    mine = ["phys/notes.txt", "thesis.tex", "params/image_descriptor.npz"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name} is mine")
    export_cryolike(particles, tmp_path, descriptor=GRID)
    export_cryolike(particles, tmp_path, descriptor=GRID, overwrite=True)
    assert {name: (tmp_path / name).read_text() for name in mine} == {name: f"{name} is mine" for name in mine}


def test_stacks_of_another_program_are_not_replaced_unless_asked(particles, tmp_path):
    (tmp_path / "out/phys").mkdir(parents=True)
    (tmp_path / "out/phys/particles_phys_stack_000007.pt").write_text("of CryoLike")
    before = contents(tmp_path)
    with pytest.raises(ExportExistsError, match=r"did not write \(phys/particles_phys_stack_000007\.pt.*overwrite=True"):
        export_cryolike(particles, tmp_path / "out", descriptor=GRID)
    assert contents(tmp_path) == before
    export_cryolike(particles, tmp_path / "out", descriptor=GRID, overwrite=True)
    export_cryolike(particles, tmp_path / "fresh", descriptor=GRID)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("options", [{"descriptor": ImageDescriptor.from_individual_values(64, 1.3)}, {"batch_size": 0}], ids=str)
def test_an_overwriting_run_that_cannot_start_leaves_the_old_results(particles, tmp_path, options):
    export_cryolike(particles, tmp_path, descriptor=GRID)
    before = contents(tmp_path)
    with pytest.raises(ArgumentError):
        export_cryolike(particles, tmp_path, **{"descriptor": GRID, "overwrite": True, **options})
    assert contents(tmp_path) == before


def test_without_finufft_an_overwriting_run_leaves_the_old_results(particles, tmp_path, monkeypatch):
    export_cryolike(particles, tmp_path, descriptor=GRID)
    before = contents(tmp_path)
    monkeypatch.setitem(sys.modules, "finufft", None)
    with pytest.raises(MissingDependencyError):
        export_cryolike(particles, tmp_path, descriptor=GRID, overwrite=True)
    assert contents(tmp_path) == before


STOPS = {
    "while reading": (Pixels, "pieces", KeyboardInterrupt(), None),
    "while transforming": (PolarTransform, "__call__", MemoryError(), None),
    "while writing": (os, "replace", OSError(28, "No space left on device"), ExportError),
    "before the npz": (cryolike, "_npz", KeyboardInterrupt(), None),
}


@pytest.mark.parametrize("where", STOPS)
def test_a_stopped_run_is_not_sealed_and_leaves_no_partial_files(particles, tmp_path, where):
    owner, name, error, told = STOPS[where]
    with stopped(owner, name, 3, error, told):
        export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    found = contents(tmp_path)
    assert "export.json" not in found
    assert [path for path in found if "partial/" in path] == []


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("call", [2, 3])
@pytest.mark.parametrize("where", STOPS)
def test_the_same_call_after_a_stop_ends_as_one_that_was_not_stopped(particles, tmp_path, where, call, overwrite):
    owner, name, error, told = STOPS[where]
    with stopped(owner, name, call, error, told):
        export_cryolike(particles, tmp_path / "stopped", descriptor=GRID, batch_size=10, overwrite=overwrite)
    export_cryolike(particles, tmp_path / "stopped", descriptor=GRID, batch_size=10, overwrite=overwrite)
    export_cryolike(particles, tmp_path / "whole", descriptor=GRID, batch_size=10)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_an_error_of_writing_names_the_file_and_the_reason(particles, tmp_path):
    with stopped(os, "replace", 7, OSError(28, "No space left on device"), ExportError) as caught:
        export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    told = r"particles_(phys|fourier)_stack_000001\.pt cannot be written: No space left on device.*run the same export again to continue"
    caught.match(told)


DAMAGES = {
    "an npz that is gone": ("fft/particles_fourier_stack_000001.npz", None),
    "an npz that is empty": ("fft/particles_fourier_stack_000001.npz", 0),
    "an npz that is cut short": ("fft/particles_fourier_stack_000001.npz", 100),
    "images that are cut short": ("phys/particles_phys_stack_000001.pt", 3000),
    "transforms that are gone": ("fft/particles_fourier_stack_000001.pt", None),
    "one bit of the images": ("phys/particles_phys_stack_000001.pt", -2000),
    "one bit of the transforms": ("fft/particles_fourier_stack_000001.pt", -3000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_export_that_was_damaged_is_whole_after_the_same_call(particles, tmp_path, damage):
    # What a power cut leaves: renaming was done, the bytes did not all reach the disk.
    export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    before, inodes = contents(tmp_path), {path: path.stat().st_ino for path in tmp_path.rglob("*.[np][pt]*")}
    path, length = tmp_path / DAMAGES[damage][0], DAMAGES[damage][1]
    content = path.read_bytes()
    if length is None:
        path.unlink()
    elif length >= 0:
        path.write_bytes(content[:length])
    else:
        path.write_bytes(content[:length] + bytes([content[length] ^ 1]) + content[length + 1 :])
    export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    assert contents(tmp_path) == before
    others = {path: inode for path, inode in inodes.items() if "000001" not in path.name}
    assert len(others) > 9
    assert {path: path.stat().st_ino for path in others} == others


def test_a_finished_export_that_is_whole_is_not_written_again(particles, tmp_path):
    written = export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")}
    assert export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10) == written
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")} == before


def test_stacks_that_are_whole_are_not_written_again(particles, tmp_path):
    with stopped(Pixels, "pieces", 3, KeyboardInterrupt()):
        export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*.pt")}
    assert len(before) == 4
    assert len(export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)) == 4
    assert {path: path.stat().st_ino for path in before} == before


def test_an_overwriting_run_writes_a_finished_export_anew(particles, tmp_path):
    export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10)
    before, inodes = contents(tmp_path), {path.stat().st_ino for path in tmp_path.rglob("*.*")}
    (tmp_path / "phys/particles_phys_stack_000001.pt").write_bytes(b"damaged")
    export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10, overwrite=True)
    assert contents(tmp_path) == before
    assert inodes != {path.stat().st_ino for path in tmp_path.rglob("*.*")}


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (slice(None), {"batch_size": 12}),
        (slice(None), {"n_stacks_max": 1}),
        (slice(None, None, -1), {}),
        (slice(1, None), {}),
        (slice(None), {"descriptor": ImageDescriptor.from_individual_values(BOX, PIXEL_SIZE, n_inplanes=16)}),
        (slice(None), {"descriptor": ImageDescriptor.from_individual_values(BOX, PIXEL_SIZE, "double", n_inplanes=8)}),
        (slice(None), {"descriptor": HALF_GRID, "downsample": Downsample(2)}),
        (slice(None), {"fourier": False}),
    ],
    ids=["batch size", "fewer stacks", "order", "particles", "polar grid", "precision", "downsampling", "no transforms"],
)
@pytest.mark.parametrize("there", ["finished", "stopped"])
def test_the_results_of_another_run_are_not_replaced_unless_asked(particles, tmp_path, rows, options, there):
    ours = {"descriptor": GRID, "batch_size": 10}
    if there == "finished":
        export_cryolike(particles, tmp_path / "out", **ours)
    else:
        with stopped(Pixels, "pieces", 3, KeyboardInterrupt()):
            export_cryolike(particles, tmp_path / "out", **ours)
    before = contents(tmp_path)
    with pytest.raises(ExportExistsError, match=r"(there and|differ).*overwrite=True"):
        export_cryolike(particles.select(rows), tmp_path / "out", **(ours | options))
    assert contents(tmp_path) == before
    export_cryolike(particles.select(rows), tmp_path / "out", **(ours | options), overwrite=True)
    export_cryolike(particles.select(rows), tmp_path / "fresh", **(ours | options))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_another_way_to_downsample_is_another_export(particles, tmp_path):
    export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10, downsample=Downsample(2, method="mean"))
    with pytest.raises(ExportExistsError, match=r"settings\.downsample\.method is 'mean' there and 'fourier' here"):
        export_cryolike(particles, tmp_path, descriptor=GRID, batch_size=10, downsample=Downsample(2, method="fourier"))


def test_refined_optics_make_another_export(tmp_path):
    path = write_particles(tmp_path, numbered_images(6, BOX))
    export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID, batch_size=3)
    write_particles(tmp_path, numbered_images(6, BOX), ctf__df1_A=np.full(6, 17000, "f4"))
    with pytest.raises(ExportExistsError, match="the particles or their order, optics or poses differ"):
        export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID, batch_size=3)


def test_other_particles_make_another_export_where_tables_have_no_uids(tmp_path):
    ours = write_particles(tmp_path / "a", numbered_images(6, BOX), with_uid=False)
    others = write_particles(tmp_path / "b", numbered_images(6, BOX, start=1), with_uid=False)
    export_cryolike(IndexedDataset(ours), tmp_path / "out", descriptor=GRID, batch_size=3)
    with pytest.raises(ExportExistsError, match=r"the input stacks .* differ"):
        export_cryolike(IndexedDataset(others), tmp_path / "out", descriptor=GRID, batch_size=3)


def test_a_run_stopped_while_drawing_is_continued_to_the_last_picture(tmp_path, monkeypatch):
    path = write_particles(tmp_path, numbered_images(4, 8))
    options = {"descriptor": ImageDescriptor.from_individual_values(8, PIXEL_SIZE, n_inplanes=8), "batch_size": 2, "plots": True}
    drawn = []

    def plot(phys: Any, fourier: Any, grid: Any, folder: Path, number: int) -> None:
        drawn.append(number)
        (folder / f"power_spectrum_stack_{number:06d}.png").touch()

    monkeypatch.setattr("cryolike_data.plots.plot_stack", plot)
    with stopped(plots, "plot_stack", 2, KeyboardInterrupt()):
        export_cryolike(IndexedDataset(path), tmp_path / "out", **options)
    assert drawn == [0]
    export_cryolike(IndexedDataset(path), tmp_path / "out", **options)
    assert drawn == [0, 1]
    assert sorted(path.name for path in (tmp_path / "out/plots").iterdir()) == [f"power_spectrum_stack_{k:06d}.png" for k in (0, 1)]


# --- the same with CryoLike's own parameters


def convert_all(path: Path, folder: Path, **options: Any) -> None:
    convert(GRID, path, folder_output=folder, batch_size=4, flag_plots=False, **options)


@pytest.mark.parametrize("skip_exist", [False, True])
def test_a_stopped_conversion_is_continued(tmp_path, skip_exist):
    path = write_particles(tmp_path, numbered_images(6, BOX))
    with stopped(Pixels, "pieces", 2, KeyboardInterrupt()):
        convert_all(path, tmp_path / "out", skip_exist=skip_exist)
    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.pt")}
    assert len(before) == 2
    convert_all(path, tmp_path / "out", skip_exist=skip_exist)
    np.testing.assert_allclose(all_stacks(tmp_path / "out")[0], centred(numbered_images(6, BOX)), atol=1e-6)
    assert {path: path.stat().st_ino for path in before} == before


def test_a_finished_conversion_is_an_error_and_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_particles(tmp_path, numbered_images(6, BOX))
    convert_all(path, tmp_path / "out")
    before = contents(tmp_path)
    (entry,) = (entry for entry in os.scandir(tmp_path) if entry.name == "out")
    for folder in (tmp_path / "out", "~/out", entry):
        with pytest.raises(ExportExistsError, match=r"export\.json.*skip_exist=True.*overwrite=True"):
            convert_all(path, folder)
    assert contents(tmp_path) == before


def test_skip_exist_keeps_a_finished_conversion_and_mends_it(tmp_path):
    path = write_particles(tmp_path, numbered_images(6, BOX))
    convert_all(path, tmp_path / "out")
    before, kept = contents(tmp_path), (tmp_path / "out/phys/particles_phys_stack_000000.pt").stat().st_ino
    (tmp_path / "out/phys/particles_phys_stack_000001.pt").write_bytes(b"half of it")
    convert_all(path, tmp_path / "out", skip_exist=True)
    assert contents(tmp_path) == before
    assert (tmp_path / "out/phys/particles_phys_stack_000000.pt").stat().st_ino == kept


def test_skip_exist_does_not_mix_two_conversions(tmp_path):
    path = write_particles(tmp_path, numbered_images(6, BOX))
    convert_all(path, tmp_path / "out", n_stacks_max=1)
    before = contents(tmp_path)
    with pytest.raises(ExportExistsError, match="particles is 4 there and 6 here"):
        convert_all(path, tmp_path / "out", skip_exist=True)
    assert contents(tmp_path) == before


def test_a_finished_conversion_is_replaced_when_asked(tmp_path):
    path = write_particles(tmp_path, numbered_images(6, BOX))
    convert_all(path, tmp_path / "out", n_stacks_max=1)
    convert_all(path, tmp_path / "out", overwrite=True)
    np.testing.assert_allclose(all_stacks(tmp_path / "out")[0], centred(numbered_images(6, BOX)), atol=1e-6)


# --- what cannot be exported


def test_mixed_optics_are_refused_before_anything_is_written(demo, tmp_path):
    with pytest.raises(MixedParticlesError, match=r"(?s)200\.0: 23 particles.*300\.0: 37 particles"):
        export_cryolike(IndexedDataset(demo.indexed), tmp_path / "out", descriptor=GRID)
    assert not (tmp_path / "out").exists()


def test_what_the_error_on_mixed_optics_says_can_be_done(demo, tmp_path):
    dataset = IndexedDataset(demo.indexed)
    with pytest.raises(MixedParticlesError) as caught:
        export_cryolike(dataset, tmp_path / "out", descriptor=GRID)
    calls = re.findall(r"dataset\.select\(lambda p: .*\)$", str(caught.value), re.MULTILINE)
    assert len(calls) == 2
    groups = [eval(call, {"np": np, "dataset": dataset}) for call in calls]
    for number, group in enumerate(groups):
        export_cryolike(group, tmp_path / f"group{number}", descriptor=GRID)
    assert sum(len(load_cryolike_stack(tmp_path / f"group{number}")[0]) for number in range(2)) == len(dataset)


@pytest.mark.parametrize(("name", "values"), [("accel_kv", (300, 200)), ("cs_mm", (2.7, 0.01)), ("amp_contrast", (0.07, 0.1))])
def test_any_optics_that_differ_within_a_stack_are_refused(tmp_path, name, values):
    column = np.full(6, values[0], "f4")
    column[-1] = values[1]
    path = write_particles(tmp_path, numbered_images(6, BOX), **{f"ctf__{name}": column})
    with pytest.raises(MixedParticlesError, match=r"stack 2 \(rows 4 to 5\)"):
        export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID, batch_size=2)
    assert not (tmp_path / "out").exists()


def test_mixed_optics_late_in_a_large_table_are_named_by_stack_and_rows(tmp_path):
    # Beyond what is looked at together, and stacks of a size that does not divide that.
    voltage = np.full(20000, 300, "f4")
    voltage[17502:] = 200
    path = write_particles(tmp_path, numbered_images(20000, 4), ctf__accel_kv=voltage)
    grid = ImageDescriptor.from_individual_values(4, PIXEL_SIZE, n_inplanes=8)
    with pytest.raises(MixedParticlesError, match=r"stack 17 \(rows 17017 to 18017\)"):
        export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=grid, batch_size=1001)


def test_optics_may_change_between_stacks_of_a_large_table(tmp_path):
    voltage = np.where(np.arange(20000) < 17 * 1001, 300, 200).astype("f4")
    path = write_particles(tmp_path, numbered_images(20000, 4), ctf__accel_kv=voltage)
    grid = ImageDescriptor.from_individual_values(4, PIXEL_SIZE, n_inplanes=8)
    assert len(plan_export(IndexedDataset(path), tmp_path / "out", format="cryolike", descriptor=grid, batch_size=1001)) == 20


def test_optics_may_differ_from_stack_to_stack(tmp_path):
    voltage = np.array([300, 300, 200, 200], "f4")
    path = write_particles(tmp_path, numbered_images(4, BOX), ctf__accel_kv=voltage)
    export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID, batch_size=2)
    assert [float(load_cryolike_stack(tmp_path / "out", k)[2]["voltage"]) for k in range(2)] == [300, 200]


def test_a_table_without_optics_is_refused_with_the_remedy(tmp_path):
    path = write_particles(tmp_path, numbered_images(4, BOX), **dict.fromkeys(ctf_columns(4)))
    with pytest.raises(TableError, match="passthrough="):
        export_cryolike(IndexedDataset(path), tmp_path / "out", descriptor=GRID)
    assert not (tmp_path / "out").exists()


def test_without_finufft_the_error_names_the_extra(particles, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "finufft", None)
    with pytest.raises(MissingDependencyError, match=re.escape('pip install "cryolike-data[fourier]", or write the images alone with')):
        export_cryolike(particles, tmp_path / "out", descriptor=GRID)
    assert not list(tmp_path.rglob("*.pt"))


def test_without_matplotlib_a_run_with_pictures_is_refused_before_anything_is_written(particles, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingDependencyError, match=re.escape("cryolike-data[plot]")):
        export_cryolike(particles, tmp_path / "out", descriptor=GRID, plots=True)
    assert not (tmp_path / "out").exists()


def test_the_pictures_are_of_the_images_and_transforms_that_were_written(particles, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("cryolike_data.plots.plot_stack", lambda images, transforms, *rest: drawn.extend((images, transforms)))
    export_cryolike(particles, tmp_path, descriptor=GRID, plots=True)
    phys, fourier, _ = load_cryolike_stack(tmp_path)
    for shown, saved in zip(drawn, (phys, fourier), strict=True):
        np.testing.assert_array_equal(shown, saved)


def test_an_empty_selection_is_refused(particles, tmp_path):
    with pytest.raises(CryolikeDataError):
        export_cryolike(particles.select([]), tmp_path, descriptor=GRID)


def test_a_file_in_the_place_of_the_folder_is_refused(particles, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CryolikeDataError, match="out"):
        export_cryolike(particles, tmp_path / "out", descriptor=GRID)
    assert (tmp_path / "out").read_text() == "a file"


def test_a_missing_descriptor_file_is_named(particles, tmp_path):
    with pytest.raises(MissingStackError, match=r"absent\.npz"):
        export_cryolike(particles, tmp_path / "out", descriptor=tmp_path / "absent.npz")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -3}, {"n_stacks_max": 0}, {"n_stacks_max": -2}], ids=str)
def test_counts_that_make_no_sense_are_refused(particles, tmp_path, options):
    with pytest.raises(ArgumentError, match=f"{next(iter(options))} is at least 1"):
        export_cryolike(particles, tmp_path / "out", descriptor=GRID, **options)
    assert not (tmp_path / "out").exists()


def test_a_grid_beyond_nyquist_is_written_as_it_is_with_a_warning(particles, tmp_path, caplog):
    for grid, told in (GRID, False), (replace(GRID, radius_max=1.5 * GRID.radius_max), True):
        export_cryolike(particles, tmp_path / f"out {told}", descriptor=grid)
        assert ("beyond 8, the Nyquist frequency of 32 pixels, where there are only aliases" in caplog.text) == told
    caplog.clear()
    export_cryolike(particles, tmp_path / "images", descriptor=grid, fourier=False)
    assert "Nyquist" not in caplog.text


def test_dark_particles_become_bright_ones(particles, tmp_path, caplog):
    one = particles.select(lambda p: p.ctf.voltage_kv == 300)
    assert (one.particles.sign == -1).all()
    descriptor = ImageDescriptor.from_individual_values(n_pixels=one.box, pixel_size=one.pixel_size)
    export_cryolike(one, tmp_path / "dark", descriptor=descriptor, batch_size=16)
    assert "The cross-correlation of CryoLike takes particles to be bright" in caplog.text
    caplog.clear()
    export_cryolike(one, tmp_path / "bright", descriptor=descriptor, batch_size=16, contrast="positive")
    assert not caplog.records
    for dark, bright in zip(all_stacks(tmp_path / "dark")[:2], all_stacks(tmp_path / "bright")[:2], strict=True):
        np.testing.assert_allclose(bright, -dark, rtol=0, atol=1e-5 * np.abs(dark).max())
