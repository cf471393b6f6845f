"""One test or more for each defect of CryoLike's likelihood and CTF; the numbers are those of the list that the project keeps of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from likelihood_support import DISPLACEMENTS_A, Case, background, best_pose, by_template, case, integrated, optics, particle_batch, true_ctf
from scipy.special import logsumexp
from support import ctf_columns, uids, write_stack, write_table

from cryolike_data import IndexedDataset, stream
from cryolike_data.demo import DemoProject, write_project
from cryolike_data.likelihood import Templates, displacement_grid, integrated_log_likelihood, stream_likelihood
from cryolike_data.polar_batch import PolarBatch, PolarCollate, polar_ctf
from cryolike_data.transforms import PolarGrid

SMALL = case()


def polar(images: np.ndarray, table: dict[str, np.ndarray], grid: PolarGrid) -> PolarBatch:
    return PolarCollate(grid, dtype=torch.float64)(particle_batch(images, table))


def found_in(of: Case, displacements_A: np.ndarray = DISPLACEMENTS_A) -> np.ndarray:
    """(B, S) log-likelihoods of images by templates."""
    found = integrated_log_likelihood(of.batch(), of.templates, displacements_A, by_template=True)
    assert found.by_template is not None
    return found.by_template.numpy()


def noise_seen_through(u: float, v: float, angle_rad: float, n: int, box: int, pixel_size: float) -> np.ndarray:
    """Images of white noise times a CTF that is written out here; the angle of defocus U counts from columns to rows."""
    ky, kx = np.fft.fftfreq(box, pixel_size)[:, None], np.fft.fftfreq(box, pixel_size)
    along = kx * np.cos(angle_rad) + ky * np.sin(angle_rad)
    across = ky * np.cos(angle_rad) - kx * np.sin(angle_rad)
    wavelength, cs_A, k2 = 0.0196875, 2.7e7, kx**2 + ky**2
    gamma = -np.pi * wavelength * (u * along**2 + v * across**2) + np.pi / 2 * cs_A * wavelength**3 * k2**2
    ctf = -np.sqrt(1 - 0.1**2) * np.sin(gamma) + 0.1 * np.cos(gamma)
    noise = np.random.default_rng(4).normal(size=(n, box, box))
    return np.fft.ifft2(np.fft.fft2(noise) * ctf).real.astype(np.float32)


# CryoLike defect 2: the angle of astigmatism is taken from the wrong axis of the image
@pytest.mark.parametrize("angle_rad", [0.0, 0.3, 1.3, -0.4])
def test_the_axis_of_astigmatism_is_the_one_in_the_power_of_the_images(tmp_path: Path, angle_rad: float) -> None:
    n, box, pixel_size, u, v = 40, 64, 2.0, 9000.0, 7000.0
    write_stack(tmp_path / "a.mrc", noise_seen_through(u, v, angle_rad, n, box, pixel_size))
    optics_of_all = {"ctf__df1_A": u, "ctf__df2_A": v, "ctf__df_angle_rad": angle_rad}
    columns = ctf_columns(n) | {name: np.full(n, value, np.float32) for name, value in optics_of_all.items()}
    psize_A, idx = np.full(n, pixel_size, np.float32), np.arange(n, dtype=np.uint32)
    cs = write_table(tmp_path / "t.cs", uid=uids(n), blob__path=["a.mrc"] * n, blob__idx=idx, blob__psize_A=psize_A, **columns)
    grid = PolarGrid.of_box(box)
    ds = IndexedDataset(cs)
    batch = PolarCollate(grid, normalize="max", unit_power=True)(ds.batch(range(n)))
    power = batch.fourier.abs().square().double().mean(0).numpy()

    def agreement(ctf: np.ndarray) -> float:
        return float(np.corrcoef(power.ravel(), (ctf**2).ravel())[0, 1])

    same = {"voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "phase_shift_rad": 0.0}
    transposed = optics(1, **same, defocus_u=u, defocus_v=v, astigmatism_angle_rad=np.pi / 2 - angle_rad)
    assert batch.polar_ctf is not None
    ours = batch.polar_ctf.double().numpy()
    assert agreement(ours[0]) > 0.8
    assert agreement(true_ctf(transposed, grid, batch.box_A)[0]) < 0.5


# CryoLike defect 2, as it shows in images of a model, whose power is far from even at all angles: only in the mean over many views is
# that of a stack the CTF's. What varies with the angle is compared, because all that falls off with the frequency correlates.
def test_on_the_demo_project_the_axis_of_astigmatism_is_the_one_in_the_power_of_the_images(tmp_path: Path) -> None:
    particles = IndexedDataset(write_project(tmp_path / "demo").indexed)
    grid = PolarGrid.of_box(particles.box, n_inplanes=64)
    stacks = particles.particles.file
    mean = torch.zeros(3, stacks.max() + 1, grid.n_shells, grid.n_inplanes, dtype=torch.float64)  # of power, CTF^2, CTF^2 transposed
    for batch in stream(particles, batch_size=100, polar=grid, normalize="std"):
        transposed = replace(batch.ctf, astigmatism_angle_rad=np.pi / 2 - batch.ctf.astigmatism_angle_rad)
        wrong = polar_ctf(transposed, grid, batch.box_A, dtype=torch.float64)
        where = torch.from_numpy(stacks[batch.index.numpy()].astype(np.int64))
        for sums, values in zip(mean, (batch.fourier.abs(), batch.polar_ctf, wrong), strict=True):
            sums.index_add_(0, where, values.double().square())
    weight = torch.from_numpy(np.bincount(stacks)).sqrt()[:, None, None]
    power, ours, theirs = weight * (mean / mean.mean(-1, keepdim=True) - 1)[:, :, 8:40]  # shells where there is signal

    def agreement(ctf: torch.Tensor) -> float:
        return float((power * ctf).sum() / (power.norm() * ctf.norm()))

    assert agreement(ours) > 0.05
    assert agreement(theirs) < 0


# CryoLike defect 3: the larger defocus is always put along the axis, so that U < V turns it by 90 degrees
def test_defocus_u_lies_along_the_axis_also_where_it_is_the_smaller_one() -> None:
    images, grid = np.zeros((2, 16, 16)) + np.eye(16), PolarGrid.of_box(16)
    table = optics(2, defocus_u=[6000, 9000], defocus_v=[9000, 6000], astigmatism_angle_rad=[0.3, 0.3])
    ctf = polar(images, table, grid).polar_ctf
    np.testing.assert_allclose(ctf, true_ctf(table, grid, 32.0), rtol=0, atol=1e-7)
    exchanged = table | {"defocus_u": table["defocus_v"], "defocus_v": table["defocus_u"]}
    turned = exchanged | {"astigmatism_angle_rad": table["astigmatism_angle_rad"] + np.pi / 2}
    np.testing.assert_allclose(polar(images, turned, grid).polar_ctf, ctf, rtol=0, atol=1e-12)
    assert (polar(images, exchanged, grid).polar_ctf - ctf).abs().amax((1, 2)).min() > 0.1


# CryoLike defect 6: what is written as the integrated log-likelihood is the same number for all images
def test_the_written_log_likelihood_is_the_integrated_one_of_each_image(demo: DemoProject, tmp_path: Path) -> None:
    grid, lattice = PolarGrid.of_box(32, resolution_factor=0.6, n_inplanes=24), displacement_grid(3.0, 1.5)
    templates = Templates.from_volume(demo.volume, grid, step_deg=45)
    ds = IndexedDataset(demo.indexed)
    stream_likelihood(ds, templates, lattice, output=tmp_path / "out", batch_size=25, by_template=True, progress=False)
    written = np.load(tmp_path / "out" / "likelihood.npy")
    batch = PolarCollate(grid, normalize="max", unit_power=True)(ds.batch(range(len(ds))))
    found = integrated_log_likelihood(batch, templates, lattice, by_template=True)
    np.testing.assert_allclose(written["log_likelihood"], found.log_likelihood, rtol=0, atol=1e-3)
    assert len(np.unique(written["log_likelihood"])) == len(ds) == 60
    assert written["log_likelihood"].std() > 1
    of_templates = np.load(tmp_path / "out" / "by_template.npy") + templates.log_weights.numpy()
    np.testing.assert_allclose(written["log_likelihood"], logsumexp(of_templates, axis=1), rtol=0, atol=1e-9)


# CryoLike defect 7: weights are added to log-likelihoods as if they were logarithms
def test_a_template_in_two_copies_that_share_its_weight_changes_nothing() -> None:
    t, batch = SMALL.templates, SMALL.batch()
    rows, share = [0, 1, 1, 2, 3, 3], torch.tensor([1, 0.3, 0.7, 1, 0.5, 0.5]).log()
    split = Templates(t.fourier[rows], t.grid, t.box_A, t.rotvecs[rows], t.log_weights[rows] + share)
    found, expected = (integrated_log_likelihood(batch, templates, DISPLACEMENTS_A) for templates in (split, t))
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, rtol=0, atol=1e-9)


# CryoLike defect 7: the result depends on the number of templates
@pytest.mark.parametrize("copies", [2, 9])
def test_the_same_templates_many_times_over_change_nothing(copies: int) -> None:
    t, batch = SMALL.templates, SMALL.batch()
    once = Templates(t.fourier, t.grid, t.box_A, t.rotvecs)
    often = Templates(t.fourier.repeat(copies, 1, 1), t.grid, t.box_A, t.rotvecs.repeat(copies, 1))
    found, expected = (integrated_log_likelihood(batch, templates, DISPLACEMENTS_A) for templates in (often, once))
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(found.template % len(t), expected.template)


# CryoLike defect 7
def test_a_prior_multiplies_likelihoods() -> None:
    t, batch = SMALL.templates, SMALL.batch()
    prior = np.array([0.05, 0.6, 0.3, 0.05])
    found = integrated_log_likelihood(batch, replace(t, log_weights=torch.from_numpy(prior).log()), DISPLACEMENTS_A, by_template=True)
    assert found.by_template is not None
    np.testing.assert_allclose(found.log_likelihood, logsumexp(found.by_template, axis=1, b=prior), rtol=0, atol=1e-9)
    raised = integrated_log_likelihood(batch, replace(t, log_weights=torch.from_numpy(prior).log() + 2), DISPLACEMENTS_A)
    np.testing.assert_allclose(raised.log_likelihood, found.log_likelihood + 2, rtol=0, atol=1e-9)


# CryoLike defect 8: the overlap of template and background is that of the template that is neither displaced nor rotated
def test_the_overlap_with_the_background_is_that_of_the_moved_template() -> None:
    of = replace(SMALL, images=SMALL.images + 0.5)  # with a background the term is largest
    theirs, exact = (of.of_all_poses(variant=variant) for variant in ("cryolike", "exact"))
    np.testing.assert_allclose(found_in(of), by_template(exact), rtol=0, atol=1e-6)
    assert np.abs(by_template(theirs) - by_template(exact)).max() > 0.1


# CryoLike defect 8
def test_a_background_in_the_images_changes_neither_likelihood_nor_pose() -> None:
    batch, values = SMALL.batch(), SMALL.of_all_poses()
    lifted = replace(batch, fourier=batch.fourier + 5 * background(SMALL.grid))
    found = integrated_log_likelihood(lifted, SMALL.templates, DISPLACEMENTS_A)
    np.testing.assert_allclose(found.log_likelihood, integrated(values, SMALL.templates.log_weights), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found.template, best_pose(values, SMALL.templates.log_weights)[0])


# CryoLike defect 8: of a single pose, which CryoLike gets right only where it is no displacement and no rotation
@pytest.mark.parametrize("displacement_A", [(0.0, 0.0), (4.0, 0.0), (-1.0, 2.5)])
def test_one_displacement_has_the_mean_likelihood_of_its_rotations(displacement_A: tuple[float, float]) -> None:
    one = np.array([displacement_A])
    np.testing.assert_allclose(found_in(SMALL, one), by_template(SMALL.of_all_poses(one)), rtol=0, atol=1e-6)


# CryoLike defect 9: no astigmatism is a wrong shape, and in the likelihood NaN
@pytest.mark.parametrize("angle_rad", [0.0, 0.7])
def test_optics_without_astigmatism_are_as_good_as_others(angle_rad: float) -> None:
    of = case(defocus_u=8000.0, defocus_v=8000.0, astigmatism_angle_rad=angle_rad)
    ctf = of.batch().polar_ctf
    assert ctf.shape == (3, of.grid.n_shells, of.grid.n_inplanes)
    np.testing.assert_allclose(ctf, ctf[..., :1].expand_as(ctf), rtol=0, atol=1e-12)
    found = integrated_log_likelihood(of.batch(), of.templates, DISPLACEMENTS_A)
    assert found.log_likelihood.isfinite().all()
    np.testing.assert_allclose(found.log_likelihood, integrated(of.of_all_poses(), of.templates.log_weights), rtol=0, atol=1e-6)
