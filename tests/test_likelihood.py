"""The integrated likelihood against brute force, CryoLike's own numbers, and images whose pose is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import likelihood_reference as reference
import numpy as np
import pytest
import torch
from likelihood_support import (
    DISPLACEMENTS_A,
    PIXEL_SIZE,
    background,
    best_pose,
    blobs,
    by_template,
    case,
    integrated,
    optics,
    particle_batch,
    true_ctf,
    with_ctf,
)
from scipy.spatial.transform import Rotation
from torch.overrides import TorchFunctionMode

from cryolike_data import Downsample, IndexedDataset
from cryolike_data.demo import DemoProject, clean_images, project_model
from cryolike_data.errors import ArgumentError, TableError
from cryolike_data.likelihood import (
    ImageLikelihood,
    Templates,
    displacement_grid,
    integrated_log_likelihood,
    read_volume,
    viewing_directions,
)
from cryolike_data.polar_batch import PolarCollate
from cryolike_data.transforms import PolarGrid, to_polar_exact

SMALL = case()
NUMBERS = ("log_likelihood", "template", "displacement_A", "rotation_rad", "pose", "shift_A", "by_template")


def compare(of: Any = SMALL, displacements_A: Any = DISPLACEMENTS_A, memory_bytes: int | None = None, **options: Any) -> ImageLikelihood:
    return integrated_log_likelihood(of.batch(**options), of.templates, displacements_A, by_template=True, memory_bytes=memory_bytes)


def same(found: ImageLikelihood, expected: ImageLikelihood, atol: float = 1e-9) -> None:
    for name in NUMBERS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=atol, err_msg=name)


# Against CryoLike's numbers


def of_golden(demo: dict[str, np.ndarray], dtype: torch.dtype) -> ImageLikelihood:
    """From its pixels and optics; CryoLike's angle of astigmatism counts from rows, and so do its displacements."""
    n, grid = len(demo["phys"]), PolarGrid(float(demo["radius_max"]), float(demo["dist_radii"]), int(demo["n_inplanes"]))
    names = {"voltage": "voltage_kv", "sphericalAberration": "spherical_aberration_mm", "amplitudeContrast": "amplitude_contrast"}
    names |= {"defocusU": "defocus_u", "defocusV": "defocus_v", "phaseShift": "phase_shift_rad"}
    table = {ours: np.broadcast_to(demo[theirs], n) for theirs, ours in names.items()}
    batch = particle_batch(
        demo["phys"],
        table | {"astigmatism_angle_rad": np.pi / 2 - demo["defocusAngle"]},
        float(demo["pixel_size"]),
    )
    fourier, prior = torch.from_numpy(demo["templates_fourier"]), torch.from_numpy(demo["weights_viewing"]).log()
    polar = PolarCollate(grid, normalize="max", unit_power=True, dtype=dtype)(batch)
    templates = Templates(fourier, grid, polar.box_A, torch.zeros(len(fourier), 3), prior)
    return integrated_log_likelihood(polar, templates, demo["displacements_A"].T[:, ::-1].copy())


@pytest.mark.shared
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-4), (torch.float32, 1e-3)])
def test_likelihoods_of_cryolikes_images_are_the_exact_ones(
    likelihood_demo: dict[str, np.ndarray], dtype: torch.dtype, atol: float
) -> None:
    found = of_golden(likelihood_demo, dtype)
    np.testing.assert_allclose(found.log_likelihood, likelihood_demo["log_likelihood_exact"], rtol=0, atol=atol)
    np.testing.assert_array_equal(found.template, likelihood_demo["optimal_template_M"])


@pytest.mark.shared
def test_from_cryolikes_own_likelihoods_they_differ_by_its_mask_term_and_weights(likelihood_demo: dict[str, np.ndarray]) -> None:
    demo = likelihood_demo
    radii, angles, W = reference.polar_points(float(demo["radius_max"]), float(demo["dist_radii"]), int(demo["n_inplanes"]))
    few, box = slice(0, 3), demo["phys"].shape[-1]
    at = (
        demo["ctf"][few],
        W,
        *reference.coordinates(radii, angles),
        demo["displacements_A"].T.astype(float),
        box * 2.0,
        box**2,
    )
    of = (demo["images_fourier"][few], demo["templates_fourier"], *at, demo["weights_viewing"])
    theirs, exact = (reference.integrated(*of, variant=variant) for variant in ("cryolike", "exact"))
    difference = of_golden(demo, torch.float64).log_likelihood.numpy()[few] - demo["log_likelihood_M"][few]
    np.testing.assert_allclose(difference, exact - theirs, rtol=0, atol=1e-4)
    assert np.abs(difference).min() > 1


