"""The CTF against closed forms and RELION's formula."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryolike_data.ctf import Ctf, ctf_values, electron_wavelength_A, half_plane
from cryolike_data.errors import ArgumentError, TableError
from cryolike_data.transforms import PolarGrid

DEMO = Path(__file__).resolve().parents[2] / "shared" / "golden" / "likelihood_demo.npz"

defocus = st.floats(1000, 40000)
angles = st.floats(-4, 4)


def optics(u=15000.0, v=14000.0, angle=0.4, w=0.1, cs=2.7, kv=300.0, phase=None):
    def column(value):
        return torch.atleast_1d(torch.as_tensor(value, dtype=torch.float64))

    return Ctf(
        voltage_kv=column(kv),
        spherical_aberration_mm=column(cs),
        amplitude_contrast=column(w),
        defocus_u=column(u),
        defocus_v=column(v),
        astigmatism_angle_rad=column(angle),
        phase_shift_rad=None if phase is None else column(phase),
    )


def relion_wavelength(kv):
    volts = kv * 1e3
    return 12.2643247 / np.sqrt(volts * (1 + 0.978466e-6 * volts))


def relion(k, alpha, u, v, alpha0, w, cs, lam, phase):
    """-sin(gamma - asin w), numpy; k in 1/A, lam in A."""
    dz = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (alpha - alpha0))
    gamma = -np.pi * lam * dz * k**2 + np.pi / 2 * cs * 1e7 * lam**3 * k**4 - phase
    return -np.sin(gamma - np.arcsin(w))


@pytest.mark.parametrize(("kv", "expected"), [(300.0, 0.0196875), (200.0, 0.0250793), (100.0, 0.0370144)])
def test_the_wavelength_is_the_relativistic_one(kv, expected):
    assert electron_wavelength_A(kv) == pytest.approx(expected, rel=3e-6)


def test_the_wavelength_of_a_tensor_is_a_tensor():
    wavelength = electron_wavelength_A(torch.tensor([200.0, 300.0]))
    assert wavelength.dtype == torch.float32
    np.testing.assert_allclose(wavelength.numpy(), [0.0250793, 0.0196875], rtol=3e-6)


def test_zero_frequency_gives_plus_the_amplitude_contrast():
    values = ctf_values(
        optics(w=[0.07, 0.1], u=[1e4, 2e4], v=[1e4, 2e4], angle=[0.0, 1.0], cs=[2.7, 2.7], kv=[300.0, 200.0]), *half_plane(8, 1.0)
    )
    assert values[:, 0, 0].tolist() == pytest.approx([0.07, 0.1], abs=1e-15)


def test_pure_phase_contrast_starts_positive_and_first_crosses_zero_at_pi():
    # w = 0, Cs = 0, no astigmatism: sin(pi lambda dz k^2), zero at k = 1 / sqrt(lambda dz)
    k = 1 / np.sqrt(0.0196875 * 10000) * torch.tensor([0.5**0.5, 1.0, 1.5**0.5], dtype=torch.float64)
    values = ctf_values(optics(u=1e4, v=1e4, w=0.0, cs=0.0), k, torch.zeros(3))
    np.testing.assert_allclose(values[0].numpy(), [1, 0, -1], atol=1e-4)


def test_a_quarter_turn_of_phase_plate_makes_phase_contrast_a_cosine():
    k = torch.linspace(0, 0.2, 9, dtype=torch.float64)
    values = ctf_values(optics(u=1e4, v=1e4, w=0.0, cs=0.0, phase=np.pi / 2), k, torch.zeros(9))
    np.testing.assert_allclose(values[0].numpy(), np.cos(np.pi * 0.01968749 * 1e4 * k.numpy() ** 2), atol=1e-5)


def test_defocus_u_lies_along_the_angle_from_x_to_y():
    k = torch.full((2,), 0.05, dtype=torch.float64)
    values = ctf_values(optics(u=2e4, v=1e4, angle=0.3), k, torch.tensor([0.3, 0.3 + np.pi / 2], dtype=torch.float64))
    along = ctf_values(optics(u=2e4, v=2e4), k[:1], torch.zeros(1))
    across = ctf_values(optics(u=1e4, v=1e4), k[:1], torch.zeros(1))
    np.testing.assert_allclose(values[0].numpy(), [along.item(), across.item()], atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(defocus, defocus, angles, st.floats(0, 0.3), st.floats(0, 3))
def test_it_is_relions_formula(u, v, angle, w, phase):
    frequency, direction = half_plane(16, 2.0)
    values = ctf_values(optics(u, v, angle, w, phase=phase), frequency, direction)[0].numpy()
    expected = relion(frequency.numpy(), direction.numpy(), u, v, angle, w, 2.7, 0.0196874890, phase)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kv", [100.0, 200.0, 300.0])
def test_relions_own_wavelength_makes_no_difference_that_matters(kv):
    frequency, direction = half_plane(16, 2.0)
    assert electron_wavelength_A(kv) == pytest.approx(relion_wavelength(kv), rel=7e-6)
    values = ctf_values(optics(1.5e4, 1.4e4, 0.4, 0.1, kv=kv, phase=0.2), frequency, direction)[0].numpy()
    expected = relion(frequency.numpy(), direction.numpy(), 1.5e4, 1.4e4, 0.4, 0.1, 2.7, relion_wavelength(kv), 0.2)
    # 6e-6 of a phase of up to 210 rad
    np.testing.assert_allclose(values, expected, rtol=0, atol=1.5e-3)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(defocus, defocus, angles)
def test_half_a_turn_of_the_axis_changes_nothing(u, v, angle):
    grid = half_plane(16, 1.5)
    torch.testing.assert_close(ctf_values(optics(u, v, angle + np.pi), *grid), ctf_values(optics(u, v, angle), *grid), rtol=0, atol=1e-11)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(defocus, defocus, angles)
def test_swapping_u_and_v_with_a_quarter_turn_changes_nothing(u, v, angle):
    grid = half_plane(16, 1.5)
    swapped = ctf_values(optics(v, u, angle + np.pi / 2), *grid)
    torch.testing.assert_close(swapped, ctf_values(optics(u, v, angle), *grid), rtol=0, atol=1e-10)


def test_swapping_u_and_v_alone_does_change_it():
    grid = half_plane(16, 1.5)
    assert float((ctf_values(optics(2e4, 1e4), *grid) - ctf_values(optics(1e4, 2e4), *grid)).abs().max()) > 0.5


def test_rows_do_not_depend_on_each_other():
    grid = half_plane(8, 2.0)
    both = ctf_values(optics(u=[1e4, 2e4], v=[9e3, 3e4], angle=[0.1, 0.2], w=[0.1, 0.2], cs=[2.7, 0.01], kv=[300.0, 200.0]), *grid)
    assert both.shape == (2, 8, 5)
    assert torch.equal(both[1:], ctf_values(optics(2e4, 3e4, 0.2, 0.2, 0.01, 200.0), *grid))


def test_it_is_computed_in_double_precision_on_a_cpu():
    frequency, angle = half_plane(8, 2.0)
    values = ctf_values(optics().map(torch.Tensor.float), frequency.float(), angle.float())
    assert values.dtype == torch.float64


def test_missing_optics_are_named():
    with pytest.raises(TableError, match="amplitude_contrast, defocus_u"):
        ctf_values(Ctf(voltage_kv=torch.ones(1), spherical_aberration_mm=torch.ones(1)), *half_plane(4, 1.0))


@pytest.mark.parametrize("box", [6, 7])
def test_the_half_plane_has_the_layout_of_rfft2(box):
    # The coefficient of a plane wave is the largest one; its place tells frequency and direction.
    at = torch.arange(box, dtype=torch.float64)
    for ky, kx in ((0, 2), (1, 1), (-2, 1), (2, 0)):
        place = int(torch.fft.rfft2(torch.cos(2 * np.pi / box * (ky * at[:, None] + kx * at))).abs().argmax())
        frequency, angle = (values.flatten()[place].item() for values in half_plane(box, 1.5))
        assert frequency == pytest.approx(np.hypot(kx, ky) / (box * 1.5), rel=1e-12)
        assert np.cos(2 * (angle - np.arctan2(ky, kx))) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("box", "pixel_size"), [(0, 1.0), (8, 0.0), (8, float("nan"))])
def test_an_impossible_half_plane_is_refused(box, pixel_size):
    with pytest.raises(ArgumentError, match="must be positive"):
        half_plane(box, pixel_size)


@pytest.mark.shared
def test_on_its_grid_it_is_cryolikes_formula():
    if not DEMO.exists():
        pytest.skip("shared/golden/likelihood_demo.npz is not beside the repository")
    with np.load(DEMO) as demo:
        kept = demo["defocusU"] >= demo["defocusV"]  # elsewhere CryoLike takes |U - V|
        ctf = optics(
            *(demo[key][kept] for key in ("defocusU", "defocusV", "defocusAngle")),
            w=np.full(kept.sum(), 0.1),
            cs=np.full(kept.sum(), 2.7),
            kv=np.full(kept.sum(), 300.0),
            phase=demo["phaseShift"][kept],
        )
        theirs, box_A = demo["ctf"][kept], 48 * float(demo["pixel_size"])
    grid = PolarGrid(9.0, 0.25, 64)
    # CryoLike measures its angle from the first image axis, and so does its grid: the same number stands for both here.
    values = ctf_values(ctf, torch.from_numpy(2 / box_A * grid.radii)[:, None], torch.from_numpy(grid.angles))
    assert kept.sum() >= 10
    np.testing.assert_allclose(values.numpy(), theirs, rtol=0, atol=1e-7)
