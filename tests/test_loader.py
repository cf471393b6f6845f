"""Data sets inside torch's own ``DataLoader``, with nothing but their arguments."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import uids, write_particles
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, RandomSampler, Subset, random_split

from cryolike_data import Collate, Downsample, IndexedDataset, Particle, ParticleBatch
from cryolike_data.columns import Columns
from cryolike_data.errors import MixedParticlesError

N = 10


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    return write_particles(tmp_path_factory.mktemp("data"), N, stacks=3)


class CountingDataset(IndexedDataset):
    """Counts the calls that read images."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: list[int] = []

    def batch(self, indices: Any) -> ParticleBatch:
        self.calls.append(len(indices))
        return super().batch(indices)


def check(batches: list[ParticleBatch], images: np.ndarray, sizes: list[int]) -> list[int]:
    """The rows in the order in which they came, after checking each batch against the images written."""
    assert all(isinstance(batch, ParticleBatch) for batch in batches)
    assert [len(batch) for batch in batches] == sizes
    for batch in batches:
        np.testing.assert_array_equal(batch.images.numpy(), images[batch.index.numpy()])
        np.testing.assert_array_equal(batch.uid.numpy().view(np.uint64), uids(len(images))[batch.index.numpy()])
    return [row for batch in batches for row in batch.index.tolist()]


def test_a_plain_loader_gives_batches_in_order(ds: IndexedDataset, images: np.ndarray) -> None:
    assert check(list(DataLoader(ds, batch_size=4)), images, [4, 4, 2]) == list(range(N))


def test_shuffling_gives_every_particle_once(ds: IndexedDataset, images: np.ndarray) -> None:
    loader = DataLoader(ds, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    rows = check(list(loader), images, [4, 4, 2])
    assert rows != list(range(N))
    assert sorted(rows) == list(range(N))


def test_every_batch_is_read_in_one_call(written: tuple[Path, np.ndarray]) -> None:
    ds = CountingDataset(written[0])
    list(DataLoader(ds, batch_size=4, shuffle=True))
    list(DataLoader(Subset(ds, [1, 2, 3, 5, 8]), batch_size=3))
    assert ds.calls == [4, 4, 2, 3, 2]


@pytest.mark.parametrize("indices", [[7, 1, 4], np.array([7, 1, 4]), torch.tensor([7, 1, 4])], ids=["list", "array", "tensor"])
def test_a_subset_keeps_the_rows_of_the_data_set(ds: IndexedDataset, images: np.ndarray, indices: Any) -> None:
    subset = Subset(ds, indices)
    assert check(list(DataLoader(subset, batch_size=2)), images, [2, 1]) == [7, 1, 4]
    assert subset[0].index == 7


def test_a_subset_of_a_subset_keeps_the_rows_of_the_data_set(ds: IndexedDataset, images: np.ndarray) -> None:
    subset = Subset(Subset(ds, [9, 7, 1, 4]), [2, 0])
    assert check(list(DataLoader(subset, batch_size=2)), images, [2]) == [1, 9]


def test_a_random_split_gives_every_particle_to_one_part(ds: IndexedDataset, images: np.ndarray) -> None:
    parts = random_split(ds, [0.7, 0.3], torch.Generator().manual_seed(0))
    rows = [check(list(DataLoader(part, batch_size=4)), images, sizes) for part, sizes in zip(parts, ([4, 3], [3]), strict=True)]
    assert sorted(rows[0] + rows[1]) == list(range(N))


def test_a_batch_sampler_of_its_own_makes_batches(ds: IndexedDataset, images: np.ndarray) -> None:
    sampler = BatchSampler(RandomSampler(ds), 4, drop_last=True)
    check(list(DataLoader(ds, batch_sampler=sampler)), images, [4, 4])
    check(list(DataLoader(ds, sampler=sampler, batch_size=None)), images, [4, 4])


@pytest.mark.parametrize("workers", [0, 1])
def test_without_batches_the_loader_gives_particles(ds: IndexedDataset, images: np.ndarray, workers: int) -> None:
    found = list(DataLoader(ds, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None))
    assert all(isinstance(particle, Particle) for particle in found)
    np.testing.assert_array_equal(torch.stack([particle.image for particle in found]).numpy(), images)


def test_particles_collected_by_hand_collate_in_one_read(written: tuple[Path, np.ndarray], images: np.ndarray) -> None:
    ds = CountingDataset(written[0])
    batch = torch.utils.data.default_collate([ds[i] for i in (3, 0, 9)])
    check([batch], images, [3])
    assert ds.calls == [3]


def test_an_empty_data_set_gives_no_batches(ds: IndexedDataset) -> None:
    assert list(DataLoader(ds[:0], batch_size=4)) == []


# Several data sets


@pytest.fixture
def two(tmp_path: Path) -> tuple[list[IndexedDataset], np.ndarray]:
    """Two data sets of 4 and 6 particles, and all their images."""
    written = [write_particles(tmp_path / str(n), n, seed=n) for n in (4, 6)]
    return [IndexedDataset(cs) for cs, _ in written], np.concatenate([images for _, images in written])


@pytest.mark.parametrize("shuffle", [False, True])
def test_data_sets_in_a_row_share_batches_in_the_order_of_the_sampler(two: tuple[list[IndexedDataset], np.ndarray], shuffle: bool) -> None:
    parts, images = two
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2)).tolist() if shuffle else list(range(10))
    batches = list(DataLoader(ConcatDataset(parts), batch_size=6, sampler=order))
    found = torch.cat([batch.images for batch in batches])
    np.testing.assert_array_equal(found.numpy(), images[order])
    expected = np.concatenate([uids(4, seed=4), uids(6, seed=6)])[order]
    np.testing.assert_array_equal(torch.cat([batch.uid for batch in batches]).numpy().view(np.uint64), expected)
    defocus = np.concatenate([part.particles.ctf.defocus_u for part in parts])[order]
    np.testing.assert_array_equal(torch.cat([batch.ctf.defocus_u for batch in batches]).numpy(), defocus)


