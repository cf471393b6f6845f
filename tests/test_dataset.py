from __future__ import annotations

import pickle
import pydoc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ctf_columns, uids, write_particles
from torch.utils.data import Dataset

from cryolike_data import IndexedDataset, JobDirectoryDataset, Particle, ParticleBatch, ParticleDataset, Particles
from cryolike_data.demo import DemoProject
from cryolike_data.errors import ArgumentError, RowIndexError

N, BOX = 7, 8
POSE = np.arange(3 * N, dtype="f4").reshape(N, 3)
SHIFT = np.arange(2 * N, dtype="f4").reshape(N, 2)
ALIGNMENTS = {
    "alignments3D__pose": POSE,
    "alignments3D__shift": SHIFT,
    "alignments3D__psize_A": np.full(N, 2, "f4"),
    "alignments3D__split": np.array([0, 1, 0, 1, 0, 1, 0], "u4"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A table with optics and poses, and its images."""
    return write_particles(tmp_path_factory.mktemp("data"), N, box=BOX, **ALIGNMENTS)


def equal(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found.numpy(), expected)


def test_it_is_a_dataset_with_particles_box_and_pixel_size(ds: IndexedDataset) -> None:
    assert isinstance(ds, Dataset)
    assert isinstance(ds.particles, Particles)
    assert (len(ds), ds.box, ds.pixel_size, ds.dtype) == (N, BOX, 1.5, torch.float32)


# Single particles


@pytest.mark.parametrize(
    ("key", "row"),
    [(0, 0), (6, 6), (-1, 6), (-7, 0), (np.int64(3), 3), (np.uint8(3), 3), (torch.tensor(3), 3), (np.array(-2), 5)],
    ids=["first", "last", "minus one", "minus n", "int64", "uint8", "0-d tensor", "0-d array"],
)
def test_an_integer_of_any_kind_gives_that_particle(ds: IndexedDataset, images: np.ndarray, key: Any, row: int) -> None:
    particle = ds[key]
    assert isinstance(particle, Particle)
    assert particle.index == row
    equal(particle.image, images[row])


@pytest.mark.parametrize("key", [7, -8, 10**12])
def test_an_integer_out_of_range_is_an_index_error(ds: IndexedDataset, key: int) -> None:
    with pytest.raises(IndexError, match=f"particle {key} is out of range: there are 7"):
        ds[key]


def test_iterating_ends_after_the_last_particle(ds: IndexedDataset) -> None:
    assert [particle.index for particle in ds] == list(range(N))


def test_a_particle_knows_what_the_table_says_of_it(ds: IndexedDataset) -> None:
    particle = ds[4]
    assert int(particle.uid) % 2**64 == int(uids(N)[4])
    assert float(particle.ctf.defocus_u) == ctf_columns(N)["ctf__df1_A"][4]
    equal(particle.pose, POSE[4])
    equal(particle.shift, 2 * SHIFT[4])
    assert (particle.pixel_size, particle.box) == (1.5, BOX)


def test_a_particle_reads_nothing_until_asked(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N)
    ds = IndexedDataset(cs)
    (tmp_path / "J1/extract/stack_0.mrc").unlink()
    (tmp_path / "J1/extract/stack_1.mrc").unlink()
    assert repr(ds[2]) == "Particle(2 of the 7 in an IndexedDataset, 8 px of 1.5 A)"


def test_a_particle_lists_what_may_be_asked_of_it(ds: IndexedDataset) -> None:
    known = {"uid", "ctf", "pose", "shift_A", "shift", "pixel_size", "box", "image", "index", "batch"}
    assert known <= set(dir(ds[0]))
    assert all(name in pydoc.render_doc(Particle, renderer=pydoc.plaintext) for name in known)


def test_a_particle_has_no_other_attributes(ds: IndexedDataset) -> None:
    with pytest.raises(AttributeError, match="no 'nonsense'"):
        ds[0].nonsense  # noqa: B018


@pytest.mark.parametrize("nonsense", [1.5, "ctf/df1_A < 20000", None, {3}])
def test_what_chooses_no_rows_is_shown(ds: IndexedDataset, nonsense: Any) -> None:
    for choose in (ds.__getitem__, ds.select, ds.batch):
        with pytest.raises(RowIndexError, match=f"mask or list of row numbers, not by {re.escape(repr(nonsense))}$"):
            choose(nonsense)


def test_the_table_of_a_data_set_cannot_be_exchanged_beneath_its_images(ds: IndexedDataset) -> None:
    with pytest.raises(AttributeError, match="particles"):
        ds.particles = ds.particles[[4, 2]]  # type: ignore[misc]
    others = ParticleDataset(ds.particles[[4, 2]], ds.source)
    equal(others.read([0, 1]), ds.read([4, 2]))


# Several


ROWS = {
    "list": ([4, 1, 4], [4, 1, 4]),
    "negative": ([-1, 0], [6, 0]),
    "array": (np.array([5, 2]), [5, 2]),
    "tensor": (torch.tensor([5, 2]), [5, 2]),
    "mask": (np.arange(N) > 4, [5, 6]),
    "mask tensor": (torch.arange(N) > 4, [5, 6]),
    "nothing": ([], []),
}


@pytest.mark.parametrize(("key", "rows"), ROWS.values(), ids=ROWS.keys())
def test_a_list_array_or_mask_gives_a_batch(ds: IndexedDataset, images: np.ndarray, key: Any, rows: list[int]) -> None:
    batch = ds[key]
    assert isinstance(batch, ParticleBatch)
    equal(batch.images, images[rows])
    assert batch.index.tolist() == rows


MASKS = [np.int8([1, 1, 0, 1, 1]), np.uint8([0, 1, 0, 0, 0]), ~np.int8([1, 1, 0, 1, 1])]


@pytest.mark.parametrize("mask", [*MASKS, ~np.int64([1, 1, 0, 1, 1]), np.ones(5), [1, 0, 0, 0, 0]], ids=str)
def test_zeros_and_ones_of_a_function_for_all_particles_are_not_taken_for_rows(tmp_path: Path, mask: Any) -> None:
    ds = IndexedDataset(write_particles(tmp_path, 5)[0])
    for choose in (ds.select, ds.particles.where, ds.read):
        with pytest.raises(RowIndexError, match="row numbers and no condition"):
            choose(lambda particles: mask)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_that_were_kept_as_numbers_of_8_bits_are_not_taken_for_rows(tmp_path: Path, mask: np.ndarray) -> None:
    cs, _ = write_particles(tmp_path, 5)
    ds = IndexedDataset(cs)
    for choose in (ds.select, ds.particles.where, lambda chosen: IndexedDataset(cs, select=chosen)):
        for kept in (mask, torch.as_tensor(mask)):
            with pytest.raises(RowIndexError, match="row numbers and no condition"):
                choose(kept)
    assert len(ds.select([0, 1])) == 2
    for rows in ([1, 0, 0, 1, 1], np.zeros(5, np.int64)):  # any other array or list is one of rows, which may come again
        assert ds.select(rows).particles.row.tolist() == list(rows)
        assert len(ds.read(rows)) == 5


@pytest.mark.parametrize(
    "key",
    [slice(None, None, -2), slice(1, 4), [4, -1, 4], np.array([True, False] * 3 + [True]), torch.tensor([2, 0]), torch.arange(N) > 2, []],
    ids=str,
)
def test_a_batch_is_cut_as_a_list_or_array_is(ds: IndexedDataset, images: np.ndarray, key: Any) -> None:
    part = ds.batch(range(N))[key]
    rows = np.arange(N)[np.asarray(key, None if len(key) else int) if not isinstance(key, slice) else key]
    equal(part.images, images[rows])
    assert part.index.tolist() == rows.tolist()


@pytest.mark.parametrize("key", [[N], np.array([True, False]), torch.tensor([-N - 1]), (0, 0.5), None, "a"], ids=str)
def test_rows_that_a_batch_does_not_have_are_an_error_of_ours(ds: IndexedDataset, key: Any) -> None:
    with pytest.raises(RowIndexError):
        ds.batch(range(N))[key]


@pytest.mark.parametrize("key", [slice(2, 5), slice(None, None, -2), slice(-3, None), slice(4, 4), slice(5, 99)])
def test_a_slice_gives_a_smaller_data_set(ds: IndexedDataset, images: np.ndarray, key: slice) -> None:
    part = ds[key]
    assert isinstance(part, IndexedDataset)
    assert len(part) == len(images[key])
    equal(part.read(range(len(part))), images[key])


@pytest.mark.parametrize(("key", "rows"), ROWS.values(), ids=ROWS.keys())
def test_select_gives_a_data_set_of_those_rows_in_that_order(ds: IndexedDataset, images: np.ndarray, key: Any, rows: list[int]) -> None:
    part = ds.select(key)
    assert (len(part), type(part)) == (len(rows), IndexedDataset)
    equal(part.read(range(len(part))), images[rows])
    np.testing.assert_array_equal(part.particles.uid, uids(N)[rows])
    assert {len(column) for column in part.particles.columns().values()} == {len(rows)}


def test_selecting_twice_selects_from_the_selection(ds: IndexedDataset, images: np.ndarray) -> None:
    part = ds.select(lambda p: p.half_set == 0).select([3, 1])
    assert part.particles.row.tolist() == [6, 2]
    equal(part.read([0, 1]), images[[6, 2]])
    assert part.batch([0, 1]).index.tolist() == [0, 1]


def test_select_leaves_the_data_set_as_it_was(ds: IndexedDataset, images: np.ndarray) -> None:
    ds.select([1])
    equal(ds.read(range(N)), images)


# read


@pytest.mark.parametrize(("key", "rows"), [*ROWS.values(), (slice(1, 3), [1, 2]), (range(3), [0, 1, 2]), (lambda p: p.row > 4, [5, 6])])
def test_read_gives_images_in_the_order_asked_for(ds: IndexedDataset, images: np.ndarray, key: Any, rows: list[int]) -> None:
    found = ds.read(key)
    assert found.dtype == torch.float32
    equal(found, images[rows])


@pytest.mark.parametrize(
    "rows", [[7], [-8], [0, 99], np.zeros(6, bool), [0.5], [[0]], 3, np.array([7]), np.array([-8]), np.zeros((2, 2), np.int64)]
)
@pytest.mark.parametrize("call", ["read", "batch", "select"])
def test_rows_that_cannot_be_are_an_index_error(ds: IndexedDataset, rows: Any, call: str) -> None:
    with pytest.raises(RowIndexError):
        getattr(ds, call)(rows)


def test_read_fills_the_tensor_it_is_given(ds: IndexedDataset, images: np.ndarray) -> None:
    out = torch.full((2, BOX, BOX), -1.0)
    assert ds.read([5, 0], out) is out
    equal(out, images[[5, 0]])


def test_read_fills_part_of_a_larger_buffer(ds: IndexedDataset, images: np.ndarray) -> None:
    buffer = torch.zeros(5, BOX, BOX)
    ds.read([5, 0], buffer[2:4])
    equal(buffer[2:4], images[[5, 0]])
    assert not buffer[[0, 1, 4]].any()


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(3, BOX, BOX),
        torch.empty(2, BOX, BOX + 1),
        torch.empty(2, BOX * BOX),
        torch.empty(2, BOX, BOX, dtype=torch.float64),
        torch.empty(2, BOX, BOX).transpose(1, 2),
        torch.empty(1, BOX, BOX).expand(2, BOX, BOX),
        torch.empty(2, BOX, BOX, device="meta"),
        torch.empty(2, BOX, BOX, requires_grad=True),
    ],
    ids=["too long", "too wide", "flat", "dtype", "not contiguous", "one image twice", "device", "with a gradient"],
)
def test_a_tensor_that_does_not_fit_is_refused_before_anything_is_written(ds: IndexedDataset, out: torch.Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"contiguous torch\.float32 CPU tensor of shape \(2, 8, 8\)"):
        ds.read([0, 1], out)


def test_an_array_in_place_of_a_tensor_is_refused_with_the_remedy(ds: IndexedDataset) -> None:
    with pytest.raises(ArgumentError, match=r"such as torch\.from_numpy\(array\), not a ndarray"):
        ds.read([0, 1], np.empty((2, BOX, BOX), np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "f2", "f4"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_images_come_in_the_dtype_of_the_file(tmp_path: Path, dtype: str, order: str) -> None:
    cs, images = write_particles(tmp_path, N, dtype=dtype, order=order)
    ds = IndexedDataset(cs)
    assert ds.dtype == torch.from_numpy(images).dtype
    assert ds.image_bytes == images[0].nbytes
    equal(ds.read(range(N)), images)


def test_images_belong_to_the_caller_and_not_to_the_file(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N)
    ds = IndexedDataset(cs)
    ds.read(range(N)).zero_()
    ds.batch(range(N)).images.zero_()
    ds[0].image.zero_()
    equal(ds.read(range(N)), images)
    equal(IndexedDataset(cs).read(range(N)), images)


# batch


def test_a_batch_keeps_everything_in_step_with_the_images(ds: IndexedDataset, images: np.ndarray) -> None:
    rows = [5, 0, 3]
    batch = ds.batch(rows)
    equal(batch.images, images[rows])
    assert batch.index.tolist() == rows
    assert batch.uid.dtype == torch.int64
    np.testing.assert_array_equal(batch.uid.numpy().view(np.uint64), uids(N)[rows])
    for name, values in (("defocus_u", "ctf__df1_A"), ("astigmatism_angle_rad", "ctf__df_angle_rad"), ("voltage_kv", "ctf__accel_kv")):
        equal(getattr(batch.ctf, name), ctf_columns(N)[values][rows])
    equal(batch.pose, POSE[rows])
    equal(batch.shift, 2 * SHIFT[rows])
    assert (batch.pixel_size, batch.box, len(batch)) == (1.5, BOX, 3)


def test_a_batch_may_be_changed_without_changing_the_data_set(ds: IndexedDataset) -> None:
    batch = ds.batch(range(N))
    for tensor in (batch.uid, batch.pose, batch.shift_A, batch.ctf.defocus_u, batch.index):
        tensor.zero_()
    again = ds.batch(range(N))
    equal(again.pose, POSE)
    np.testing.assert_array_equal(again.uid.numpy().view(np.uint64), uids(N))
    equal(again.ctf.defocus_u, ctf_columns(N)["ctf__df1_A"])


def test_a_table_of_one_particle_gives_a_batch_that_may_be_changed(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, 1, stacks=1)
    batch = IndexedDataset(cs).batch([0])
    batch.uid.zero_()
    batch.ctf.defocus_u.zero_()
    equal(batch.images, images)


def test_what_the_table_lacks_is_none_in_the_batch(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, **dict.fromkeys(ctf_columns(1)))
    batch = IndexedDataset(cs).batch([0, 1])
    assert (batch.ctf, batch.pose, batch.shift) == (None, None, None)
    assert "no optics or poses" in repr(batch)


# Slicing and moving a batch


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2, 4, 6]),
        ([4, 1], [4, 1]),
        (torch.tensor([4, -1]), [4, 6]),
        (torch.arange(N) > 4, [5, 6]),
        (np.array([4, 1]), [4, 1]),
        (slice(3, 3), []),
    ],
)
@pytest.mark.parametrize("dtype", ["f4", "u2"])
def test_a_part_of_a_batch_keeps_everything_in_step(tmp_path: Path, key: Any, rows: list[int], dtype: str) -> None:
    cs, images = write_particles(tmp_path, N, dtype=dtype, **ALIGNMENTS)
    part = IndexedDataset(cs).batch(range(N))[key]
    assert isinstance(part, ParticleBatch)
    assert len(part) == len(rows)
    equal(part.images, images[rows])
    assert part.index.tolist() == rows
    equal(part.pose, POSE[rows])
    equal(part.ctf.defocus_u, ctf_columns(N)["ctf__df1_A"][rows])


@pytest.mark.parametrize("rows", [[5, 2], [], [True, False, False, True, False, False, True], np.arange(N) > 4, torch.arange(N) > 4])
def test_rows_of_a_batch_are_chosen_as_those_of_the_data_set(ds: IndexedDataset, rows: Any) -> None:
    expected, found = ds.batch(rows), ds.batch(range(N)).batch(rows)
    assert found.index.tolist() == expected.index.tolist()
    equal(found.images, expected.images.numpy())


@pytest.mark.parametrize("key", [4, -3, np.int64(4), torch.tensor(4)], ids=["int", "negative", "int64", "0-d tensor"])
def test_an_integer_of_any_kind_gives_a_particle_of_a_batch(ds: IndexedDataset, images: np.ndarray, key: Any) -> None:
    particle = ds.batch(range(N))[key]
    assert isinstance(particle, Particle)
    equal(particle.image, images[4])
    assert particle.index == 4


def test_iterating_over_a_batch_gives_its_particles(ds: IndexedDataset, images: np.ndarray) -> None:
    found = [(particle.index, particle.image) for particle in ds.batch([6, 2])]
    assert [index for index, _ in found] == [6, 2]
    equal(torch.stack([image for _, image in found]), images[[6, 2]])


@pytest.mark.parametrize("key", [7, -8])
def test_a_particle_beyond_a_batch_is_an_index_error(ds: IndexedDataset, key: int) -> None:
    with pytest.raises(IndexError):
        ds.batch(range(N))[key]


@pytest.mark.parametrize("rows", [[0.5, 1.0], [99], [True]], ids=str)
def test_rows_that_a_batch_has_not_are_refused_as_a_data_set_refuses_them(ds: IndexedDataset, rows: list[Any]) -> None:
    batch = ds[:5].batch(slice(None))
    with pytest.raises(RowIndexError):
        batch.batch(rows)


def test_moving_a_batch_moves_every_tensor_and_keeps_dtypes(ds: IndexedDataset) -> None:
    batch = ds.batch([0, 1])
    moved = batch.to("meta")
    tensors = [moved.images, moved.index, moved.uid, moved.pose, moved.shift_A, *(value for _, value in moved.ctf.items())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.device.type == "meta"
    assert (moved.images.dtype, moved.uid.dtype) == (torch.float32, torch.int64)
    assert (moved.pixel_size, len(moved)) == (1.5, 2)
    assert batch.device.type == "cpu"


# Pickles and reprs


def test_a_pickled_data_set_reads_the_same_images(ds: IndexedDataset, images: np.ndarray) -> None:
    ds.read(range(N))
    copy = pickle.loads(pickle.dumps(ds))
    equal(copy.read(range(N)), images)
    assert copy.pixel_size == ds.pixel_size


def test_a_pickle_is_a_few_kilobytes_besides_the_columns(tmp_path: Path) -> None:
    n = 3000
    cs, _ = write_particles(tmp_path, n, box=4, stacks=1)
    ds = IndexedDataset(cs)
    ds.read(range(n))
    columns = sum(column.nbytes for column in ds.particles.columns().values())
    assert len(pickle.dumps(ds)) < columns + 5000
    assert columns < 110 * n


def test_a_pixel_size_that_is_given_adds_nothing_to_a_pickle(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, 3000, box=4, stacks=1)
    ds = IndexedDataset(cs, pixel_size=1.7)
    assert len(pickle.dumps(ds)) < len(pickle.dumps(IndexedDataset(cs))) + 100
    assert pickle.loads(pickle.dumps(ds)).particles.pixel_size.tolist() == [1.7] * 3000


def test_a_small_selection_pickles_small(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, 3000, box=4, stacks=1)
    ds = IndexedDataset(cs)
    assert len(pickle.dumps(ds.select([1, 2, 3]))) < 5000
    assert len(pickle.dumps(ds[5:8])) < 5000


def test_a_repr_tells_what_one_holds(ds: IndexedDataset) -> None:
    lines = repr(ds).splitlines()
    assert lines[0] == "IndexedDataset: 7 particles in 2 files"
    assert " ".join(lines[1].split()) == "images 8 x 8 px, 1.5 A/pixel, float32, 1.79 kB in all"
    assert "300 kV" in lines[2]
    assert "pose, shift_A, half_set" in lines[3]
    assert "extract/stack_" in lines[4]


def test_no_rows_are_read_as_no_images(ds: IndexedDataset) -> None:
    for none in ([], np.empty(0, np.int64), slice(3, 3), np.zeros(len(ds), bool)):
        assert ds.read(none).shape == (0, BOX, BOX)
    assert ds.read([], torch.empty(0, BOX, BOX)).shape == (0, BOX, BOX)
    assert (len(ds.batch([])), len(ds.batch([]).uid)) == (0, 0)


def test_an_empty_selection_has_a_repr(ds: IndexedDataset) -> None:
    assert repr(ds[:0]).startswith("IndexedDataset: 0 particles in 0 files")


def test_a_repr_of_a_batch_tells_what_one_holds(ds: IndexedDataset) -> None:
    assert repr(ds.batch([0, 1])) == "ParticleBatch(2 x 8 x 8 float32 on cpu, 1.5 A/pixel, with ctf, pose, shift_A)"


# The demo project, which the package writes and both paradigms read


def test_both_paradigms_read_the_demo_project(demo: DemoProject) -> None:
    indexed = IndexedDataset(demo.indexed)
    restacked = JobDirectoryDataset(demo.folder, demo.job_number, pairing="uid")
    row_of = {uid: row for row, uid in enumerate(indexed.particles.uid.tolist())}
    rows = [row_of[uid] for uid in restacked.particles.uid.tolist()]
    assert (len(indexed), len(restacked)) == (60, 30)
    np.testing.assert_array_equal(restacked.read(range(30)).numpy(), indexed.read(rows).numpy())
    np.testing.assert_array_equal(restacked.particles.ctf.defocus_u, indexed.particles.ctf.defocus_u[rows])
