"""``PolarCollate`` and ``stream(..., polar=grid)``: transforms and CTF of batches against direct sums, wherever a batch goes."""

from __future__ import annotations

import pickle
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import likelihood_reference as reference
import numpy as np
import pytest
import torch
from support import numbered_images, polar_images, run_python, same_batch, write_particles, write_stack
from torch.utils.data import DataLoader

import cryolike_data.collate as collate_module
from cryolike_data import Collate, Downsample, IndexedDataset, Particle, ParticleBatch, stream
from cryolike_data.ctf import ctf_values
from cryolike_data.errors import ArgumentError, MixedParticlesError, TableError
from cryolike_data.polar_batch import PolarBatch, PolarCollate
from cryolike_data.transforms import PolarGrid, to_polar, to_polar_exact

N, BOX, PIXEL_SIZE = 11, 16, 1.5
GRID = PolarGrid.of_box(BOX, n_inplanes=20)
ODD_GRID = PolarGrid.of_box(BOX, n_inplanes=15)
each_grid = pytest.mark.parametrize("grid", [GRID, ODD_GRID], ids=["even", "odd"])

_HIGHER = {"tilt_A": 2, "trefoil_A": 2, "tetra_A": 4, "anisomag": 4}
HIGHER_TERMS = {f"ctf__{name}": np.random.default_rng(k).normal(size=(N, width)) for k, (name, width) in enumerate(_HIGHER.items())}
_SCALES = {"ctf__anisomag": 0.01, "ctf__tetra_A": 1e4}
HIGHER_TERMS = {name: (values * _SCALES.get(name, 800)).astype("f4") for name, values in HIGHER_TERMS.items()}
HIGHER_TERMS["ctf__bfactor"] = np.linspace(20, 80, N).astype("f4")
WITHOUT_OPTICS = {
    f"ctf__{name}": None
    for name in ("exp_group_id", "accel_kv", "cs_mm", "amp_contrast", "df1_A", "df2_A", "df_angle_rad", "phase_shift_rad")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    pose = np.random.default_rng(5).normal(size=(N, 3)).astype("f4")
    write_particles(path, N, box=BOX, stacks=3, alignments3D__pose=pose, ctf__phase_shift_rad=np.linspace(0, 1, N), **HIGHER_TERMS)
    return path


@pytest.fixture
def ds(folder: Path) -> IndexedDataset:
    return IndexedDataset(folder / "J1/particles.cs")


@pytest.fixture
def batch(ds: IndexedDataset) -> PolarBatch:
    """All particles, with CTF and transforms."""
    return PolarCollate(GRID)(ds.batch(range(N)))


def same_polar_batch(one: ParticleBatch, other: ParticleBatch) -> None:
    """Fail unless two batches are equal to the last bit."""
    assert isinstance(one, PolarBatch)
    assert isinstance(other, PolarBatch)
    same_batch(one, other)
    assert one.grid == other.grid
    for left, right in ((one.fourier, other.fourier), (one.polar_ctf, other.polar_ctf)):
        assert (left is None) == (right is None)
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right))


def errors(found: torch.Tensor, images: torch.Tensor, grid: PolarGrid) -> tuple[float, float]:
    """Errors of transforms of (B, D, D) images: the largest by the largest coefficient, and by the root mean square; the worst image."""
    exact = to_polar_exact(images.double(), grid)
    away, size = (found - exact).abs(), exact.abs()
    worst = away.amax((1, 2)) / size.amax((1, 2))
    rms = (away.square().mean((1, 2)) / size.square().mean((1, 2))).sqrt()
    return float(worst.max()), float(rms.max())


# --- transforms


@each_grid
@pytest.mark.parametrize("normalize", [None, "max", "std"])
def test_transforms_in_single_precision_are_those_of_the_processed_images(ds: IndexedDataset, grid: PolarGrid, normalize: Any) -> None:
    found = PolarCollate(grid, normalize=normalize)(ds.batch(range(N)))
    same_batch(replace(found), Collate(normalize=normalize)(ds.batch(range(N))))
    assert (found.images.dtype, found.fourier.dtype, found.polar_ctf.dtype) == (torch.float32, torch.complex64, torch.float32)
    assert tuple(found.fourier.shape) == tuple(found.polar_ctf.shape) == (N, grid.n_shells, grid.n_inplanes)
    worst, rms = errors(found.fourier, found.images, grid)
    assert worst < 3e-5
    assert rms < 1e-5


