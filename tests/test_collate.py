from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import uids, write_particles, write_stack

from cryolike_data import Collate, Downsample, IndexedDataset, Normalize, ParticleBatch, collate, stream
from cryolike_data.errors import ArgumentError

N, BOX = 6, 8


@pytest.fixture(params=["i1", "i2", "u2", "f2", "f4"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[IndexedDataset, np.ndarray]:
    """A data set in each dtype that stacks have, and its images."""
    cs, images = write_particles(tmp_path, N, box=BOX, dtype=request.param)
    return IndexedDataset(cs), images


@pytest.fixture
def ds(tmp_path: Path) -> IndexedDataset:
    return IndexedDataset(write_particles(tmp_path, N, box=BOX, dtype="i1")[0])


@pytest.fixture
def in_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``Collate`` believe that it runs in a worker process."""
    monkeypatch.setattr(collate, "get_worker_info", lambda: object())


def items(ds: IndexedDataset) -> list[Any]:
    return [ds[i] for i in range(len(ds))]


def test_without_arguments_images_are_converted_to_float32_and_nothing_else(written: tuple[IndexedDataset, np.ndarray]) -> None:
    ds, images = written
    batch = Collate()(items(ds))
    assert batch.images.dtype == torch.float32
    np.testing.assert_array_equal(batch.images.numpy(), images.astype("f4"))
    np.testing.assert_array_equal(batch.uid.numpy().view(np.uint64), uids(N))


def test_a_batch_is_accepted_in_place_of_a_list(ds: IndexedDataset) -> None:
    assert torch.equal(Collate()(ds.batch(range(N))).images, Collate()(items(ds)).images)


def test_images_are_converted_before_they_are_averaged(written: tuple[IndexedDataset, np.ndarray]) -> None:
    ds, images = written
    batch = Collate(downsample=Downsample(factor=2, method="mean"))(items(ds))
    expected = images.astype("f8").reshape(N, 4, 2, 4, 2).mean((2, 4))
    np.testing.assert_allclose(batch.images.numpy(), expected, rtol=1e-5, atol=1e-2 if images.dtype.kind in "iu" else 1e-5)


@pytest.mark.parametrize(
    ("stored", "given"), [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.int16, torch.float64)]
)
def test_doubles_on_either_side_are_computed_in_double(stored: torch.dtype, given: torch.dtype) -> None:
    images = (10_000 + 100 * torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(stored)
    found = Collate(normalize="std", dtype=given).process_images(images)
    assert found.dtype == given
    assert torch.equal(found, Normalize("std")(images.double()).to(given))


def test_particles_of_two_data_sets_keep_the_order_of_the_list(tmp_path: Path) -> None:
    first, second = (IndexedDataset(write_particles(tmp_path / str(seed), N, box=BOX, seed=seed)[0]) for seed in (1, 2))
    batch = Collate()([first[0], second[2], first[1], first[2]])
    assert batch.uid.numpy().view(np.uint64).tolist() == [uids(N, seed=1)[0], uids(N, seed=2)[2], *uids(N, seed=1)[[1, 2]]]
    assert torch.equal(batch.images, torch.cat([first.read([0]), second.read([2]), first.read([1, 2])]))


def test_the_pixel_size_follows_downsampling(ds: IndexedDataset) -> None:
    batch = Collate(downsample=Downsample(box=4))(items(ds))
    assert (batch.box, batch.pixel_size) == (4, 3.0)


def test_images_are_normalised_after_downsampling(written: tuple[IndexedDataset, np.ndarray]) -> None:
    ds, _ = written
    batch = Collate(downsample=Downsample(factor=2, method="mean"), normalize="std")(items(ds))
    np.testing.assert_allclose(batch.images.mean((1, 2)).numpy(), 0, atol=1e-5)
    np.testing.assert_allclose(batch.images.std((1, 2), correction=0).numpy(), 1, atol=1e-5)


@pytest.mark.parametrize("normalize", ["max", Normalize("max")])
def test_a_normalisation_is_named_or_given(ds: IndexedDataset, normalize: Any) -> None:
    images = Collate(normalize=normalize)(items(ds)).images
    np.testing.assert_allclose(images.abs().amax((1, 2)).numpy(), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_result_can_be_chosen(ds: IndexedDataset, dtype: torch.dtype) -> None:
    assert Collate(normalize="std", dtype=dtype)(items(ds)).images.dtype == dtype


def test_half_precision_is_for_the_result_and_not_for_the_computation(tmp_path: Path) -> None:
    # The sum of 64 pixels of 30,000 overflows float16.
    cs, images = write_particles(tmp_path, N, dtype="i2")
    found = Collate(downsample=Downsample(factor=8, method="mean"), dtype=torch.float16)(items(IndexedDataset(cs))).images
    np.testing.assert_allclose(found.float().numpy().ravel(), images.mean((1, 2)), rtol=1e-2, atol=5)


def test_pixels_beyond_half_precision_are_normalised_before_they_are_rounded_to_it() -> None:
    images = 1e5 + torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    found = Collate(normalize="std", dtype=torch.float16).process_images(images)
    assert torch.equal(found, Normalize("std")(images).half())


@pytest.mark.parametrize("dtype", ["float16", np.float32, torch.int8, torch.complex64])
def test_a_dtype_that_no_batch_can_have_is_an_error(ds: IndexedDataset, dtype: Any) -> None:
    with pytest.raises(ArgumentError, match="dtype of a batch is a floating one"):
        Collate(dtype=dtype)
    with pytest.raises(ArgumentError, match="dtype of a batch is a floating one"):
        stream(ds, dtype=dtype)


def test_the_data_set_stays_as_it_was(ds: IndexedDataset) -> None:
    before = ds.read(range(N))
    batch = ds.batch(range(N))
    Collate(normalize="max")(batch)
    assert torch.equal(batch.images, before)
    assert torch.equal(ds.read(range(N)), before)


def test_pixels_travel_in_the_dtype_of_the_file(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[torch.dtype, Any]] = []
    original = ParticleBatch.to

    def to(batch: ParticleBatch, device: Any = None, **options: Any) -> ParticleBatch:
        moved.append((batch.images.dtype, device))
        return original(batch, device, **options)

    monkeypatch.setattr(ParticleBatch, "to", to)
    batch = Collate(device="meta", downsample=Downsample(box=4))(items(ds))
    assert moved == [(torch.int8, "meta")]
    assert (batch.device.type, batch.images.dtype, tuple(batch.images.shape)) == ("meta", torch.float32, (N, 4, 4))
    assert batch.ctf.defocus_u.device.type == "meta"


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": torch.int16},
        {"dtype": torch.complex64},
        {"downsample": 2},
        {"downsample": "fourier"},
        {"normalize": "mean"},
        {"normalize": 3},
        {"device": "gpu"},
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises((ArgumentError, RuntimeError)):
        Collate(**arguments)


# Work left for the main process


def test_a_gpu_that_is_not_there_is_an_error_in_words(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for act in (lambda: Collate(device="cuda")(items(ds)), lambda: ds[:3].batch([0]).to("cuda:0")):
        with pytest.raises(ArgumentError, match=r"device='cuda(:0)?' needs a GPU"):
            act()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), "meta"])
def test_a_worker_leaves_work_for_a_device_to_the_main_process(ds: IndexedDataset, in_worker: None, device: Any) -> None:
    batch = Collate(device=device, normalize="std", downsample=Downsample(box=4))(items(ds))
    assert batch.pending is not None
    assert (batch.images.dtype, batch.box, batch.pixel_size, batch.device.type) == (torch.int8, BOX, 1.5, "cpu")
    assert "unfinished: call .finish()" in repr(batch)


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_a_worker_finishes_what_needs_no_device(ds: IndexedDataset, in_worker: None, device: Any) -> None:
    batch = Collate(device=device, downsample=Downsample(box=4))(items(ds))
    assert batch.pending is None
    assert batch.box == 4


@pytest.fixture
def unfinished(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> tuple[Collate, ParticleBatch]:
    """A batch as a worker leaves it, arrived in the main process."""
    collate_fn = Collate(device="meta", downsample=Downsample(box=4))
    with monkeypatch.context() as patch:
        patch.setattr(collate, "get_worker_info", lambda: object())
        batch = collate_fn(items(ds))
    return collate_fn, pickle.loads(pickle.dumps(batch))


@pytest.mark.parametrize("by", ["batch", "collate"])
def test_finish_does_what_was_left(unfinished: tuple[Collate, ParticleBatch], by: str) -> None:
    collate_fn, batch = unfinished
    done = batch.finish() if by == "batch" else collate_fn.finish(batch)
    assert done.pending is None
    assert (tuple(done.images.shape), done.images.dtype, done.device.type) == ((N, 4, 4), torch.float32, "meta")
    assert done.pixel_size == 3.0


def test_finishing_twice_changes_nothing(unfinished: tuple[Collate, ParticleBatch]) -> None:
    collate_fn, batch = unfinished
    done = batch.finish()
    assert done.finish() is done
    assert collate_fn.finish(done) is done
    assert done.pixel_size == 3.0


def test_finishing_a_batch_that_was_never_left_changes_nothing(ds: IndexedDataset) -> None:
    batch = ds.batch([0, 1])
    assert batch.finish() is batch
    assert Collate(downsample=Downsample(box=4)).finish(batch) is batch


def test_a_part_of_an_unfinished_batch_can_be_finished(unfinished: tuple[Collate, ParticleBatch]) -> None:
    done = unfinished[1][2:4].finish()
    assert (tuple(done.images.shape), done.pixel_size) == ((2, 4, 4), 3.0)


def test_a_collate_pickles(ds: IndexedDataset) -> None:
    collate_fn = Collate(downsample=Downsample(box=4), normalize="std", device=torch.device("cpu"), dtype=torch.float16)
    copy = pickle.loads(pickle.dumps(collate_fn))
    assert copy == collate_fn
    assert torch.equal(copy(items(ds)).images, collate_fn(items(ds)).images)


def test_a_particle_alone_is_no_batch(ds: IndexedDataset) -> None:
    with pytest.raises(ArgumentError, match="a list of particles"):
        Collate()(ds[0])


@pytest.mark.parametrize(("things", "said"), [([(1, 2)], "not of tuple"), ([torch.zeros(2)], "not of Tensor"), ([], "not of none at all")])
def test_things_that_are_no_particles_are_named(things: list[Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Collate()(things)


def test_a_label_beside_each_particle_is_an_error_whose_remedy_collates_the_particles(ds: IndexedDataset) -> None:
    pairs = [(particle, label) for label, particle in enumerate(ds)]
    with pytest.raises(ArgumentError, match=r"collate\(\[particle for particle, label in items\]\)"):
        Collate()(pairs)
    assert Collate()([particle for particle, label in pairs]).index.tolist() == list(range(N))


@pytest.mark.parametrize("method", ["fourier", "mean", "max"])
@pytest.mark.parametrize(("box", "smaller"), [(32, 8), (30, 10), (30, 15), (33, 11)])
def test_shifts_are_those_of_the_smaller_images(tmp_path: Path, method: Any, box: int, smaller: int) -> None:
    """A spot that the shift brings to the centre of the stored image is brought to the centre of the smaller one too."""
    shift = np.array([[3.5, -2.0], [0.0, 0.0], [-4.0, 1.0]], "f4")
    centre = np.arange(box) - box // 2
    x, y = centre + shift[:, :1], centre + shift[:, 1:]
    spots = np.exp(-(y[:, :, None] ** 2 + x[:, None] ** 2) / (2 * 3.0**2)).astype("f4")
    pose = {"alignments3D__pose": np.zeros((3, 3), "f4"), "alignments3D__shift": shift, "alignments3D__psize_A": np.full(3, 1.5, "f4")}
    cs, _ = write_particles(tmp_path, 3, box=box, stacks=1, blob__idx=np.arange(3, dtype="u4"), **pose)
    write_stack(tmp_path / "J1/extract/stack_0.mrc", spots, pixel_size=1.5)
    batch = Collate(downsample=Downsample(box=smaller, method=method))(IndexedDataset(cs).batch(range(3)))
    place = (torch.arange(smaller) - smaller // 2) * batch.pixel_size
    weight = batch.images.clamp(min=0)
    found = torch.stack([(weight * place).sum((1, 2)), (weight * place[:, None]).sum((1, 2))], 1) / weight.sum((1, 2))[:, None]
    assert batch.shift_A is not None
    torch.testing.assert_close(found, -batch.shift_A, rtol=0, atol=0.5)
    assert batch.to("meta").shift_A.shape == (3, 2)