# Against brute force


@pytest.mark.parametrize(
    ("box", "options"),
    [
        (16, {"n_inplanes": 20}),
        (17, {"n_inplanes": 22}),  # an odd number of angles in half a turn
        (19, {"n_inplanes": 38, "reach": 0.6}),
        (20, {"n_inplanes": 8, "images": 1}),
        (16, {"n_inplanes": 12, "templates": 1}),
        (18, {"n_inplanes": 16, "images": 6, "seed": 5}),  # of one image the likeliest pose and the likeliest template are not together
    ],
)
def test_likelihoods_and_poses_are_those_of_brute_force(box: int, options: dict[str, Any]) -> None:
    of = case(box, **options)
    values, prior = of.of_all_poses(), of.templates.log_weights
    found = compare(of)
    np.testing.assert_allclose(found.log_likelihood, integrated(values, prior), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.by_template, by_template(values), rtol=0, atol=1e-6)
    template, displacement, rotation = best_pose(values, prior)
    np.testing.assert_array_equal(found.template, template)
    np.testing.assert_array_equal(found.displacement_A, DISPLACEMENTS_A[displacement])
    np.testing.assert_allclose(found.rotation_rad, of.grid.angles[rotation], rtol=0, atol=1e-14)
    assert len(found) == len(of.images)
    assert all(getattr(found, name).dtype == torch.float64 for name in NUMBERS if name != "template")


def test_images_of_unit_power_are_compared_as_they_are() -> None:
    expected = integrated(SMALL.of_all_poses(unit_power=True), SMALL.templates.log_weights)
    np.testing.assert_allclose(compare(unit_power=True).log_likelihood, expected, rtol=0, atol=1e-6)


def test_of_downsampled_images_the_smaller_box_counts() -> None:
    of, large = case(16, reach=0.9), case(32, images=2)
    batch = PolarCollate(of.grid, downsample=Downsample(box=16), dtype=torch.float64)(particle_batch(large.images, large.table, 1.0))
    found = integrated_log_likelihood(batch, of.templates, DISPLACEMENTS_A)
    expected = replace(of, images=batch.images.numpy(), table=large.table).of_all_poses()
    np.testing.assert_allclose(found.log_likelihood, integrated(expected, of.templates.log_weights), rtol=0, atol=1e-6)


@pytest.mark.parametrize("terms", [("beam_tilt",), ("beam_tilt", "trefoil")])
@pytest.mark.parametrize("n_inplanes", [20, 22])
def test_odd_aberrations_make_the_same_of_the_template_as_of_the_image(terms: tuple[Any, ...], n_inplanes: int) -> None:
    columns = {"tilt_A": [[3e4, -2e4], [1e4, 5e4], [-4e4, 0]], "trefoil_A": [[-6e4, 1e4], [2e4, 0], [4e4, 4e4]]}
    asked = {name: column for name, column in columns.items() if name.removesuffix("_A") in " ".join(terms)}
    of = case(n_inplanes=n_inplanes, **asked)
    found, without = compare(of, ctf_terms=terms), compare(of)
    values = of.of_all_poses()
    np.testing.assert_allclose(of.batch(ctf_terms=terms).polar_ctf, true_ctf(of.table, of.grid, of.templates.box_A), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.by_template, by_template(values), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found.template, best_pose(values, of.templates.log_weights)[0])
    assert (found.by_template - without.by_template).abs().max() > 0.1


def test_double_precision_is_that_of_the_images_and_single_precision_comes_close() -> None:
    double, single = compare(), compare(dtype=torch.float32)
    same(single, double, atol=1e-3)
    assert not torch.equal(single.log_likelihood, double.log_likelihood)
    single_templates = replace(SMALL, templates=SMALL.templates.to(dtype=torch.complex64))
    same(compare(single_templates), double, atol=1e-3)


# What must not, and what must, change the result