@each_grid
def test_transforms_in_double_precision_are_those_of_the_processed_images_as_well(ds: IndexedDataset, grid: PolarGrid) -> None:
    found = PolarCollate(grid, normalize="max", dtype=torch.float64)(ds.batch(range(N)))
    assert (found.images.dtype, found.fourier.dtype, found.polar_ctf.dtype) == (torch.float64, torch.complex128, torch.float64)
    assert errors(found.fourier, found.images, grid)[1] < 3e-12


def test_half_precision_images_have_transforms_in_single_precision(ds: IndexedDataset) -> None:
    found = PolarCollate(GRID, normalize="max", dtype=torch.float16)(ds.batch(range(N)))
    assert (found.images.dtype, found.fourier.dtype, found.polar_ctf.dtype) == (torch.float16, torch.complex64, torch.float32)
    assert errors(found.fourier, found.images, GRID)[1] < 1e-5


@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "f2"])
def test_every_pixel_type_of_the_stacks_is_transformed(tmp_path: Path, dtype: str) -> None:
    path, images = write_particles(tmp_path, N, box=BOX, dtype=dtype)
    found = PolarCollate(GRID)(IndexedDataset(path).batch(range(N)))
    assert errors(found.fourier, torch.from_numpy(images.astype(np.float64)), GRID)[1] < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 3e-12)])
@each_grid
def test_unit_power_makes_the_integral_over_the_disk_one(ds: IndexedDataset, grid: PolarGrid, dtype: torch.dtype, tolerance: float) -> None:
    found = PolarCollate(grid, normalize="max", dtype=dtype, unit_power=True)(ds.batch(range(N)))
    expected = polar_images(found.images.numpy(), grid.radius_max, grid.n_inplanes)
    rms = np.sqrt((np.abs(expected) ** 2).mean())
    assert np.sqrt((np.abs(found.fourier.numpy() - expected) ** 2).mean()) < tolerance * rms
    power = (found.fourier.abs().double().square() * torch.from_numpy(grid.integration_weights)).sum((1, 2))
    np.testing.assert_allclose(power.numpy(), 1, rtol=10 * tolerance)


@pytest.mark.parametrize("downsample", [Downsample(box=10), Downsample(factor=2, method="mean"), Downsample(box=7)], ids=repr)
def test_the_grid_is_that_of_the_smaller_box_after_downsampling(ds: IndexedDataset, downsample: Downsample) -> None:
    box = downsample.output_box(BOX)
    grid = PolarGrid.of_box(box)
    found = PolarCollate(grid, downsample=downsample, normalize="max")(ds.batch(range(N)))
    same_batch(found, Collate(downsample, "max")(ds.batch(range(N))))
    assert found.pixel_size == pytest.approx(PIXEL_SIZE * BOX / box)
    assert found.box_A == pytest.approx(PIXEL_SIZE * BOX)
    assert errors(found.fourier, found.images, grid)[1] < 1e-5
    # The frequencies of the grid follow the side of the box in angstrom, which stays.
    k, angle = torch.from_numpy(2 * grid.radii / (PIXEL_SIZE * BOX))[:, None], torch.from_numpy(np.pi / 2 - grid.angles)
    np.testing.assert_allclose(found.polar_ctf.numpy(), ctf_values(ds.batch(range(N)).ctf, k, angle).numpy(), atol=1e-6)


def test_an_image_that_is_not_finite_leaves_the_others_alone(tmp_path: Path) -> None:
    images = numbered_images(N, BOX)
    images[4, 3, 2] = np.nan
    path, _ = write_particles(tmp_path, N, box=BOX, blob__path=["J1/all.mrc"] * N, blob__idx=np.arange(N, dtype=np.uint32))
    write_stack(tmp_path / "J1/all.mrc", images)
    found = PolarCollate(GRID, normalize="max", unit_power=True)(IndexedDataset(path).batch(range(N)))
    assert found.fourier[4].isnan().all()
    others = [n for n in range(N) if n != 4]
    np.testing.assert_allclose(found.fourier[others].numpy(), polar_images(found.images[others].numpy(), BOX / 4, 20), rtol=0, atol=1e-4)


