"""One test for each defect of CryoLike's own readers; the numbers are those of the list that the project keeps of them."""

from __future__ import annotations

import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import ctf_columns, numbered_images, uids, write_job, write_particles, write_stack, write_table

from cryolike_data import IndexedDataset, JobDirectoryDataset
from cryolike_data.errors import ArgumentError, MissingStackError, MixedParticlesError, PairingError, RowIndexError, StackError

N = 6


# CryoLike defect 10: voltage, Cs, amplitude contrast and pixel size of row 0 stand for all rows
def test_optics_of_each_row_are_its_own(tmp_path: Path) -> None:
    kv, cs_mm, w = np.array([300, 200] * 3, "f4"), np.array([2.7, 1.4] * 3, "f4"), np.linspace(0.07, 0.12, N).astype("f4")
    cs, _ = write_particles(tmp_path, N, ctf__accel_kv=kv, ctf__cs_mm=cs_mm, ctf__amp_contrast=w)
    ctf = IndexedDataset(cs).batch([5, 0, 2]).ctf
    np.testing.assert_array_equal(ctf.voltage_kv.numpy(), kv[[5, 0, 2]])
    np.testing.assert_array_equal(ctf.spherical_aberration_mm.numpy(), cs_mm[[5, 0, 2]])
    np.testing.assert_array_equal(ctf.amplitude_contrast.numpy(), w[[5, 0, 2]])


# CryoLike defect 10
def test_the_pixel_size_of_row_0_does_not_stand_for_all_rows(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, blob__psize_A=np.array([1.3] * 5 + [1.4], "f4"))
    with pytest.raises(MixedParticlesError, match=r"pixel_size 1\.4: 1 particles"):
        IndexedDataset(cs)


# CryoLike defect 11: a missing stack is skipped with a line of text
def test_a_missing_stack_is_an_error_and_is_not_skipped(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=3)
    (tmp_path / "J1/extract/stack_2.mrc").unlink()
    with pytest.raises(MissingStackError, match=r"stack_2\.mrc \(2 rows\)"):
        IndexedDataset(cs)


# CryoLike defect 12: equal file names in two folders are read from one file
def test_equal_file_names_in_two_jobs_are_two_stacks(tmp_path: Path) -> None:
    images = [numbered_images(2, 8, start=job) for job in (1, 2)]
    for job in (1, 2):
        write_stack(tmp_path / f"J{job}/extract/a.mrc", images[job - 1])
    columns = {"uid": uids(4), "blob__idx": np.array([0, 0, 1, 1], "u4"), "blob__psize_A": np.ones(4, "f4")}
    cs = write_table(tmp_path / "J3/t.cs", blob__path=["J1/extract/a.mrc", "J2/extract/a.mrc"] * 2, **columns)
    expected = np.stack([images[0][0], images[1][0], images[0][1], images[1][1]])
    np.testing.assert_array_equal(IndexedDataset(cs).read(range(4)).numpy(), expected)
    with pytest.raises(ArgumentError, match="same file"):
        IndexedDataset(cs, folder=tmp_path / "J1/extract")


# CryoLike defect 13: without a folder neither absolute nor relative paths work
@pytest.mark.parametrize("prefix", ["", ">", "absolute"])
def test_paths_work_without_a_folder(tmp_path: Path, prefix: str) -> None:
    cs, images = write_particles(tmp_path, N)
    start = f"{tmp_path}/" if prefix == "absolute" else prefix
    cs, _ = write_particles(tmp_path, N, blob__path=[start + path.decode() for path in np.load(cs)["blob/path"].tolist()])
    np.testing.assert_array_equal(IndexedDataset(cs).read(range(N)).numpy(), images)


# CryoLike defect 13: "~" is not expanded
def test_a_folder_in_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cs, images = write_particles(tmp_path, N)
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(IndexedDataset(cs, folder="~/J1/extract").read(range(N)).numpy(), images)


# CryoLike defect 14: a stack that one row alone refers to is a TypeError
@pytest.mark.parametrize("images_in_stack", [1, 5])
def test_a_stack_that_one_row_refers_to_is_read(tmp_path: Path, images_in_stack: int) -> None:
    images = numbered_images(images_in_stack, 8)
    write_stack(tmp_path / "a.mrc", images)
    cs = write_table(
        tmp_path / "t.cs", uid=uids(1), blob__path=["a.mrc"], blob__idx=np.array([images_in_stack - 1], "u4"), **ctf_columns(1)
    )
    ds = IndexedDataset(cs, pixel_size=1.5)
    np.testing.assert_array_equal(ds.read([0]).numpy(), images[-1:])
    assert ds.batch([0]).images.shape == (1, 8, 8)


