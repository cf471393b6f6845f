"""Projections of volumes against closed forms and plain sums, directions on the sphere, and reading of maps."""

from __future__ import annotations

import gzip
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from cryolike_data.demo import DemoProject, project_model
from cryolike_data.errors import ArgumentError, MissingStackError
from cryolike_data.likelihood.projection import project_volume, read_volume, viewing_directions
from cryolike_data.transforms import PolarGrid, to_polar, to_polar_exact


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_rotvecs(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(count, rng=np.random.default_rng(seed)).as_rotvec())


def plain_sum(volume: torch.Tensor, rotvec: np.ndarray, grid: PolarGrid) -> np.ndarray:
    """Transform of the projection as its definition has it: every voxel, turned into the particle frame, at every point."""
    box = len(volume)
    z, y, x = (np.indices(volume.shape) - box // 2).reshape(3, -1)
    seen = Rotation.from_rotvec(rotvec).inv().apply(np.stack([x, y, z], axis=1).astype(np.float64))
    radius, angle = 4 * np.pi / box * grid.radii[:, None, None], grid.angles[:, None]
    phase = radius * (np.cos(angle) * seen[:, 1] + np.sin(angle) * seen[:, 0])
    return 4 * np.pi / box * (np.exp(-1j * phase) @ volume.double().numpy().ravel())


def largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


# ---------------------------------------------------------------------------------------------------------------- project_volume


def test_projections_of_the_demo_volume_are_those_of_its_model(demo: DemoProject) -> None:
    volume, voxel_size = read_volume(demo.volume)
    box = len(volume)
    grid = PolarGrid(0.7 * box / 4, 0.25, 2 * box)
    with np.load(demo.truth, allow_pickle=False) as truth:
        rotvecs = torch.from_numpy(truth["rotvec"][:20]).double()
        images = project_model(truth, rotvecs, np.zeros((20, 2)), box, voxel_size)
    expected = to_polar(images, grid, eps=1e-10)
    found = project_volume(volume, rotvecs, grid) * voxel_size
    assert found.dtype == torch.complex128
    # The model on voxels has aliases, and this much of them inside 0.7 of Nyquist.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * largest(expected))
    wrong = project_volume(volume, -rotvecs, grid) * voxel_size
    assert largest(wrong - expected) > 0.1 * largest(expected)


@pytest.mark.parametrize("box", [8, 9])
@pytest.mark.parametrize("n_inplanes", [1, 2, 7, 10])
@pytest.mark.parametrize("reach", [1.0, 2.3])
def test_transform_is_the_plain_sum_over_turned_voxels(box: int, n_inplanes: int, reach: float) -> None:
    volume, grid = noise(box, box, box), PolarGrid(reach * box / 4, 0.5, n_inplanes)
    rotvecs = torch.cat([random_rotvecs(4), torch.tensor([[0, 0, 0], [0, 0, 5.0], [-7.0, 9.0, 3.0], [torch.pi, 0, 0]])])
    found = project_volume(volume, rotvecs, grid, eps=1e-12)
    expected = np.stack([plain_sum(volume, rotvec, grid) for rotvec in rotvecs.numpy()])
    assert found.shape == (8, grid.n_shells, n_inplanes)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("box", [16, 17])
@pytest.mark.parametrize("n_inplanes", [31, 32])
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_without_rotation_it_is_the_transform_of_the_sum_along_z(box: int, n_inplanes: int, eps: float) -> None:
    volume, grid = noise(box, box, box), PolarGrid(box / 4, 0.25, n_inplanes)
    expected = to_polar_exact(volume.double().sum(0)[None], grid)
    found = project_volume(volume, torch.zeros(1, 3), grid, eps=eps)
    np.testing.assert_allclose(found, expected, rtol=0, atol=10 * eps * largest(expected))


@pytest.mark.parametrize("n_inplanes", [15, 16])
@pytest.mark.parametrize("steps", [1, 5, -2])
def test_turning_in_the_plane_rolls_the_angles_upwards(n_inplanes: int, steps: int) -> None:
    volume, grid = noise(12, 12, 12), PolarGrid(3.0, 0.5, n_inplanes)
    first = Rotation.from_rotvec(random_rotvecs(1).numpy())
    turned = first * Rotation.from_rotvec([0, 0, steps * 2 * np.pi / n_inplanes])
    before, after = project_volume(volume, torch.from_numpy(np.concatenate([first.as_rotvec(), turned.as_rotvec()])), grid, eps=1e-12)
    np.testing.assert_allclose(after, before.roll(steps, -1), rtol=0, atol=1e-10 * largest(before))
    assert largest(after - before.roll(-steps, -1)) > 0.1 * largest(before)


def test_vectors_that_are_a_whole_turn_longer_give_the_same() -> None:
    volume, grid, rotvecs = noise(10, 10, 10), PolarGrid(2.5, 0.5, 12), random_rotvecs(3)
    longer = rotvecs * (1 + 2 * torch.pi / torch.linalg.vector_norm(rotvecs, dim=1, keepdim=True))
    expected = project_volume(volume, rotvecs, grid, eps=1e-12)
    np.testing.assert_allclose(project_volume(volume, longer, grid, eps=1e-12), expected, rtol=0, atol=1e-10 * largest(expected))


def test_many_orientations_give_what_each_gives_alone() -> None:
    volume, grid, rotvecs = noise(6, 6, 6), PolarGrid(1.5, 0.5, 900), random_rotvecs(300)
    together = project_volume(volume, rotvecs, grid)
    assert together[0].numel() * len(rotvecs) > 2 * 2**18  # more points than are transformed at a time
    for row in (0, 1, 144, 145, 146, 299):
        alone = project_volume(volume, rotvecs[row : row + 1], grid)[0]
        np.testing.assert_allclose(together[row], alone, rtol=0, atol=2e-6 * largest(alone), err_msg=str(row))


def test_scale_of_the_volume_goes_through() -> None:
    volume, grid, rotvecs = noise(8, 8, 8), PolarGrid(2.0, 0.5, 8), random_rotvecs(2)
    expected = project_volume(volume, rotvecs, grid)
    found = project_volume(1e-30 * volume.double(), rotvecs, grid)
    np.testing.assert_allclose(found, 1e-30 * expected, rtol=0, atol=1e-35 * largest(expected))


def test_no_orientations_give_no_transforms() -> None:
    grid = PolarGrid(2.0, 0.5, 8)
    assert project_volume(noise(8, 8, 8), torch.empty(0, 3), grid).shape == (0, grid.n_shells, 8)


def test_arguments_are_left_as_they_were() -> None:
    volume, rotvecs = noise(8, 8, 8), random_rotvecs(2)
    before = volume.clone(), rotvecs.clone()
    project_volume(volume, rotvecs, PolarGrid(2.0, 0.5, 8))
    assert torch.equal(volume, before[0])
    assert torch.equal(rotvecs, before[1])


@pytest.mark.parametrize(
    ("volume", "rotvecs", "message"),
    [
        (torch.zeros(8, 8), torch.zeros(1, 3), r"\(D, D, D\)"),
        (torch.zeros(8, 8, 9), torch.zeros(1, 3), r"\(D, D, D\)"),
        (torch.zeros(0, 0, 0), torch.zeros(1, 3), r"\(D, D, D\)"),
        (torch.zeros(8, 8, 8, dtype=torch.complex64), torch.zeros(1, 3), "real"),
        (torch.full((8, 8, 8), torch.nan), torch.zeros(1, 3), "voxels that are NaN"),
        (torch.zeros(8, 8, 8), torch.zeros(3), r"\(S, 3\)"),
        (torch.zeros(8, 8, 8), torch.zeros(1, 4), r"\(S, 3\)"),
        (torch.zeros(8, 8, 8), torch.tensor([[0, 0, torch.nan]]), "rotation vectors are NaN"),
    ],
)
def test_volumes_and_vectors_that_cannot_work_are_refused(volume: torch.Tensor, rotvecs: torch.Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        project_volume(volume, rotvecs, PolarGrid(2.0, 0.5, 8))


@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan")])
def test_an_accuracy_that_is_not_positive_is_refused(eps: float) -> None:
    with pytest.raises(ArgumentError, match="eps"):
        project_volume(noise(8, 8, 8), torch.zeros(1, 3), PolarGrid(2.0, 0.5, 8), eps=eps)


# ------------------------------------------------------------------------------------------------------------ viewing_directions


def seen(rotvecs: torch.Tensor) -> np.ndarray:
    """Directions in the volume frame along which particles with these poses are seen."""
    return Rotation.from_rotvec(rotvecs.numpy()).apply([0.0, 0.0, 1.0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(2, 90))
def test_every_direction_has_one_of_the_grid_within_a_step(step_deg: float) -> None:
    grid = seen(viewing_directions(step_deg)[0])
    anywhere = np.random.default_rng(0).normal(size=(20000, 3))
    anywhere /= np.linalg.norm(anywhere, axis=1, keepdims=True)
    anywhere[:2] = [[0, 0, 1], [0, 0, -1]]
    chord, _ = cKDTree(grid).query(anywhere)
    assert np.rad2deg(2 * np.arcsin(chord.max() / 2)) <= step_deg


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(1, 90))
def test_weights_are_shares_of_the_whole_sphere(step_deg: float) -> None:
    rotvecs, log_weights = viewing_directions(step_deg)
    assert rotvecs.dtype == log_weights.dtype == torch.float64
    assert log_weights.shape == (len(rotvecs),)
    assert float(log_weights.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert float(log_weights.exp().max() / log_weights.exp().min()) < 3


@pytest.mark.parametrize("step_deg", [2.0, 7.3])
def test_directions_are_about_as_many_as_steps_squared_fit_on_the_sphere(step_deg: float) -> None:
    count = len(viewing_directions(step_deg)[0])
    assert count == pytest.approx(4 * np.pi / np.deg2rad(step_deg) ** 2, rel=0.1)


def test_weighted_sums_are_integrals_over_the_sphere() -> None:
    rotvecs, log_weights = viewing_directions(3.0)
    x, y, z = seen(rotvecs).T
    weights = log_weights.exp().numpy()
    for values, mean in ((z, 0), (x, 0), (x * y, 0), (z**2, 1 / 3), (x**2, 1 / 3), (z**4, 1 / 5), (np.exp(z), np.sinh(1))):
        assert weights @ values == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("step_deg", [7.3, 60.0])
def test_directions_of_a_ring_are_evenly_spaced_to_all_digits(step_deg: float) -> None:
    rotvecs, log_weights = viewing_directions(step_deg)
    np.testing.assert_allclose(log_weights.exp().numpy() @ seen(rotvecs), 0, atol=1e-14)


def test_no_direction_comes_twice_and_none_is_turned_in_the_plane() -> None:
    rotations = Rotation.from_rotvec(viewing_directions(6.0)[0].numpy())
    assert len(cKDTree(rotations.apply([0, 0, 1])).query_pairs(np.deg2rad(3.0))) == 0
    azimuth, polar, in_plane = rotations.as_euler("ZYZ").T
    np.testing.assert_allclose(in_plane, 0, atol=1e-12)
    assert np.all((polar > 0) & (polar < np.pi))
    assert len(set(azimuth.round(6))) > 50


def test_a_step_that_divides_half_a_turn_gives_as_many_rings() -> None:
    for rings in (7, 49, 180):
        heights = seen(viewing_directions(180 / rings)[0])[:, 2]
        assert len(set(heights.round(9))) == rings


@pytest.mark.parametrize("step_deg", [0.0, -1.0, 90.1, float("nan"), float("inf")])
def test_a_step_out_of_range_is_refused(step_deg: float) -> None:
    with pytest.raises(ArgumentError, match="step_deg"):
        viewing_directions(step_deg)


# ------------------------------------------------------------------------------------------------------------------- read_volume


def write_map(path: Path, data: np.ndarray, voxel_size: float | tuple[float, float, float] = 1.5, **header: object) -> Path:
    with mrcfile.new(path) as mrc:
        mrc.set_data(data)
        mrc.set_volume()
        mrc.voxel_size = voxel_size
        for name, value in header.items():
            mrc.header[name] = value
    return path


@pytest.mark.parametrize("kind", ["int8", "int16", "uint16", "float16", "float32"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_maps_of_every_mode_and_byte_order_are_read(kind: str, order: str, tmp_path: Path) -> None:
    data = (np.random.default_rng(0).integers(0, 100, (6, 6, 6))).astype(np.dtype(kind).newbyteorder(order))
    volume, voxel_size = read_volume(write_map(tmp_path / "map.mrc", data))
    assert volume.dtype == torch.float32
    assert voxel_size == pytest.approx(1.5)
    assert isinstance(voxel_size, float)
    assert np.array_equal(volume.numpy(), data.astype(np.float64))


def test_axes_of_a_map_are_z_y_x(tmp_path: Path) -> None:
    path = write_map(tmp_path / "map.mrc", np.zeros((4, 4, 4), np.float32))
    with path.open("r+b") as file:  # x is the fastest axis of the file
        file.seek(1024 + 4 * (3 * 16 + 2 * 4 + 1))
        file.write(np.float32(7).tobytes())
    volume, _ = read_volume(str(path))
    assert volume.nonzero().tolist() == [[3, 2, 1]]


def test_bytes_that_imod_marks_as_unsigned_are_read_so(tmp_path: Path) -> None:
    path = write_map(tmp_path / "map.mrc", np.arange(64).reshape(4, 4, 4).astype(np.int8))
    raw = bytearray(path.read_bytes())
    raw[1024] = 200
    path.write_bytes(raw)
    assert read_volume(path)[0][0, 0, 0] == 200 - 256
    raw[152:160] = np.array([1146047817, 0], "<i4").tobytes()
    path.write_bytes(raw)
    assert read_volume(path)[0][0, 0, :2].tolist() == [200, 1]


def test_the_voxel_size_is_that_of_the_cell_which_may_be_larger_than_the_map(tmp_path: Path) -> None:
    path = write_map(tmp_path / "map.mrc", np.zeros((4, 4, 4), np.float32), mx=8, my=8, mz=8, cella=(12.0, 12.0, 12.0))
    assert read_volume(path)[1] == pytest.approx(1.5)


def test_a_gzipped_map_is_read(tmp_path: Path) -> None:
    plain = write_map(tmp_path / "map.mrc", noise(5, 5, 5).numpy())
    packed = tmp_path / "map.mrc.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert torch.equal(read_volume(packed)[0], read_volume(plain)[0])


def test_a_missing_map_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "map.mrc", tmp_path):
        with pytest.raises(MissingStackError, match=path.name):
            read_volume(path)


@pytest.mark.parametrize("content", [b"", b"not a map", bytes(5000)], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_map_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "map.mrc"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"map\.mrc cannot be read as an MRC map"):
        read_volume(path)


def test_a_truncated_map_is_refused(tmp_path: Path) -> None:
    path = write_map(tmp_path / "map.mrc", noise(5, 5, 5).numpy())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArgumentError, match=r"map\.mrc cannot be read as an MRC map"):
        read_volume(path)


@pytest.mark.parametrize("shape", [(4, 4, 5), (5, 4, 4), (4, 5, 4)])
def test_a_map_that_is_no_cube_is_refused(shape: tuple[int, int, int], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="must be a cube"):
        read_volume(write_map(tmp_path / "map.mrc", np.zeros(shape, np.float32)))


@pytest.mark.parametrize("voxel_size", [0.0, (1.5, 1.5, 1.6), (1.5, 0.0, 1.5), -1.5, float("nan")])
def test_an_unusable_voxel_size_is_refused(voxel_size: float, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="equal and positive"):
        read_volume(write_map(tmp_path / "map.mrc", np.zeros((4, 4, 4), np.float32), voxel_size))


def test_a_stack_with_as_many_images_as_pixels_is_not_taken_for_a_map(tmp_path: Path) -> None:
    path = write_map(tmp_path / "stack.mrc", np.zeros((4, 4, 4), np.float32))
    with mrcfile.open(path, "r+") as mrc:
        mrc.set_image_stack()
    with pytest.raises(ArgumentError, match="stack of images"):
        read_volume(path)


@pytest.mark.parametrize("axes", [(3, 2, 1), (2, 1, 3), (0, 0, 0)])
def test_another_order_of_axes_is_refused(axes: tuple[int, int, int], tmp_path: Path) -> None:
    header = dict(zip(("mapc", "mapr", "maps"), axes, strict=True))
    with pytest.raises(ArgumentError, match="MAPC, MAPR, MAPS"):
        read_volume(write_map(tmp_path / "map.mrc", np.zeros((4, 4, 4), np.float32), **header))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_with_a_voxel_that_is_no_number_is_refused(value: float, tmp_path: Path) -> None:
    path = write_map(tmp_path / "map.mrc", np.zeros((4, 4, 4), np.float32))
    with path.open("r+b") as file:
        file.seek(1024 + 4 * 21)
        file.write(np.float32(value).tobytes())
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        read_volume(path)


def test_a_transform_is_not_taken_for_a_map(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="complex"):
        read_volume(write_map(tmp_path / "map.mrc", np.zeros((4, 4, 4), np.complex64)))
