"""The brute-force likelihood against CryoLike's own numbers, closed forms and numerical integration of the model it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import likelihood_reference as reference
import numpy as np
import pytest
from likelihood_reference import Complex, Real, Variant
from scipy.special import logsumexp

BOX_A, N_PIXELS = 20.0, 12
RADII, ANGLES, W = reference.polar_points(3.0, 0.5, 12)
X, Y = reference.coordinates(RADII, ANGLES)
CENTRES = np.array([[3.0, 1.0], [-2.0, 2.5], [0.5, -4.0]])  # angstrom, (along rows, along columns)
DISPLACEMENTS_A = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, -3.0], [1.5, 1.0]])
OPTICS: dict[str, Any] = {
    "defocus_u_A": 9000.0,
    "defocus_v_A": 6000.0,
    "angle_rad": 0.4,
    "phase_shift_rad": 0.1,
    "spherical_aberration_mm": 2.7,
    "voltage_kv": 300.0,
    "amplitude_contrast": 0.1,
}
CTF = reference.ctf_true(RADII, ANGLES, BOX_A, **OPTICS)
BOTH = pytest.mark.parametrize("variant", ["exact", "cryolike"])


def blobs(centres_A: Real) -> Complex:
    """Closed form of the transform of Gaussian blobs of weights 1, 2, 3, of which no rotation gives the same picture."""
    x, y = 2 / BOX_A * centres_A.T[..., None, None]
    return np.tensordot([1.0, 2.0, 3.0], np.exp(-0.1 * (X**2 + Y**2) - 2j * np.pi * (X * x + Y * y)), 1)


def posed(centres_A: Real, d: int, w: int) -> Real:
    """Where blobs are seen in pose (d, w): displaced, then turned by -2 pi w / n_inplanes."""
    turn = -2 * np.pi * w / len(ANGLES)
    along_rows, along_columns = (centres_A + DISPLACEMENTS_A[d]).T
    return np.stack([along_rows * np.cos(turn) - along_columns * np.sin(turn), along_rows * np.sin(turn) + along_columns * np.cos(turn)], 1)


def noise(*shape: int, seed: int = 0) -> Complex:
    """Transforms of images of noise."""
    return reference.polar_transform(np.random.default_rng(seed).standard_normal((*shape, N_PIXELS, N_PIXELS)), RADII, ANGLES)


def of_poses(image: Complex, template: Complex, mask_term: Variant = "exact", n_pixels_total: int = N_PIXELS**2) -> Real:
    return reference.pose_log_likelihood(image, template, CTF, W, X, Y, DISPLACEMENTS_A, BOX_A, n_pixels_total, mask_term=mask_term)


def of_images(images: Complex, templates: Complex, weights: Real, variant: Variant, displacements_A: Real = DISPLACEMENTS_A) -> Real:
    ctf = np.repeat(CTF[None], len(images), 0)
    return reference.integrated(images, templates, ctf, W, X, Y, displacements_A, BOX_A, N_PIXELS**2, weights, variant=variant)


# The grid and the transform


def test_the_quadrature_integrates_polynomials_over_the_disk() -> None:
    assert W.shape == (7, 12)
    for power in range(2 * len(RADII)):
        exact = 2 * np.pi * 3.0 ** (power + 2) / (power + 2)
        assert (W * RADII[:, None] ** power).sum() == pytest.approx(exact, rel=1e-12)
    assert (W * X**2).sum() == pytest.approx(np.pi * 3.0**4 / 4, rel=1e-12)


def test_rows_are_the_first_axis_of_the_transform() -> None:
    pixels = np.arange(N_PIXELS * 4) - N_PIXELS * 2  # centre at box // 2
    sigma, (row, column) = 2.0, (5.0, -3.0)
    image = np.exp(-((pixels[:, None] - row) ** 2 + (pixels - column) ** 2) / (2 * sigma**2))
    k = 4 * np.pi / len(pixels)
    expected = k * 2 * np.pi * sigma**2 * np.exp(-(sigma**2) * k**2 * (X**2 + Y**2) / 2 - 1j * k * (X * row + Y * column))
    np.testing.assert_allclose(reference.polar_transform(image, RADII, ANGLES), expected, rtol=0, atol=1e-12)


def test_an_odd_box_is_centred_on_its_middle_pixel() -> None:
    image = np.zeros((5, 5))
    image[2, 2] = 1
    np.testing.assert_allclose(reference.polar_transform(image, RADII, ANGLES), 4 * np.pi / 5, rtol=1e-12)


def test_the_background_is_the_transform_of_a_constant() -> None:
    nodes, weights = np.polynomial.legendre.leggauss(40)
    integrals = [(weights * np.exp(-2j * np.pi * k[..., None] * nodes)).sum(-1) for k in (X, Y)]
    np.testing.assert_allclose(reference.background(X, Y), integrals[0] * integrals[1], rtol=0, atol=1e-12)


def test_normalised_images_have_mean_0_largest_magnitude_1_and_power_1() -> None:
    image = np.random.default_rng(1).standard_normal((3, N_PIXELS, N_PIXELS)) + 5
    centred = reference.center(image)
    np.testing.assert_allclose(centred.mean((1, 2)), 0, atol=1e-15)
    np.testing.assert_allclose(np.abs(centred).max((1, 2)), 1, rtol=1e-15)
    power = (W * np.abs(reference.unit_power(noise(3), W)) ** 2).sum((1, 2))
    np.testing.assert_allclose(power, 1, rtol=1e-13)


# The CTF


@pytest.mark.parametrize(("kv", "expected"), [(300.0, 0.0196875), (200.0, 0.0250793), (100.0, 0.0370144)])
def test_the_wavelength_is_the_relativistic_one(kv: float, expected: float) -> None:
    assert reference.electron_wavelength_A(kv) == pytest.approx(expected, rel=3e-6)


def test_the_ctf_starts_at_the_amplitude_contrast_and_first_rises() -> None:
    optics = {**OPTICS, "phase_shift_rad": 0.0}
    at_zero, near = reference.ctf_true(np.array([0.0, 0.05]), ANGLES, BOX_A, **optics)
    np.testing.assert_allclose(at_zero, 0.1, rtol=1e-14)
    assert (near > at_zero).all()


@pytest.mark.parametrize("ctf", [reference.ctf_true, reference.ctf_cryolike])
def test_a_phase_plate_adds_to_the_phase_of_amplitude_contrast(ctf: Callable[..., Real]) -> None:
    at_zero = ctf(np.array([0.0]), ANGLES, BOX_A, **{**OPTICS, "phase_shift_rad": 1.2})
    np.testing.assert_allclose(at_zero, np.sin(1.2 + np.arcsin(0.1)), rtol=1e-13)


@pytest.mark.parametrize(("u", "v"), [(9000.0, 6000.0), (6000.0, 9000.0)])
def test_the_true_ctf_has_defocus_u_along_the_angle_from_columns_to_rows(u: float, v: float) -> None:
    along_rows, along_columns = np.sin(0.4), np.cos(0.4)
    theta = np.array([np.arctan2(along_columns, along_rows), np.arctan2(along_rows, -along_columns)])  # there, and a quarter turn on
    values = reference.ctf_true(RADII, theta, BOX_A, **{**OPTICS, "defocus_u_A": u, "defocus_v_A": v})
    for value, defocus in zip(values.T, (u, v), strict=True):
        round_one = reference.ctf_true(RADII, np.zeros(1), BOX_A, **{**OPTICS, "defocus_u_A": defocus, "defocus_v_A": defocus})
        np.testing.assert_allclose(value, round_one[:, 0], rtol=0, atol=1e-12)


def test_cryolikes_ctf_has_the_larger_defocus_along_the_angle_from_rows_to_columns() -> None:
    theirs = reference.ctf_cryolike(RADII, ANGLES, BOX_A, **{**OPTICS, "angle_rad": np.pi / 2 - 0.4})
    np.testing.assert_allclose(theirs, CTF, rtol=0, atol=1e-6)  # CryoLike's rounded electron charge
    swapped = {**OPTICS, "defocus_u_A": OPTICS["defocus_v_A"], "defocus_v_A": OPTICS["defocus_u_A"], "angle_rad": np.pi / 2 - 0.4}
    assert np.array_equal(reference.ctf_cryolike(RADII, ANGLES, BOX_A, **swapped), theirs)


def test_a_column_of_optics_gives_a_ctf_for_each_row() -> None:
    two = reference.ctf_true(RADII, ANGLES, BOX_A, **{**OPTICS, "angle_rad": [0.4, 1.0]})
    assert two.shape == (2, 7, 12)
    assert np.array_equal(two[0], CTF)


# The likelihood of a pose


# With cryolike's mask term the squared residual of a nearly noiseless image can come out negative, and its logarithm NaN.
@pytest.mark.parametrize(("variant", "noise_level"), [("exact", 1e-3), ("cryolike", 0.1)])
@pytest.mark.parametrize(("d", "w"), [(0, 0), (1, 3), (2, 10), (3, 5)])
def test_the_best_pose_is_the_one_the_image_was_made_in(variant: Variant, noise_level: float, d: int, w: int) -> None:
    values = of_poses(CTF * blobs(posed(CENTRES, d, w)) + noise_level * noise(), blobs(CENTRES), variant)
    assert np.argwhere(values == values.max()).tolist() == [[d, w]]


@pytest.mark.parametrize(("d", "w"), [(0, 0), (1, 3), (3, 5)])
def test_it_is_the_integral_of_a_gaussian_model_over_scale_offset_and_noise(d: int, w: int) -> None:
    # Normal(image | scale C T + offset s, sigma^2) with sigma d sigma, by the trapezoidal rule, and with no moment in closed form
    n_pixels_total = 14
    image, s, template = CTF * blobs(CENTRES) + 0.3 * noise(), reference.background(X, Y), CTF * blobs(posed(CENTRES, d, w))
    root = np.sqrt(W)

    def numbers(values: Complex | Real) -> Real:
        return np.concatenate([(root * values).real.ravel(), (root * np.imag(values)).ravel()])

    model = np.stack([numbers(template), numbers(s)], 1)
    best, residual, *_ = np.linalg.lstsq(model, numbers(image), rcond=None)
    to_independent = np.linalg.inv(np.linalg.qr(model)[1])  # only moves the points to where the integrand is
    steps = np.linspace(-8, 8, 33)
    sigmas = np.exp(np.linspace(-4, 8, 121)) * np.sqrt(residual.item() / n_pixels_total)
    log_terms = []
    for sigma in sigmas:
        scale_offset = best + sigma * np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2) @ to_independent.T
        distance = ((numbers(image) - scale_offset @ model.T) ** 2).sum(1)
        cell = (steps[1] - steps[0]) ** 2 * sigma**2 * abs(np.linalg.det(to_independent))
        log_normal = -n_pixels_total / 2 * np.log(2 * np.pi * sigma**2) - distance / (2 * sigma**2)
        log_terms.append(logsumexp(log_normal) + np.log(cell) + 2 * np.log(sigma) + np.log(0.1))  # d sigma = sigma d ln sigma
    integral = logsumexp(log_terms) + np.log(2 * np.pi / (W * s**2).sum()) / 2
    assert of_poses(image, blobs(CENTRES), n_pixels_total=n_pixels_total)[d, w] == pytest.approx(integral, abs=1e-6)


@BOTH
def test_rescaling_an_image_shifts_its_log_likelihood_by_a_constant(variant: Variant) -> None:
    image, template, p = noise(), noise(seed=1), N_PIXELS**2 / 2 - 2
    shift = of_poses(3.0 * image, template, variant) - of_poses(image, template, variant)
    np.testing.assert_allclose(shift, -2 * p * np.log(3.0), rtol=1e-12)


@BOTH
def test_rescaling_a_template_shifts_the_log_likelihood_by_its_logarithm(variant: Variant) -> None:
    image, template = noise(), noise(seed=1)
    shift = of_poses(image, 3.0 * template, variant) - of_poses(image, template, variant)
    np.testing.assert_allclose(shift, -np.log(3.0), rtol=1e-9)


def test_a_constant_background_changes_nothing_in_the_exact_one() -> None:
    # Complex ones, though images are real, to see every conjugate: transforms of real images have real overlaps with s.
    image, template = noise(), noise(seed=1) + 1j * noise(seed=2)
    np.testing.assert_allclose(of_poses(image + (2 + 1j) * reference.background(X, Y), template), of_poses(image, template), rtol=1e-12)


def test_with_a_constant_background_in_the_image_cryolikes_mask_term_favours_other_poses() -> None:
    image, template = noise(), noise(seed=1)
    change = of_poses(image + 2 * reference.background(X, Y), template, "cryolike") - of_poses(image, template, "cryolike")
    assert np.ptp(change) > 0.1


def test_cryolikes_product_of_overlaps_lacks_a_conjugate() -> None:
    # The best complex offset would be taken out again in the pose that is not moved, were it there.
    image, template = noise(), noise(seed=1) + 1j * noise(seed=2)
    plain, real, imaginary = (of_poses(image + c * reference.background(X, Y), template, "cryolike")[0, 0] for c in (0, 2, 2j))
    assert real == pytest.approx(plain, rel=1e-12)
    assert abs(imaginary - plain) > 1e-3


def test_the_two_mask_terms_agree_where_the_template_is_not_moved() -> None:
    image, template = noise(), noise(seed=1)
    assert of_poses(image, template)[0, 0] == pytest.approx(of_poses(image, template, "cryolike")[0, 0], rel=1e-13)
    assert np.abs(of_poses(image, template) - of_poses(image, template, "cryolike")).max() > 1e-3


# The likelihood of an image


@BOTH
def test_it_is_the_mean_over_displacements(variant: Variant) -> None:
    images, templates, weights = noise(2), noise(2, seed=1), np.array([0.3, 0.7])
    once = of_images(images, templates, weights, variant)
    twice = of_images(images, templates, weights, variant, np.concatenate([DISPLACEMENTS_A, DISPLACEMENTS_A]))
    np.testing.assert_allclose(twice, once, rtol=1e-13)


def test_one_template_of_weight_1_has_the_mean_likelihood_of_its_poses() -> None:
    image, template = noise(1), noise(1, seed=1)
    mean = logsumexp(of_poses(image[0], template[0])) - np.log(len(DISPLACEMENTS_A) * len(ANGLES))
    np.testing.assert_allclose(of_images(image, template, np.ones(1), "exact"), [mean], rtol=1e-13)


def test_exact_weights_multiply_likelihoods() -> None:
    images, templates = noise(2), noise(2, seed=1)
    split = of_images(images, templates[[0, 1, 1]], np.array([0.3, 0.5, 0.2]), "exact")
    np.testing.assert_allclose(split, of_images(images, templates, np.array([0.3, 0.7]), "exact"), rtol=1e-13)


def test_cryolikes_weights_are_added_to_log_likelihoods() -> None:
    images, templates, weights = noise(2), noise(2, seed=1), np.array([0.3, 0.7])
    raised = of_images(images, templates, weights + 2, "cryolike")
    np.testing.assert_allclose(raised, of_images(images, templates, weights, "cryolike") + 2, rtol=1e-13)


def test_an_image_does_not_depend_on_the_others() -> None:
    images, templates, weights = noise(3), noise(2, seed=1), np.array([0.3, 0.7])
    all_of_them = of_images(images, templates, weights, "exact")
    np.testing.assert_array_equal(of_images(images[1:2], templates, weights, "exact"), all_of_them[1:2])


# CryoLike's own numbers

KEYS: dict[Variant, str] = {"cryolike": "log_likelihood_M", "exact": "log_likelihood_exact"}


@dataclass(frozen=True)
class Golden:
    """The reference file, with its grid."""

    arrays: dict[str, Any]
    radii: Real
    angles: Real
    W: Real
    box_A: float

    def ctf(self) -> Real:
        return reference.ctf_cryolike(
            self.radii,
            self.angles,
            self.box_A,
            defocus_u_A=self.arrays["defocusU"],
            defocus_v_A=self.arrays["defocusV"],
            angle_rad=self.arrays["defocusAngle"],
            phase_shift_rad=self.arrays["phaseShift"],
            spherical_aberration_mm=float(self.arrays["sphericalAberration"]),
            voltage_kv=float(self.arrays["voltage"]),
            amplitude_contrast=float(self.arrays["amplitudeContrast"]),
        )

    def images(self) -> Complex:
        """Transforms of the images, from their pixels."""
        transforms = reference.polar_transform(reference.center(self.arrays["phys"]), self.radii, self.angles)
        return reference.unit_power(transforms, self.W)

    def log_likelihood(self, images: Complex, ctf: Real, displacements_A: Real, variant: Variant) -> Real:
        x, y = reference.coordinates(self.radii, self.angles)
        templates, weights, n_pixels_total = self.arrays["templates_fourier"], self.arrays["weights_viewing"], self.arrays["phys"][0].size
        return reference.integrated(
            images, templates, ctf, self.W, x, y, displacements_A, self.box_A, n_pixels_total, weights, variant=variant
        )

    @property
    def displacements_A(self) -> Real:
        return self.arrays["displacements_A"].T.astype(np.float64)

    @property
    def displacements_as_used_A(self) -> Real:
        """CryoLike scales displacements to its box in float32."""
        return (2 * self.displacements_A / self.box_A).astype(np.float32).astype(np.float64) * (self.box_A / 2)


@pytest.fixture(scope="module")
def golden(likelihood_demo: dict[str, np.ndarray]) -> Golden:
    arrays = likelihood_demo
    grid = reference.polar_points(float(arrays["radius_max"]), float(arrays["dist_radii"]), int(arrays["n_inplanes"]))
    return Golden(arrays, *grid, box_A=arrays["phys"].shape[-1] * float(arrays["pixel_size"]))


@pytest.mark.shared
@BOTH
def test_cryolikes_likelihoods_are_reproduced(golden: Golden, variant: Variant) -> None:
    arrays = golden.arrays
    values = golden.log_likelihood(arrays["images_fourier"], arrays["ctf"], golden.displacements_A, variant)
    np.testing.assert_allclose(values, arrays[KEYS[variant]], rtol=1e-9)


@pytest.mark.shared
@BOTH
def test_with_cryolikes_rounding_of_displacements_they_are_to_all_digits(golden: Golden, variant: Variant) -> None:
    arrays = golden.arrays
    values = golden.log_likelihood(arrays["images_fourier"], arrays["ctf"], golden.displacements_as_used_A, variant)
    np.testing.assert_allclose(values, arrays[KEYS[variant]], rtol=1e-13)


@pytest.mark.shared
@BOTH
def test_they_are_reproduced_from_pixels_and_optics_too(golden: Golden, variant: Variant) -> None:
    values = golden.log_likelihood(golden.images(), golden.ctf(), golden.displacements_as_used_A, variant)
    np.testing.assert_allclose(values, golden.arrays[KEYS[variant]], rtol=1e-12)


@pytest.mark.shared
def test_cryolikes_transforms_are_reproduced(golden: Golden) -> None:
    np.testing.assert_allclose(golden.images(), golden.arrays["images_fourier"], rtol=0, atol=1e-12)  # finufft was asked for 1e-12


@pytest.mark.shared
def test_cryolikes_ctf_is_reproduced(golden: Golden) -> None:
    np.testing.assert_allclose(golden.ctf(), golden.arrays["ctf"], rtol=0, atol=1e-13)


@pytest.mark.shared
def test_the_reference_rows_and_weights_are_in_order(golden: Golden) -> None:
    # Then |U - V| is U - V, and the true CTF differs by the direction of the axis only.
    assert (golden.arrays["defocusU"] >= golden.arrays["defocusV"]).all()
    assert golden.arrays["weights_viewing"].sum() == pytest.approx(1, abs=1e-12)