def test_a_constant_image_has_a_transform_of_zeros_and_a_warning(tmp_path: Path) -> None:
    path, _ = write_particles(tmp_path, 3, box=BOX, stacks=1)
    write_stack(tmp_path / "J1/extract/stack_0.mrc", np.ones((3, BOX, BOX), "f4"))
    with pytest.warns(UserWarning, match="3 of 3 images are constant"):
        found = PolarCollate(GRID, normalize="max", unit_power=True)(IndexedDataset(path).batch(range(3)))
    assert not found.fourier.any()


@pytest.mark.parametrize(("box", "rms_bound"), [(128, 1e-5), (256, 2e-5)])
def test_single_precision_keeps_to_its_bounds_on_the_whole_grid_of_large_boxes(box: int, rms_bound: float) -> None:
    grid = PolarGrid.of_box(box)
    images = torch.randn(4, box, box, generator=torch.Generator().manual_seed(box))
    found = to_polar(images, grid, eps=1e-6, dtype=torch.complex64)
    # Some shells by the definition, those of the highest frequencies among them, where rounded coordinates weigh most.
    shells = [0, grid.n_shells // 3, 2 * grid.n_shells // 3, *range(grid.n_shells - 4, grid.n_shells)]
    at = 4 * np.pi / box * (np.arange(box) - box // 2)
    exact = np.empty((4, len(shells), grid.n_inplanes), np.complex128)
    for k, radius in enumerate(grid.radii[shells]):
        down, across = (np.exp(-1j * at[:, None] * radius * part(grid.angles)) for part in (np.cos, np.sin))
        exact[:, k] = ((images.numpy().astype(np.float64) @ across) * down).sum(1) * (4 * np.pi / box)
    away = np.abs(found.numpy()[:, shells] - exact)
    assert away.max() < 3e-5 * np.abs(exact).max()
    assert np.sqrt((away**2).mean() / (np.abs(exact) ** 2).mean()) < rms_bound


# --- CTF


@each_grid
def test_the_ctf_has_its_angles_from_columns_to_rows(ds: IndexedDataset, grid: PolarGrid) -> None:
    optics = ds.particles.ctf
    expected = reference.ctf_true(
        grid.radii,
        grid.angles,
        BOX * PIXEL_SIZE,
        defocus_u_A=optics.defocus_u,
        defocus_v_A=optics.defocus_v,
        angle_rad=optics.astigmatism_angle_rad,
        phase_shift_rad=optics.phase_shift_rad,
        spherical_aberration_mm=2.7,
        voltage_kv=300,
        amplitude_contrast=0.1,
    )
    double = PolarCollate(grid, dtype=torch.float64)(ds.batch(range(N))).polar_ctf.numpy()
    np.testing.assert_allclose(double, expected, atol=1e-6)  # the table is in single precision
    single = PolarCollate(grid)(ds.batch(range(N))).polar_ctf.numpy()
    np.testing.assert_allclose(single, double, atol=1e-7)


TERMS = [
    ("bfactor",),
    ("tetrafoil",),
    ("anisomag",),
    ("beam_tilt",),
    ("trefoil",),
    ("bfactor", "beam_tilt", "trefoil", "tetrafoil", "anisomag"),
]


@each_grid
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
def test_terms_of_higher_order_are_applied_where_they_are_asked_for(ds: IndexedDataset, grid: PolarGrid, terms: tuple[Any, ...]) -> None:
    k, angle = torch.from_numpy(2 * grid.radii / (BOX * PIXEL_SIZE))[:, None], torch.from_numpy(np.pi / 2 - grid.angles)
    expected = ctf_values(ds.batch(range(N)).ctf, k, angle, terms=terms)
    found = PolarCollate(grid, dtype=torch.float64, ctf_terms=terms)(ds.batch(range(N))).polar_ctf
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=1e-12)
    single = PolarCollate(grid, ctf_terms=terms)(ds.batch(range(N))).polar_ctf
    assert single.dtype == (torch.complex64 if expected.is_complex() else torch.float32)
    np.testing.assert_allclose(single.numpy(), expected.numpy(), rtol=0, atol=1e-6)
    plain = PolarCollate(grid, dtype=torch.float64)(ds.batch(range(N))).polar_ctf
    assert (found - plain).abs().amax((1, 2)).min() > 1e-3


def test_half_a_turn_on_a_complex_ctf_is_the_conjugate_and_so_is_the_transform(ds: IndexedDataset) -> None:
    found = PolarCollate(GRID, ctf_terms=("beam_tilt", "trefoil"))(ds.batch(range(N)))
    half = GRID.n_inplanes // 2
    assert found.polar_ctf.imag.abs().max() > 0.1
    for values in (found.polar_ctf, found.fourier):
        assert torch.equal(values[..., half:], values[..., :half].conj())


def test_without_optics_in_the_table_there_is_no_ctf(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_particles(tmp_path, N, box=BOX, **WITHOUT_OPTICS)[0])
    found = PolarCollate(GRID)(dataset.batch(range(N)))
    assert found.polar_ctf is None
    assert errors(found.fourier, found.images, GRID)[1] < 1e-5
    assert found[2:5].polar_ctf is None
    assert found.to("meta").polar_ctf is None
    assert "and CTF" not in repr(found)
    same_polar_batch(pickle.loads(pickle.dumps(found)), found)
    same_polar_batch(torch.utils.data.default_collate([found[:3][2], found[3:][0]]), found[2:4])  # of two batches


def test_a_term_whose_column_is_not_in_the_table_is_an_error_that_names_it(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_particles(tmp_path, N, box=BOX)[0])
    with pytest.raises(TableError, match="tilt_A"):
        PolarCollate(GRID, ctf_terms=("beam_tilt",))(dataset.batch(range(N)))


# --- the batch


def test_a_batch_tells_what_it_holds(batch: PolarBatch) -> None:
    told = repr(batch)
    assert told.startswith("PolarBatch(11 x 16 x 16 float32 on cpu, 1.5 A/pixel, with ctf, pose; ")
    assert told.endswith("polar Fourier transforms and CTF on 17 shells x 20 angles)")


KEYS = {
    "slice": slice(2, 9, 3),
    "mask": torch.arange(N) % 3 == 1,
    "rows": torch.tensor([7, 0, 7]),
    "list": [3, 1],
    "nothing": slice(0, 0),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_part_of_a_batch_has_its_own_transforms(ds: IndexedDataset, batch: PolarBatch, key: Any) -> None:
    part = batch[key]
    rows = torch.arange(N)[key]
    assert isinstance(part, PolarBatch)
    assert part.index.tolist() == rows.tolist()
    assert part.grid == GRID
    assert torch.equal(part.images, ds.read(rows.numpy()))
    assert torch.equal(part.fourier, batch.fourier[rows])
    assert torch.equal(part.polar_ctf, batch.polar_ctf[rows])


def test_a_single_particle_of_a_batch_has_its_own_transform(batch: PolarBatch) -> None:
    particles = list(batch)
    assert len(particles) == N
    assert all(isinstance(particle, Particle) for particle in particles)
    for row in (0, 5, N - 1):
        same_polar_batch(particles[row].batch, batch[row : row + 1])
        same_polar_batch(pickle.loads(pickle.dumps(particles[row])).batch, batch[row : row + 1])


def test_particles_of_one_batch_collate_with_their_transforms(batch: PolarBatch) -> None:
    same_polar_batch(torch.utils.data.default_collate([batch[8], batch[0], batch[3]]), batch[[8, 0, 3]])


def test_a_grid_beyond_the_nyquist_frequency_of_what_is_left_of_the_images_is_refused(ds: IndexedDataset) -> None:
    with pytest.raises(ArgumentError, match=r"beyond 2, the Nyquist frequency of 8 pixels.*PolarGrid\.of_box\(8\)"):
        PolarCollate(PolarGrid.of_box(BOX), downsample=Downsample(box=8))(ds.batch(range(2)))
    with pytest.raises(ArgumentError, match=r"goes to radius 2\.001, beyond 2"):
        PolarCollate(PolarGrid(2.001, 0.25, 12), downsample=Downsample(box=8))(ds.batch(range(2)))


def test_a_grid_that_is_rounded_beyond_the_nyquist_frequency_is_taken(ds: IndexedDataset) -> None:
    grid = PolarGrid(float(np.nextafter(BOX / 4, np.inf)), 0.25, 12)
    assert PolarCollate(grid)(ds.batch(range(2))).grid == grid


def test_batches_on_different_grids_do_not_collate(batch: PolarBatch) -> None:
    other = PolarCollate(PolarGrid(4.0, 0.5, 8))(ParticleBatch(batch.images, batch.pixel_size, batch.columns))
    with pytest.raises(MixedParticlesError, match="different grids"):
        torch.utils.data.default_collate([batch[0], other[1]])
    with pytest.raises(MixedParticlesError, match="with polar transforms and without"):
        torch.utils.data.default_collate([batch[0], ParticleBatch(batch.images, batch.pixel_size, batch.columns)[1]])


def test_images_that_are_changed_leave_their_transforms_behind(batch: PolarBatch) -> None:
    smaller = Collate(Downsample(factor=2))(batch)
    assert type(smaller) is ParticleBatch
    assert torch.equal(smaller.index, batch.index)


def test_particles_of_several_batches_collate_with_their_transforms(batch: PolarBatch) -> None:
    one, other = batch[:5], batch[5:]
    same_polar_batch(torch.utils.data.default_collate([one[4], other[0], one[1]]), batch[[4, 5, 1]])


def test_a_function_is_mapped_over_every_tensor(batch: PolarBatch) -> None:
    turned = batch.map(lambda tensor: tensor.flip(0))
    same_polar_batch(turned, batch[torch.arange(N - 1, -1, -1)])


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_step_may_ask_the_grid_for_its_points_and_weights(batch: PolarBatch) -> None:
    def power(of: PolarBatch) -> torch.Tensor:
        weights, radii = torch.as_tensor(of.grid.integration_weights), torch.as_tensor(of.grid.radii)[:, None]
        return (of.fourier.abs().square() * weights * radii).sum((1, 2))

    torch.testing.assert_close(torch.compile(power, backend="eager")(batch), power(batch))


def test_a_batch_pickles(batch: PolarBatch) -> None:
    same_polar_batch(pickle.loads(pickle.dumps(batch)), batch)


def test_a_batch_moves_to_a_device_with_all_it_holds(batch: PolarBatch) -> None:
    there = batch.to("meta")
    assert isinstance(there, PolarBatch)
    tensors = {"images": there.images, "fourier": there.fourier, "polar_ctf": there.polar_ctf, "defocus": there.ctf.defocus_u}
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert (there.images.dtype, there.fourier.dtype, there.polar_ctf.dtype) == (torch.float32, torch.complex64, torch.float32)
    assert there.grid == GRID
    same_polar_batch(batch.to("cpu"), batch)
    same_polar_batch(batch.to(), batch)


@pytest.mark.gpu
def test_a_batch_in_page_locked_memory_is_the_same(batch: PolarBatch) -> None:
    pinned = batch.pin_memory()
    assert pinned.fourier.is_pinned()
    assert pinned.polar_ctf.is_pinned()
    same_polar_batch(pinned, batch)


# --- the collate function


def test_a_list_of_particles_is_collated_as_their_batch_is(ds: IndexedDataset) -> None:
    collate = PolarCollate(GRID, normalize="max")
    same_polar_batch(collate([ds[i] for i in (4, 9, 0)]), collate(ds.batch([4, 9, 0])))


def test_a_polar_collate_pickles_and_equals_its_copy() -> None:
    collate = PolarCollate(
        GRID, downsample=Downsample(box=8), normalize="std", dtype=torch.float64, unit_power=True, ctf_terms=("bfactor",)
    )
    copy = pickle.loads(pickle.dumps(collate))
    assert copy == collate
    assert hash(copy) == hash(collate)
    assert copy != PolarCollate(GRID, downsample=Downsample(box=8), normalize="std", dtype=torch.float64, unit_power=True)


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "spawn")])
def test_it_collates_for_a_data_loader(ds: IndexedDataset, workers: int, method: Any) -> None:
    collate = PolarCollate(GRID, normalize="max", unit_power=True, ctf_terms=("beam_tilt",))
    loader = DataLoader(ds, batch_size=4, num_workers=workers, multiprocessing_context=method, collate_fn=collate)
    for first, found in zip(range(0, N, 4), loader, strict=True):
        same_batch(found, Collate(normalize="max")(ds.batch(range(first, min(first + 4, N)))))
        expected = collate(ds.batch(found.index))  # with another number of threads, perhaps
        np.testing.assert_allclose(found.fourier.numpy(), expected.fourier.numpy(), rtol=0, atol=1e-5)
        assert torch.equal(found.polar_ctf, expected.polar_ctf)
        assert found.grid == GRID