def test_a_row_of_data_sets_knows_each_particles_row_in_its_own(two: tuple[list[IndexedDataset], np.ndarray]) -> None:
    parts, _ = two
    (batch,) = DataLoader(ConcatDataset(parts), batch_size=10)
    assert batch.index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_a_batch_over_two_data_sets_costs_one_read_of_each(tmp_path: Path) -> None:
    parts = [CountingDataset(write_particles(tmp_path / str(n), n, seed=n)[0]) for n in (4, 6)]
    list(DataLoader(ConcatDataset(parts), batch_size=10, sampler=[9, 0, 5, 2, 7]))
    assert [part.calls for part in parts] == [[2], [3]]


@pytest.mark.parametrize(
    ("first", "second"),
    [("f4", "f2"), ("i1", "f4"), ("i2", "u2"), ("u2", "u2"), ("u2", "f4")],
)
def test_data_sets_of_different_dtypes_share_batches_without_loss(tmp_path: Path, first: str, second: str) -> None:
    written = [write_particles(tmp_path / str(i), 4, seed=i, dtype=dtype) for i, dtype in enumerate((first, second))]
    (batch,) = DataLoader(ConcatDataset([IndexedDataset(cs) for cs, _ in written]), batch_size=8)
    np.testing.assert_array_equal(batch.images.double().numpy(), np.concatenate([images.astype("f8") for _, images in written]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"box": 12}, ["8 px", "12 px"]),
        ({"blob__psize_A": np.full(4, 3, "f4")}, ["1.5 A/pixel", "3.0 A/pixel"]),
        ({"alignments3D__pose": np.zeros((4, 3), "f4")}, ["pose"]),
    ],
)
def test_data_sets_that_cannot_share_a_batch_are_an_error_that_tells_how_they_differ(
    tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    paths = [write_particles(tmp_path / str(i), 4, **options)[0] for i, options in enumerate(({}, changes))]
    with pytest.raises(MixedParticlesError) as caught:
        list(DataLoader(ConcatDataset([IndexedDataset(cs) for cs in paths]), batch_size=8))
    assert all(text in str(caught.value) for text in said)


@pytest.mark.parametrize("other", [1.0350049, 1.0350149])
def test_data_sets_whose_pixel_sizes_differ_by_rounding_share_batches(
    ds: IndexedDataset, written: tuple[Path, np.ndarray], other: float
) -> None:
    parts = [IndexedDataset(written[0], pixel_size=size) for size in (1.0350051, other)]
    (batch,) = DataLoader(ConcatDataset(parts), batch_size=2 * N)
    assert (len(batch), batch.pixel_size) == (2 * N, 1.0350051)


# Worker processes


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_give_the_same_batches_however_they_are_started(ds: IndexedDataset, images: np.ndarray, method: str) -> None:
    ds.read([0])  # a map is open in the main process, and must not travel
    loader = DataLoader(ds, batch_size=4, num_workers=2, multiprocessing_context=method)
    assert check(list(loader), images, [4, 4, 2]) == list(range(N))


def test_a_collate_of_ours_runs_in_workers(ds: IndexedDataset, images: np.ndarray) -> None:
    loader = DataLoader(ds, batch_size=4, num_workers=1, multiprocessing_context="fork", collate_fn=Collate(normalize="std"))
    found = torch.cat([batch.finish().images for batch in loader]).numpy()
    expected = (images - images.mean((1, 2), keepdims=True)) / images.std((1, 2), keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_work_for_a_device_is_left_by_real_workers_and_finished_here(ds: IndexedDataset) -> None:
    collate_fn = Collate(device="meta", downsample=Downsample(box=4))
    for batch in DataLoader(ds, batch_size=5, num_workers=1, multiprocessing_context="fork", collate_fn=collate_fn):
        assert (batch.device.type, batch.box) == ("cpu", 8)
        assert (batch.finish().device.type, batch.finish().box) == ("meta", 4)


def test_an_error_in_a_worker_is_the_one_raised_there(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, 4, stacks=1)
    ds = IndexedDataset(cs)
    os.truncate(tmp_path / "J1/extract/stack_0.mrc", 1100)
    loader = DataLoader(ds, batch_size=4, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(ValueError, match=r"stack_0\.mrc has shrunk"):
        list(loader)


def test_a_row_of_data_sets_works_in_workers(two: tuple[list[IndexedDataset], np.ndarray]) -> None:
    parts, images = two
    loader = DataLoader(ConcatDataset(parts), batch_size=5, num_workers=2, multiprocessing_context="fork")
    np.testing.assert_array_equal(torch.cat([batch.images for batch in loader]).numpy(), images)


def test_batches_of_workers_use_few_of_the_files_that_a_process_may_open(ds: IndexedDataset) -> None:
    before = len(os.listdir("/proc/self/fd"))
    held = list(DataLoader(ds, batch_size=1, num_workers=1))
    # Torch keeps one of shared memory for each tensor: here the images.
    assert len(os.listdir("/proc/self/fd")) - before < 2 * len(held) + 10
    for k, batch in enumerate(held):
        assert batch.index.tolist() == [k]
        assert torch.equal(batch.uid, ds.batch([k]).uid)


def test_columns_of_every_kind_come_through_a_pickle() -> None:
    columns = Columns(
        {
            "index": torch.arange(3),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "wave": torch.ones(3, dtype=torch.complex64).conj(),
            "learned": torch.ones(3, requires_grad=True),
            "minus": torch.ones(3, dtype=torch.complex64).conj().imag,
            "sparse": torch.eye(3).to_sparse(),
        }
    )
    again = pickle.loads(pickle.dumps(columns))
    assert again.names == columns.names
    for name, column in columns.tensors.items():
        assert again.tensors[name].dtype == column.dtype
        assert torch.equal(again.tensors[name].to_dense(), column.to_dense())
    again.tensors["index"][0] = 7  # it may be written to
