"""The CTF against closed forms and RELION's formula."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryolike_data import IndexedDataset
from cryolike_data.ctf import Ctf, CtfTerm, ctf_values, electron_wavelength_A, half_plane
from cryolike_data.errors import ArgumentError, TableError
from cryolike_data.transforms import PolarGrid

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


LAMBDA = 0.01968749  # angstrom, 300 kV
TERM_FIELDS = {"bfactor": "bfactor_A2", "beam_tilt": "tilt_A", "trefoil": "trefoil_A", "tetrafoil": "tetrafoil_A", "anisomag": "anisomag"}
# For one particle: large enough that every term turns the CTF by more than the tests' tolerance.
EXAMPLE = {
    "bfactor": [60.0],
    "beam_tilt": [[9e3, -4e3]],
    "trefoil": [[8e3, 5e3]],
    "tetrafoil": [[2e5, -3e5, 5e5, 4e5]],
    "anisomag": [[0.02, -0.01, 0.005, -0.03]],
}


def with_terms(ctf, **columns):
    return replace(ctf, **{TERM_FIELDS[term]: torch.tensor(values, dtype=torch.float64) for term, values in columns.items()})


def gathered(*ctfs):
    """One Ctf with the rows of several."""
    return Ctf(**{name: torch.cat([getattr(ctf, name) for ctf in ctfs]) for name, _ in ctfs[0].items()})


def plane(box=15, pixel_size=1.2):
    """Frequency and angle of every coefficient of fft2."""
    k = np.fft.fftfreq(box, pixel_size)
    return torch.from_numpy(np.hypot(k[:, None], k)), torch.from_numpy(np.arctan2(k[:, None], k))


def odd_phase(term, coefficients, k, angle):
    """Phase by which the term turns the value at one (k, angle)."""
    ctf = with_terms(optics(w=1.0, u=0.0, v=0.0, cs=0.0), **{term: [coefficients]})  # the value without the term is 1
    value = ctf_values(ctf, torch.tensor(k, dtype=torch.float64), torch.tensor(angle, dtype=torch.float64), terms=(term,))
    return float(value.angle())


def even_phase(coefficients, k, angle):
    """The growth of gamma that the tetrafoil column makes at one (k, angle); small, so that -sin gives it back."""
    ctf = with_terms(optics(w=0.0, u=0.0, v=0.0, cs=0.0), tetrafoil=[coefficients])
    value = ctf_values(ctf, torch.tensor(k, dtype=torch.float64), torch.tensor(angle, dtype=torch.float64), terms=("tetrafoil",))
    return -float(torch.asin(value))


def test_every_term_has_a_name():
    assert set(get_args(CtfTerm)) == set(TERM_FIELDS)


@pytest.mark.parametrize("term", TERM_FIELDS)
def test_a_term_is_applied_only_where_asked_for(term):
    plain, ctf = optics(), with_terms(optics(), **{term: EXAMPLE[term]})
    grid = plane()
    assert torch.equal(ctf_values(ctf, *grid), ctf_values(plain, *grid))
    assert float((ctf_values(ctf, *grid, terms=(term,)) - ctf_values(plain, *grid)).abs().max()) > 0.05


@pytest.mark.parametrize("term", TERM_FIELDS)
def test_a_column_of_zeros_changes_nothing(term):
    ctf = with_terms(optics(), **{term: (0 * np.array(EXAMPLE[term])).tolist()})
    values = ctf_values(ctf, *plane(), terms=(term,))
    torch.testing.assert_close(values, ctf_values(optics(), *plane()).to(values.dtype), rtol=0, atol=1e-11)


@pytest.mark.parametrize("term", TERM_FIELDS)
def test_only_odd_terms_make_the_values_complex(term):
    values = ctf_values(with_terms(optics(), **{term: EXAMPLE[term]}), *plane(), terms={term})
    assert values.dtype == (torch.complex128 if term in ("beam_tilt", "trefoil") else torch.float64)


def test_rows_with_terms_do_not_depend_on_each_other():
    second = {term: (-0.7 * np.array(values)).tolist() for term, values in EXAMPLE.items()}
    rows = with_terms(optics(), **EXAMPLE), with_terms(optics(2e4, 3e4, 0.2, 0.2, 0.01, 200.0), **second)
    both = ctf_values(gathered(*rows), *plane(), terms=get_args(CtfTerm))
    assert both.shape == (2, 15, 15)
    for row, ctf in zip(both, rows, strict=True):
        torch.testing.assert_close(row, ctf_values(ctf, *plane(), terms=get_args(CtfTerm))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("terms", [("bfactor", "tetrafoil", "anisomag"), get_args(CtfTerm)])
def test_a_single_precision_grid_on_an_accelerator_keeps_its_precision(terms):
    k, angle = (values.to("meta", torch.float32) for values in plane())  # no numbers, but device and dtype as on an accelerator
    values = ctf_values(with_terms(optics(), **EXAMPLE), k, angle, terms=terms)
    assert values.device.type == "meta"
    assert values.dtype == (torch.complex64 if "trefoil" in terms else torch.float32)


def test_no_particles_give_no_values():
    ctf = with_terms(optics(), **EXAMPLE).map(lambda values: values[:0])
    assert ctf_values(ctf, *plane(), terms=get_args(CtfTerm)).shape == (0, 15, 15)


@pytest.mark.parametrize("term", TERM_FIELDS)
def test_terms_take_frequency_and_angle_that_broadcast(term):
    ctf = gathered(*(with_terms(optics(u), **{term: EXAMPLE[term]}) for u in (1e4, 2e4)))
    k, angle = torch.linspace(0, 0.3, 5, dtype=torch.float64), torch.linspace(0, 6, 7, dtype=torch.float64)
    values = ctf_values(ctf, k[:, None], angle, terms=[term])
    assert values.shape == (2, 5, 7)
    full = ctf_values(ctf, k[:, None].expand(5, 7).reshape(35), angle.expand(5, 7).reshape(35), terms=[term])
    torch.testing.assert_close(values.reshape(2, 35), full, rtol=0, atol=1e-12)


def test_the_b_factor_halves_the_value_where_b_k2_is_4_ln_2():
    k = torch.tensor([np.sqrt(4 * np.log(2) / 60.0)], dtype=torch.float64)
    damped = ctf_values(with_terms(optics(), bfactor=[60.0]), k, torch.zeros(1), terms=("bfactor",))
    np.testing.assert_allclose(damped.numpy(), 0.5 * ctf_values(optics(), k, torch.zeros(1)).numpy(), rtol=1e-12)


@pytest.mark.parametrize(("x", "y"), [(0.7, 0.0), (0.0, -0.4), (0.5, 0.3)])
def test_beam_tilt_is_relions_formula_in_milliradian(x, y):
    # RELION adds 0.360 Cs lambda^2 k^2 (k . tilt) degrees to the phase of an image in order to take the tilt out of it.
    cs_A = 2.7e7
    tilt_A = [cs_A * np.sin(x * 1e-3), cs_A * np.sin(y * 1e-3)]
    for kx, ky in ((0.08, 0.0), (0.02, 0.1), (-0.05, 0.06)):
        removed = np.radians(0.360 * cs_A * LAMBDA**2 * (kx**2 + ky**2) * (kx * x + ky * y))
        assert odd_phase("beam_tilt", tilt_A, np.hypot(kx, ky), np.arctan2(ky, kx)) == pytest.approx(-removed, rel=1e-6, abs=1e-12)


def test_trefoil_has_its_closed_form():
    unit = 2 * np.pi / 3 * LAMBDA**2 * 0.1**3
    assert odd_phase("trefoil", [1e6, 0], 0.1, 0.0) == pytest.approx(-1e6 * unit, rel=1e-6)
    assert odd_phase("trefoil", [0, 1e6], 0.1, np.pi / 6) == pytest.approx(-1e6 * unit, rel=1e-6)
    expected = -unit * (7e5 * np.cos(1.2) + 3e5 * np.sin(1.2))
    assert odd_phase("trefoil", [7e5, 3e5], 0.1, 0.4) == pytest.approx(expected, rel=1e-6)


def test_tetrafoil_has_its_closed_form():
    two, four = 2 * np.pi * LAMBDA**3 * 0.1**4, np.pi / 2 * LAMBDA**3 * 0.1**4
    assert even_phase([1e6, 0, 0, 0], 0.1, 0.0) == pytest.approx(1e6 * two, rel=1e-6)
    assert even_phase([0, 1e6, 0, 0], 0.1, np.pi / 4) == pytest.approx(1e6 * two, rel=1e-6)
    assert even_phase([0, 0, 1e6, 0], 0.1, 0.0) == pytest.approx(1e6 * four, rel=1e-6)
    assert even_phase([0, 0, 0, 1e6], 0.1, np.pi / 8) == pytest.approx(1e6 * four, rel=1e-6)
    expected = two * (2e6 * np.cos(0.6) - 1e6 * np.sin(0.6)) + four * (3e6 * np.cos(1.2) + 4e6 * np.sin(1.2))
    assert even_phase([2e6, -1e6, 3e6, 4e6], 0.1, 0.3) == pytest.approx(expected, rel=1e-6)


def test_even_terms_have_the_sign_of_the_spherical_aberration():
    # On the x axis a quarter of Cs in tetra_A[0] is Cs itself: pi / 2 Cs = 2 pi (Cs / 4).
    k, angle = torch.linspace(0, 0.4, 9, dtype=torch.float64), torch.zeros(9)
    with_tetra = ctf_values(with_terms(optics(cs=0.0), tetrafoil=[[2.7e7 / 4, 0, 0, 0]]), k, angle, terms=("tetrafoil",))
    torch.testing.assert_close(with_tetra, ctf_values(optics(cs=2.7), k, angle), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("term", "coefficients", "turns"), [("trefoil", [4e4, -7e4], 3), ("tetrafoil", [0, 0, 5e5, -4e5], 4)])
def test_foils_have_their_symmetry_and_no_higher_one(term, coefficients, turns):
    ctf = with_terms(optics(u=1e4, v=1e4), **{term: [coefficients]})
    k, angle = torch.full((8,), 0.3, dtype=torch.float64), torch.linspace(0, 2, 8, dtype=torch.float64)
    values = ctf_values(ctf, k, angle, terms=(term,))
    torch.testing.assert_close(ctf_values(ctf, k, angle + 2 * np.pi / turns, terms=(term,)), values, rtol=0, atol=1e-9)
    assert float((ctf_values(ctf, k, angle + np.pi / turns, terms=(term,)) - values).abs().max()) > 0.1


@pytest.mark.parametrize("term", ["beam_tilt", "trefoil"])
def test_an_odd_term_gives_the_conjugate_at_minus_k(term):
    ctf = with_terms(optics(), **{term: EXAMPLE[term]})
    k, angle = plane()
    values = ctf_values(ctf, k, angle, terms=(term,))
    torch.testing.assert_close(ctf_values(ctf, k, angle + np.pi, terms=(term,)), values.conj().resolve_conj(), rtol=0, atol=1e-11)
    torch.testing.assert_close(values.abs(), ctf_values(optics(), k, angle).abs(), rtol=0, atol=1e-12)


def test_odd_terms_leave_an_image_real_and_add_their_phases():
    ctf = with_terms(optics(), beam_tilt=EXAMPLE["beam_tilt"], trefoil=EXAMPLE["trefoil"])
    image = torch.randn(15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    both = ctf_values(ctf, *plane(), terms=("trefoil", "beam_tilt"))[0]
    full = torch.fft.ifft2(torch.fft.fft2(image) * both)
    assert float(full.imag.abs().max()) < 1e-12
    half = torch.fft.irfft2(torch.fft.rfft2(image) * ctf_values(ctf, *half_plane(15, 1.2), terms=("beam_tilt", "trefoil"))[0], (15, 15))
    torch.testing.assert_close(half, full.real, rtol=0, atol=1e-12)
    tilt, trefoil = (ctf_values(ctf, *plane(), terms=(term,))[0] for term in ("beam_tilt", "trefoil"))
    torch.testing.assert_close(both * ctf_values(ctf, *plane())[0], tilt * trefoil, rtol=0, atol=1e-12)


def test_beam_tilt_moves_a_plane_wave_along_the_tilt():
    # exp(-2 pi i k s) moves an image by s, and RELION's factor is exp(-2 pi i lambda^2 k^2 k . tilt): s = lambda^2 k^2 tilt.
    wave = torch.cos(2 * np.pi / 16 * 2 * torch.arange(16, dtype=torch.float64)).repeat(16, 1)
    k = 2 / 16
    ctf = with_terms(optics(w=1.0, u=0.0, v=0.0, cs=0.0), beam_tilt=[[1 / (LAMBDA * k) ** 2, 0.0]])  # one pixel along x
    moved = torch.fft.irfft2(torch.fft.rfft2(wave) * ctf_values(ctf, *half_plane(16, 1.0), terms=("beam_tilt",))[0], (16, 16))
    torch.testing.assert_close(moved, wave.roll(1, dims=1), rtol=0, atol=1e-5)


def test_anisotropic_magnification_stretches_the_frequencies():
    stretched = with_terms(optics(), anisomag=[[0.05, 0.0, 0.0, -0.02]])
    kx, ky = torch.tensor([0.1, 0.0, -0.07], dtype=torch.float64), torch.tensor([0.0, 0.1, 0.05], dtype=torch.float64)
    values = ctf_values(stretched, torch.hypot(kx, ky), torch.atan2(ky, kx), terms=("anisomag",))
    expected = ctf_values(optics(), torch.hypot(1.05 * kx, 0.98 * ky), torch.atan2(0.98 * ky, 1.05 * kx))
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-11)


def test_anisotropic_magnification_acts_row_by_row_on_x_and_y_and_on_every_term():
    columns = {term: values for term, values in EXAMPLE.items() if term != "anisomag"}
    k, angle = plane()
    kx, ky = k * torch.cos(angle), k * torch.sin(angle)
    values = ctf_values(with_terms(optics(), **EXAMPLE), k, angle, terms=get_args(CtfTerm))
    x, y = 1.02 * kx - 0.01 * ky, 0.005 * kx + 0.97 * ky
    expected = ctf_values(with_terms(optics(), **columns), torch.hypot(x, y), torch.atan2(y, x), terms=list(columns))
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("term", TERM_FIELDS)
def test_every_term_has_a_gradient_also_on_a_grid_with_zero_frequency(term):
    column = torch.tensor(EXAMPLE[term], dtype=torch.float64, requires_grad=True)

    def values(column):
        return ctf_values(replace(optics(), **{TERM_FIELDS[term]: column}), *half_plane(6, 4.0), terms=(term,))

    scale = 1e-6 * float(column.detach().abs().max())
    assert torch.autograd.gradcheck(values, column, eps=scale, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("terms", [("coma",), ("bfactor", "shift"), "bfactor"])
def test_unknown_terms_are_refused_and_the_known_ones_listed(terms):
    with pytest.raises(ArgumentError, match="bfactor, beam_tilt, trefoil, tetrafoil, anisomag"):
        ctf_values(with_terms(optics(), **EXAMPLE), *plane(), terms=terms)


def test_the_columns_that_terms_lack_are_named():
    with pytest.raises(TableError, match="tilt_A, tetrafoil_A"):
        ctf_values(with_terms(optics(), bfactor=[60.0]), *plane(), terms=("bfactor", "tetrafoil", "beam_tilt"))


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
def test_on_its_grid_it_is_cryolikes_formula(likelihood_demo):
    demo = likelihood_demo
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


def test_optics_of_a_table_are_taken_as_those_of_a_batch(demo):
    particles = IndexedDataset(demo.indexed)
    frequency, angle = half_plane(16, 2.0)
    assert torch.equal(
        ctf_values(particles.particles.ctf, frequency, angle)[:9], ctf_values(particles.batch(range(9)).ctf, frequency, angle)
    )


def test_optics_of_a_single_particle_are_those_of_a_batch_of_one():
    batch_of_one, grid, terms = with_terms(optics(), **EXAMPLE), plane(), get_args(CtfTerm)
    assert torch.equal(
        ctf_values(batch_of_one.map(lambda values: values[0]), *grid, terms=terms), ctf_values(batch_of_one, *grid, terms=terms)
    )


def test_optics_of_a_single_row_of_a_table_are_those_of_a_table_of_one(demo):
    optics_of_all, grid = IndexedDataset(demo.indexed).particles.ctf, half_plane(16, 2.0)
    assert torch.equal(ctf_values(optics_of_all.map(lambda column: column[2]), *grid), ctf_values(optics_of_all, *grid)[2:3])


def test_a_repr_of_optics_is_short():
    columns = {"defocus_u": torch.full((1200,), 15000.0), "phase_shift_rad": torch.zeros(1200)}
    assert repr(Ctf(**columns)) == "Ctf(1,200 particles: defocus_u, phase_shift_rad)"
    assert repr(Ctf(**columns).map(lambda values: values[0])) == "Ctf(defocus_u=15000, phase_shift_rad=0)"
    assert repr(Ctf()) == "Ctf()"