FORK = """
    import sys
    import torch
    from torch.utils.data import DataLoader
    from cryolike_data import IndexedDataset
    from cryolike_data.polar_batch import PolarBatch, PolarCollate
    from cryolike_data.transforms import PolarGrid

    torch.set_num_threads(int(sys.argv[3]))
    dataset = IndexedDataset(sys.argv[1])
    collate = PolarCollate(PolarGrid.of_box(dataset.box, n_inplanes=20), normalize="max", ctf_terms=("beam_tilt",))
    if sys.argv[2] == "before":
        collate(dataset.batch(range(4)))
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context="fork", collate_fn=collate, timeout=5)
    for _ in range(2):
        for found in list(loader):
            wanted = collate(dataset.batch(found.index)) if sys.argv[2] == "before" else found
            assert isinstance(found, PolarBatch)
            torch.testing.assert_close(found.fourier, wanted.fourier, rtol=0, atol=1e-5)
            assert torch.equal(found.polar_ctf, wanted.polar_ctf)
            print(*found.index.tolist())
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "transformed",
    [
        "after",
        "before",
    ],
)
def test_it_collates_in_workers_that_are_forked_whether_or_not_this_process_has_transformed(
    folder: Path, transformed: str, threads: int
) -> None:
    ran = run_python(FORK, folder / "J1/particles.cs", transformed, threads)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(row) for row in range(N)] * 2


def test_a_worker_leaves_work_for_cuda_to_the_main_process(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(collate_module, "get_worker_info", lambda: object())
        left = PolarCollate(GRID, device="cuda")([ds[i] for i in range(3)])
    assert left.pending is not None
    assert not isinstance(left, PolarBatch)
    here = replace(left, pending=PolarCollate(GRID)._process).finish()  # what it would do, on the device that there is
    same_polar_batch(here, PolarCollate(GRID)(ds.batch(range(3))))


@pytest.mark.parametrize("grid", [None, 16, (4.0, 0.25, 20), "grid", PolarGrid], ids=str)
def test_a_grid_that_is_none_is_refused_at_once(ds: IndexedDataset, grid: Any) -> None:
    with pytest.raises(ArgumentError, match=r"grid is a PolarGrid, such as PolarGrid\.of_box\(64\), not"):
        PolarCollate(grid)
    if grid is not None:
        with pytest.raises(ArgumentError, match="grid is a PolarGrid"):
            stream(ds, polar=grid)


@pytest.mark.parametrize("options", [{"dtype": torch.int16}, {"downsample": 8}, {"normalize": "mean"}, {"device": "gpu"}], ids=str)
def test_arguments_that_cannot_work_are_refused_as_by_collate(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        PolarCollate(GRID, **options)


@pytest.mark.parametrize("options", [{"unit_power": True}, {"ctf_terms": ("bfactor",)}], ids=str)
def test_options_of_the_transforms_need_a_grid(ds: IndexedDataset, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"pass polar=PolarGrid\.of_box"):
        stream(ds, **options)


def test_a_term_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(ArgumentError, match="defocus"):
        PolarCollate(GRID, ctf_terms=("defocus",))  # type: ignore[arg-type]


# --- stream


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cryolike": {"normalize": "max", "unit_power": True},
    "double": {"dtype": torch.float64, "ctf_terms": ("beam_tilt", "bfactor")},
    "small": {"downsample": Downsample(box=8), "normalize": "std"},
    "cpu": {"device": "cpu", "normalize": "max"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_stream_gives_what_the_collate_function_gives(ds: IndexedDataset, options: dict[str, Any]) -> None:
    grid = PolarGrid.of_box(8) if "downsample" in options else GRID
    collate = PolarCollate(grid, **options)
    seen = []
    for found in stream(ds, batch_size=4, shuffle=True, seed=3, polar=grid, **options):
        same_polar_batch(found, collate(ds.batch(found.index)))
        seen += found.index.tolist()
    assert sorted(seen) == list(range(N))


def test_batches_of_a_stream_that_are_held_never_change(ds: IndexedDataset) -> None:
    held, copies = [], []
    for found in stream(ds, batch_size=2, polar=GRID, prefetch=1):
        held.append(found)
        copies.append(found.fourier.clone())
    for found, copy in zip(held, copies, strict=True):
        assert torch.equal(found.fourier, copy)


def test_grids_used_in_turn_in_one_thread_do_not_mix(ds: IndexedDataset) -> None:
    grids = [GRID, ODD_GRID, PolarGrid(3.0, 0.25, 20)]  # the last has other shells at the same angles
    streams = [stream(ds, batch_size=3, polar=grid) for grid in grids]
    for together in zip(*streams, strict=True):
        for grid, found in zip(grids, together, strict=True):
            assert found.grid == grid
            assert errors(found.fourier, found.images, grid)[1] < 1e-5


def test_precisions_used_in_turn_in_one_thread_do_not_mix(ds: IndexedDataset) -> None:
    single, double = stream(ds, batch_size=3, polar=GRID), stream(ds, batch_size=3, polar=GRID, dtype=torch.float64)
    for one, other in zip(single, double, strict=True):
        assert errors(one.fourier, one.images, GRID)[1] < 1e-5
        assert errors(other.fourier, other.images, GRID)[1] < 3e-12


def test_streams_in_threads_of_their_own_do_not_disturb_each_other(ds: IndexedDataset) -> None:
    grids = [GRID, GRID, ODD_GRID, PolarGrid(3.0, 0.25, 20)]
    exact = {grid: to_polar_exact(ds.read(slice(None)).double(), grid) for grid in grids}
    failures: list[BaseException] = []

    def consume(grid: PolarGrid, batch_size: int) -> None:
        try:
            loader = stream(ds, batch_size=batch_size, shuffle=True, polar=grid)
            for _ in range(10):
                for found in loader:
                    wanted = exact[grid][found.index]
                    assert (found.fourier - wanted).abs().max() < 3e-5 * wanted.abs().max()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=consume, args=(grid, 2 + k)) for k, grid in enumerate(grids)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


MEMORY = """
    import sys
    import torch
    from cryolike_data import IndexedDataset, stream
    from cryolike_data.transforms import PolarGrid

    torch.set_num_threads(1)

    from support import anonymous_bytes

    dataset, grids = IndexedDataset(sys.argv[1]), (PolarGrid.of_box(32), PolarGrid.of_box(32, n_inplanes=63))
    def epochs(count, grids):
        for _ in range(count):
            for _ in zip(*[stream(dataset, batch_size=16, polar=grid) for grid in grids]):
                pass

    for chosen in (grids[:1], grids):  # one plan that stays, and plans that are made for every batch
        epochs(1, chosen)
        before = anonymous_bytes()
        epochs(5, chosen)
        print(anonymous_bytes() - before)
"""


def test_memory_does_not_grow_with_the_batches(tmp_path: Path) -> None:
    path, _ = write_particles(tmp_path, 128, box=32)
    ran = run_python(MEMORY, path)
    assert ran.returncode == 0, ran.stderr
    # The transforms of 40 batches take 11 MB and more.
    assert [int(line) > 4e6 for line in ran.stdout.split()] == [False, False]


def test_nothing_is_warned_of_on_the_way(ds: IndexedDataset) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(stream(ds, batch_size=4, polar=GRID, normalize="max", unit_power=True))) == 3