@pytest.mark.parametrize("memory_bytes", [1, 30_000, 100_000, 400_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_size_of_a_step_changes_nothing(memory_bytes: int, dtype: torch.dtype) -> None:
    of = case(templates=7, images=4)
    same(compare(of, memory_bytes=memory_bytes, dtype=dtype), compare(of, dtype=dtype), 1e-9 if dtype == torch.float64 else 1e-3)


class LargestResult(TorchFunctionMode):
    """Keeps the size of the largest tensor that any function of torch gives, bytes."""

    size = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("memory_bytes", [30_000, 100_000])
def test_no_array_of_a_step_is_larger_than_its_memory(memory_bytes: int) -> None:
    of = case(templates=20, images=2)
    with LargestResult() as bounded:
        integrated_log_likelihood(of.batch(), of.templates, DISPLACEMENTS_A, memory_bytes=memory_bytes)
    with LargestResult() as unbounded:
        integrated_log_likelihood(of.batch(), of.templates, DISPLACEMENTS_A)
    assert bounded.size <= memory_bytes < unbounded.size


def test_the_order_of_displacements_and_templates_changes_nothing() -> None:
    found, turned = compare(), compare(displacements_A=DISPLACEMENTS_A[::-1].tolist())
    same(turned, found)
    t = SMALL.templates
    back = replace(SMALL, templates=Templates(t.fourier.flip(0), t.grid, t.box_A, t.rotvecs.flip(0), t.log_weights.flip(0)))
    other = compare(back)
    np.testing.assert_allclose(other.by_template.flip(1), found.by_template, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(len(t) - 1 - other.template, found.template)
    np.testing.assert_allclose(other.pose, found.pose, rtol=0, atol=1e-12)


def test_an_image_does_not_depend_on_the_others() -> None:
    of = case(images=35)
    together = compare(of)
    for row in (0, 15, 16, 34):
        alone = compare(replace(of, images=of.images[row : row + 1], table={name: c[row : row + 1] for name, c in of.table.items()}))
        for name in NUMBERS:
            np.testing.assert_allclose(getattr(alone, name)[0], getattr(together, name)[row], rtol=0, atol=1e-9, err_msg=name)


def test_an_image_that_is_not_finite_or_constant_has_nan_and_leaves_the_others_alone() -> None:
    images = SMALL.images.copy()
    images[0, 3, 4], images[2] = np.nan, 5.0
    with pytest.warns(UserWarning, match="1 of 3 images are constant"):
        found = compare(replace(SMALL, images=images), normalize="max")
    expected = compare(normalize="max")
    for name in NUMBERS:
        if name != "template":
            assert getattr(found, name)[[0, 2]].isnan().all(), name
        np.testing.assert_allclose(getattr(found, name)[1], getattr(expected, name)[1], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_transform_of_a_constant_has_nan_like_any_constant_image(dtype: torch.dtype) -> None:
    batch = SMALL.batch(dtype)
    fourier = batch.fourier.clone()
    fourier[1] = 3 * background(SMALL.grid)
    found = integrated_log_likelihood(replace(batch, fourier=fourier), SMALL.templates, DISPLACEMENTS_A)
    np.testing.assert_array_equal(found.log_likelihood.isnan(), [False, True, False])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_image_that_is_a_template_to_the_last_digit_has_a_finite_likelihood(dtype: torch.dtype) -> None:
    batch = SMALL.batch(dtype)
    shown = replace(batch, fourier=(batch.polar_ctf * SMALL.templates.fourier[[2, 0, 3]].roll(-6, -1)).to(dtype.to_complex()))
    found = integrated_log_likelihood(shown, SMALL.templates, np.zeros((1, 2)), by_template=True)
    assert found.by_template.isfinite().all()
    np.testing.assert_array_equal(found.template, [2, 0, 3])
    np.testing.assert_allclose(found.rotation_rad, SMALL.grid.angles[6], rtol=0, atol=1e-12)
    assert (found.log_likelihood - integrated_log_likelihood(batch, SMALL.templates, np.zeros((1, 2))).log_likelihood).min() > 100


@pytest.mark.parametrize("factor", [1e-3, 7.0, -7.0])
def test_the_scale_of_an_image_adds_a_constant_and_its_contrast_does_not_matter(factor: float) -> None:
    found, scaled = compare(), compare(replace(SMALL, images=factor * SMALL.images))
    shift = -2 * (16**2 / 2 - 2) * math.log(abs(factor))
    expected = replace(found, log_likelihood=found.log_likelihood + shift, by_template=found.by_template + shift)
    same(scaled, expected)


@pytest.mark.parametrize("factor", [-50.0, 1e-25, 1e25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_scale_of_the_templates_does_not_matter_beyond_its_logarithm(factor: float, dtype: torch.dtype) -> None:
    scaled = replace(SMALL.templates, fourier=(factor * SMALL.templates.fourier).to(dtype.to_complex()))
    expected = compare().by_template - math.log(abs(factor))
    atol = 1e-9 if dtype == torch.float64 else 1e-3
    np.testing.assert_allclose(compare(replace(SMALL, templates=scaled), dtype=dtype).by_template, expected, rtol=0, atol=atol)


def test_the_most_likely_of_two_templates_that_differ_in_scale_is_the_smaller_one() -> None:
    given = SMALL.templates
    twice = Templates(torch.cat([given.fourier, given.fourier / 2]), given.grid, given.box_A, given.rotvecs.repeat(2, 1))
    assert (compare(replace(SMALL, templates=twice)).template >= len(given)).all()


@pytest.mark.parametrize("offset", [-3.0, 1.0, 40.0])
def test_a_constant_background_of_an_image_changes_nothing(offset: float) -> None:
    batch = SMALL.batch()
    lifted = replace(batch, fourier=batch.fourier + offset * background(SMALL.grid))
    found = integrated_log_likelihood(lifted, SMALL.templates, DISPLACEMENTS_A, by_template=True)
    same(found, compare(), atol=1e-8)
    # Of pixels, centring takes out what is exactly constant.
    same(compare(replace(SMALL, images=SMALL.images + offset), normalize="max"), compare(normalize="max"))


def test_a_template_with_no_prior_is_as_good_as_not_there() -> None:
    t = SMALL.templates
    prior = t.log_weights.clone()
    prior[1] = -math.inf
    rest = [0, 2, 3]
    expected = compare(replace(SMALL, templates=Templates(t.fourier[rest], t.grid, t.box_A, t.rotvecs[rest], prior[rest])))
    found = compare(replace(SMALL, templates=replace(t, log_weights=prior)))
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(found.template, torch.tensor(rest)[expected.template])
    assert found.by_template[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_inplanes", [8, 16, 20])
def test_a_template_of_nothing_but_background_gives_finite_numbers_and_leaves_the_others_alone(n_inplanes: int, dtype: torch.dtype) -> None:
    plain = {"amplitude_contrast": 1.0, "defocus_u": 0.0, "defocus_v": 0.0, "spherical_aberration_mm": 0.0, "phase_shift_rad": 0.0}
    of = case(n_inplanes=n_inplanes, **plain)  # the CTF is 1
    fourier = of.templates.fourier.clone()
    fourier[2] = background(of.grid)
    found = compare(replace(of, templates=replace(of.templates, fourier=fourier)), np.zeros((1, 2)), dtype=dtype)
    expected = compare(of, np.zeros((1, 2)), dtype=dtype)
    assert found.by_template.isfinite().all()
    rest = [0, 1, 3]
    np.testing.assert_allclose(found.by_template[:, rest], expected.by_template[:, rest], rtol=0, atol=1e-9)


def test_the_matrix_is_given_only_if_it_is_asked_for() -> None:
    found = integrated_log_likelihood(SMALL.batch(), SMALL.templates, DISPLACEMENTS_A)
    assert found.by_template is None
    assert repr(found) == "ImageLikelihood(3 images)"
    assert repr(compare()) == "ImageLikelihood(3 images, given each of 4 templates)"


# Poses and shifts


@pytest.mark.parametrize("box", [24, 25])
def test_pose_and_shift_are_those_the_image_was_made_with(box: int) -> None:
    turns = np.array([0, 0, 5, 6, 12, 17, 23, 9])
    displacements_A = np.array([[0, 0], [1.5, 0], [0, -3], [3, 0], [-1.5, 1.5], [1.5, 1.5], [0, 1.5], [-3, 0]])
    of = Rotation.from_rotvec([[0.3, -0.2, 0.5], [1.4, 0.8, -0.3], [-0.6, 1.7, 1.1]])
    # Image i is template i % 3, displaced, then turned: a density at c of the template is seen at Rz (c + d), which is E^T = Rz E0^T and
    # -shift = Rz d.
    turn = Rotation.from_rotvec(np.outer(2 * np.pi / 24 * turns, [0, 0, 1]))
    pose = of[np.arange(8) % 3] * turn.inv()
    shift = -turn.apply(np.pad(displacements_A, ((0, 0), (0, 1))))[:, :2]
    model, grid, table = blobs(box * PIXEL_SIZE), PolarGrid.of_box(box, n_inplanes=24), optics(8)
    images = with_ctf(project_model(model, pose.as_rotvec(), shift, box, PIXEL_SIZE), table)
    images += 0.02 * images.std() * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    shown = to_polar_exact(project_model(model, of.as_rotvec(), np.zeros((3, 2)), box, PIXEL_SIZE).double(), grid)
    templates = Templates(shown, grid, box * PIXEL_SIZE, torch.from_numpy(of.as_rotvec()))
    batch = PolarCollate(grid, normalize="max", dtype=torch.float64)(particle_batch(images.numpy(), table))
    found = integrated_log_likelihood(batch, templates, displacement_grid(3.0, 1.5))
    np.testing.assert_array_equal(found.template, np.arange(8) % 3)
    np.testing.assert_allclose(found.displacement_A, displacements_A, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.rotation_rad, 2 * np.pi / 24 * turns, rtol=0, atol=1e-12)
    np.testing.assert_allclose(Rotation.from_rotvec(found.pose).as_matrix(), pose.as_matrix(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.shift_A, shift, rtol=0, atol=1e-12)


def test_a_volume_finds_poses_and_shifts_of_the_particles_that_show_it(demo: DemoProject) -> None:
    rows = np.arange(10)
    with np.load(demo.truth, allow_pickle=False) as truth:
        rotvec, shift_A = truth["rotvec"][rows].astype(float), truth["shift_A"][rows].astype(float)
    batch = replace(IndexedDataset(demo.indexed).batch(rows), images=clean_images(demo, rows))
    grid = PolarGrid.of_box(batch.box, resolution_factor=0.8, n_inplanes=16)
    templates = Templates.from_volume(demo.volume, grid, rotvecs=rotvec)
    found = integrated_log_likelihood(PolarCollate(grid, normalize="max")(batch), templates, -shift_A)
    np.testing.assert_array_equal(found.template, rows)
    np.testing.assert_allclose(found.shift_A, shift_A, rtol=0, atol=1e-6)
    np.testing.assert_allclose(Rotation.from_rotvec(found.pose).as_matrix(), Rotation.from_rotvec(rotvec).as_matrix(), rtol=0, atol=1e-6)


# Templates and displacements


def test_templates_of_a_volume_look_from_all_directions(demo: DemoProject) -> None:
    grid = PolarGrid(4.0, 0.5, 12)
    templates = Templates.from_volume(demo.volume, grid, step_deg=60)
    assert templates.fourier.dtype == torch.complex64
    assert templates.box_A == pytest.approx(64)
    np.testing.assert_array_equal(templates.log_weights, viewing_directions(60)[1])
    assert repr(templates) == f"Templates({len(templates)} of 9 shells x 12 angles, box 64 A, complex64 on cpu)"
    seen = Rotation.from_rotvec(templates.rotvecs).as_matrix()[:, :, 2]
    assert np.abs((seen * templates.log_weights.exp().numpy()[:, None]).sum(0)).max() < 0.05
    with np.load(demo.truth, allow_pickle=False) as truth:
        images = project_model(truth, templates.rotvecs, np.zeros((len(templates), 2)), 32, 2.0).double()
    expected = to_polar_exact(images, grid) / 2.0  # line integrals are sums times the voxel size
    np.testing.assert_allclose(templates.fourier, expected, rtol=0, atol=1e-4 * expected.abs().max())


def test_templates_in_double_precision_are_that_accurate(demo: DemoProject) -> None:
    volume, voxel_size = read_volume(demo.volume)
    grid = PolarGrid(4.0, 0.5, 12)
    made = [
        Templates.from_volume(volume, grid, rotvecs=torch.zeros(1, 3), pixel_size=voxel_size, dtype=dtype).fourier
        for dtype in (torch.complex64, torch.complex128)
    ]
    exact = to_polar_exact(volume.double().sum(0)[None], grid)
    off = [float((fourier - exact).abs().max() / exact.abs().max()) for fourier in made]
    assert off[1] < 1e-11 < off[0] < 1e-5


def test_a_tensor_makes_the_templates_that_its_file_makes(demo: DemoProject) -> None:
    volume, voxel_size = read_volume(demo.volume)
    rotvecs, grid = torch.tensor([[0.1, 0.2, 0.3]]), PolarGrid(4.0, 0.5, 12)
    templates = Templates.from_volume(volume, grid, rotvecs=rotvecs, pixel_size=voxel_size, dtype=torch.complex128)
    of_file = Templates.from_volume(str(demo.volume), grid, rotvecs=rotvecs)
    np.testing.assert_allclose(of_file.fourier, templates.fourier, rtol=0, atol=1e-5 * templates.fourier.abs().max())
    assert of_file.box_A == templates.box_A
    assert Templates.from_volume(demo.volume, grid, rotvecs=rotvecs, pixel_size=3.0).box_A == 96
    assert Templates.from_volume(volume, grid, rotvecs=rotvecs, pixel_size=(3.0, 3.0)).box_A == 96
    with pytest.raises(ArgumentError, match="needs pixel_size="):
        Templates.from_volume(volume, grid, rotvecs=rotvecs)
    for wrong in ("wide", (1.0, 2.0), -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="pixel_size is a positive number"):
            Templates.from_volume(volume, grid, rotvecs=rotvecs, pixel_size=wrong)
    with pytest.raises(ArgumentError, match=r"grid is a PolarGrid, such as PolarGrid\.of_box\(64\), not 64"):
        Templates.from_volume(demo.volume, 64, rotvecs=rotvecs)  # type: ignore[arg-type]
    for arguments in ({}, {"rotvecs": rotvecs, "step_deg": 30}):
        with pytest.raises(ArgumentError, match="pass either step_deg="):
            Templates.from_volume(volume, grid, pixel_size=2.0, **arguments)


def test_arrays_may_run_backwards_and_have_another_byte_order(demo: DemoProject) -> None:
    volume, rotvecs, grid = (
        read_volume(demo.volume)[0].numpy()[::-1],
        np.array([[0.1, 0.2, 0.3], [1.0, -0.5, 0.2]])[::-1],
        PolarGrid(4.0, 0.5, 12),
    )
    expected = Templates.from_volume(volume.copy(), grid, rotvecs=rotvecs.copy(), pixel_size=2.0)
    for given in (volume, volume.astype(">f4")):
        templates = Templates.from_volume(given, grid, rotvecs=rotvecs, pixel_size=2.0)
        assert torch.equal(templates.fourier, expected.fourier)
        assert torch.equal(templates.rotvecs, expected.rotvecs)
    t = replace(SMALL.templates, rotvecs=SMALL.templates.rotvecs.numpy()[::-1].copy()[::-1])
    found = integrated_log_likelihood(SMALL.batch(), t, DISPLACEMENTS_A[::-1].copy()[::-1])
    assert torch.equal(found.pose, integrated_log_likelihood(SMALL.batch(), SMALL.templates, DISPLACEMENTS_A).pose)


def test_templates_change_dtype_and_keep_the_rest() -> None:
    t = replace(SMALL.templates, rotvecs=SMALL.templates.rotvecs.float())
    single = t.to("cpu", torch.complex64)
    assert (single.fourier.dtype, single.device, single.rotvecs.dtype) == (torch.complex64, torch.device("cpu"), torch.float64)
    np.testing.assert_allclose(single.fourier, t.fourier, rtol=1e-6)
    np.testing.assert_array_equal(single.log_weights, t.log_weights)
    assert t.to().fourier.dtype == torch.complex128


@pytest.mark.parametrize(("radius", "step"), [(0.0, 1.0), (3.0, 1.0), (0.3, 0.1), (2.5, 1.0), (1.0, 1.5)])
def test_displacements_are_a_lattice_in_a_disk(radius: float, step: float) -> None:
    reach = range(-10, 11)
    expected = sorted((i * step, j * step) for i in reach for j in reach if math.hypot(i, j) <= radius / step + 1e-6)
    found = displacement_grid(radius, step)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(sorted(map(tuple, found.tolist())), expected, rtol=0, atol=1e-12)


# Errors


def test_what_does_not_fit_the_templates_is_an_error() -> None:
    t, batch = SMALL.templates, SMALL.batch()
    other = PolarCollate(PolarGrid.of_box(16, n_inplanes=24))(particle_batch(SMALL.images, SMALL.table))
    for wrong, message in (
        (particle_batch(SMALL.images, SMALL.table), "no polar transforms; make it by stream"),
        (batch[0], "no polar transforms; make it by stream"),
        (other, "must share a grid"),
        (replace(batch, pixel_size=2.1), r"share a box; the images' is 33\.6 A, the templates' 32 A"),
    ):
        with pytest.raises(ArgumentError, match=message):
            integrated_log_likelihood(wrong, t, DISPLACEMENTS_A)
    with pytest.raises(TableError, match="passthrough="):
        integrated_log_likelihood(PolarCollate(SMALL.grid)(particle_batch(SMALL.images, {})), t, DISPLACEMENTS_A)


@pytest.mark.parametrize("wrong", [[], [[1.0, 2.0, 3.0]], [1.0, 2.0], [[0.0, math.nan]], np.zeros((0, 2)), [[math.inf, 0.0]]])
def test_displacements_that_are_not_pairs_of_numbers_are_an_error(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="displacements_A"):
        integrated_log_likelihood(SMALL.batch(), SMALL.templates, wrong)


def test_no_memory_at_all_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="memory_bytes is positive"):
        compare(memory_bytes=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fourier": torch.zeros(4, 17, 20, dtype=torch.complex64)}, "4 of 4 templates are zero or not finite, the first is number 0"),
        ({"fourier": SMALL.templates.fourier * torch.tensor([1, 1, math.nan, 1])[:, None, None]}, "1 of 4 .* the first is number 2"),
        ({"fourier": SMALL.templates.fourier * torch.tensor([1, math.inf, 1, 1])[:, None, None]}, "1 of 4 .* the first is number 1"),
        ({"fourier": SMALL.templates.fourier[:, 1:]}, r"shape \(S, 17, 20\)"),
        ({"fourier": SMALL.templates.fourier[:0]}, "S > 0"),
        ({"fourier": SMALL.templates.fourier.abs()}, "complex"),
        ({"rotvecs": torch.zeros(3, 3)}, "rotvecs of 4 templates"),
        ({"rotvecs": torch.full((4, 3), math.nan)}, "rotvecs of 4 templates"),
        ({"log_weights": torch.zeros(3)}, "log_weights of 4 templates"),
        ({"log_weights": torch.tensor([0, math.nan, 0, 0])}, "log_weights of 4 templates"),
        ({"log_weights": torch.tensor([0, math.inf, 0, 0])}, "log_weights of 4 templates"),
        ({"box_A": 0.0}, "box_A=0.0"),
        ({"box_A": math.inf}, "box_A=inf"),
    ],
)
def test_templates_that_cannot_be_compared_are_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replace(SMALL.templates, **change)


def test_an_odd_number_of_angles_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"even number of angles .* n_inplanes=5"):
        Templates(torch.ones(1, 5, 5, dtype=torch.complex64), PolarGrid(1.0, 0.25, 5), 10.0, torch.zeros(1, 3))


@pytest.mark.parametrize(("radius", "step"), [(1.0, 0.0), (-1.0, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_a_lattice_without_a_step_or_an_end_is_an_error(radius: float, step: float) -> None:
    with pytest.raises(ArgumentError, match="step_A"):
        displacement_grid(radius, step)


def test_single_precision_is_as_accurate_as_it_says_at_128_pixels() -> None:
    of = case(128, n_inplanes=32, images=3, templates=3, seed=2)
    single, double = (integrated_log_likelihood(of.batch(dtype), of.templates, DISPLACEMENTS_A) for dtype in (torch.float32, torch.float64))
    p = 128**2 / 2 - 2
    assert float((single.log_likelihood - double.log_likelihood).abs().max()) < 3e-7 * p