# CryoLike defect 15: surplus rows and stacks beyond a gap are ignored without a word
@pytest.mark.parametrize("problem", ["rows", "gap"])
def test_surplus_rows_and_stacks_beyond_a_gap_are_said(tmp_path: Path, problem: str) -> None:
    rows = 7 if problem == "rows" else 5
    job, images = write_job(tmp_path, 4, [2, 3], uid=uids(rows), **ctf_columns(rows))
    if problem == "gap":
        (job / "restack/batch_000001_restacked.mrc").rename(job / "restack/batch_000002_restacked.mrc")
    with pytest.warns(UserWarning, match=f"{rows} rows and .* {2 if problem == 'gap' else 5} images"):
        ds = JobDirectoryDataset(tmp_path, 4)
    np.testing.assert_array_equal(ds.read(range(len(ds))).numpy(), images[: len(ds)])


# CryoLike defect 15: too few rows are found out after part of the output is written
def test_too_few_rows_are_an_error_before_any_image_is_read(tmp_path: Path) -> None:
    write_job(tmp_path, 4, [2, 3], uid=uids(4), **ctf_columns(4))
    with pytest.raises(PairingError, match=r"4 rows and .* 5 images"):
        JobDirectoryDataset(tmp_path, 4)


# CryoLike defect 18: 8-bit and 16-bit integers and big-endian files fail
@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "f2", "f4"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_pixel_type_and_byte_order_is_read(tmp_path: Path, dtype: str, order: str) -> None:
    cs, images = write_particles(tmp_path, N, dtype=dtype, order=order)
    np.testing.assert_array_equal(IndexedDataset(cs).read(range(N)).numpy(), images)


# CryoLike defect 18: mixed box sizes are a RuntimeError on concatenation
def test_mixed_box_sizes_are_an_error_that_names_the_groups(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrc", numbered_images(1, 8))
    write_stack(tmp_path / "b.mrc", numbered_images(1, 12))
    cs = write_table(tmp_path / "t.cs", uid=uids(2), blob__path=["a.mrc", "b.mrc"], blob__idx=np.zeros(2, "u4"))
    with pytest.raises(MixedParticlesError, match=r"box 8: 1 particles(.|\n)*box 12: 1 particles"):
        IndexedDataset(cs, pixel_size=1.5)


# CryoLike defect 18: an image number beyond the stack is found out after earlier stacks are processed
def test_an_image_number_beyond_its_stack_is_an_error_before_any_image_is_read(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=1, blob__idx=np.array([0, 1, 2, 3, 4, 6], "u4"))
    with pytest.raises(StackError, match="has 6 images, 0 to 5; image 6 is asked for"):
        IndexedDataset(cs)


# CryoLike defect 18
def test_a_row_beyond_the_data_set_is_an_index_error(tmp_path: Path) -> None:
    ds = IndexedDataset(write_particles(tmp_path, N)[0])
    with pytest.raises(RowIndexError, match="there are 6 rows"):
        ds.read([0, 6])


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A limit of 300 MB on the memory that the process may add to what it has; mapped files do not count."""
    used = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 300 * 2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# CryoLike defect 21: every stack is read and copied whole
def test_one_image_of_a_stack_of_16_gigabytes_costs_one_image(tmp_path: Path, little_memory: None) -> None:
    box, count = 64, 1_000_000
    image = numbered_images(1, box)[0]
    path = write_stack(tmp_path / "huge.mrc", image[None])
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<i", count))
        file.seek(1024 + (count - 1) * image.nbytes)
        file.write(image.tobytes())
    assert path.stat().st_size > 16e9
    columns = {"uid": uids(3), "blob__psize_A": np.ones(3, "f4")}
    cs = write_table(tmp_path / "t.cs", blob__path=["huge.mrc"] * 3, blob__idx=np.array([count - 1, 0, 500_000], "u4"), **columns)
    found = IndexedDataset(cs).read([0, 1, 2]).numpy()
    np.testing.assert_array_equal(found, np.stack([image, image, np.zeros_like(image)]))
