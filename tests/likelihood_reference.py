"""CryoLike's integrated likelihood by brute force in numpy float64: a truth for tests, independent of the package, slow and plain.

Axes: x = r cos(theta) belongs to the first image axis (rows) and y = r sin(theta) to the second (columns), as in CryoLike. The box is
[-1, 1] along both, so that a radius r is the spatial frequency 2 r / box_A and r = D / 4 is Nyquist. (Particle coordinates have it the
other way round: their x runs along columns, their y along rows.)

Names in formulas: I image, T template, C CTF, W quadrature weights, s transform of a constant background, R the template as the image would
show it: displaced, then rotated, then times C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import constants
from scipy.special import gammaln, logsumexp, roots_jacobi

Real = NDArray[np.float64]
Complex = NDArray[np.complex128]
Variant = Literal["exact", "cryolike"]


def polar_points(radius_max: float, dist_radii: float, n_inplanes: int) -> tuple[Real, Real, Real]:
    """CryoLike's polar grid: Gauss-Jacobi shells (alpha 0, beta 1) times equally spaced angles.

    Returns
    -------
    radii (n_shells,), angles (n_inplanes,) in radian, and the weight W (n_shells, n_inplanes) of each point in an integral over the disk
    """
    nodes, shell_weights = roots_jacobi(1 + math.ceil(radius_max / dist_radii), 0, 1)
    radii = (nodes + 1) * radius_max / 2
    angles = np.arange(n_inplanes) * (2 * np.pi / n_inplanes)
    # (1 + node) d node is (2 / radius_max)^2 r dr; the angle brings 2 pi / n_inplanes.
    W = np.repeat((shell_weights * (radius_max / 2) ** 2 * 2 * np.pi / n_inplanes)[:, None], n_inplanes, axis=1)
    return radii, angles, W


def coordinates(radii: Real, angles: Real) -> tuple[Real, Real]:
    """Points (x along rows, y along columns) of the grid, (n_shells, n_inplanes) each."""
    return radii[:, None] * np.cos(angles), radii[:, None] * np.sin(angles)


def center(image: Real) -> Real:
    """(..., D0, D1) images with mean 0 and largest magnitude 1."""
    image = image - image.mean(axis=(-2, -1), keepdims=True)
    return image / np.abs(image).max(axis=(-2, -1), keepdims=True)


def polar_transform(image: Real, radii: Real, angles: Real) -> Complex:
    """Transform of (..., D0, D1) images at the points of the grid, summed pixel by pixel: (..., n_shells, n_inplanes)."""
    n0, n1 = image.shape[-2:]
    x, y = coordinates(radii, angles)
    down = np.exp(-1j * (4 * np.pi / n0) * x.reshape(-1, 1) * (np.arange(n0) - n0 // 2))  # (points, D0)
    across = np.exp(-1j * (4 * np.pi / n1) * y.reshape(-1, 1) * (np.arange(n1) - n1 // 2))  # (points, D1)
    sums = (down * (across @ np.swapaxes(image, -2, -1))).sum(axis=-1)
    return (4 * np.pi / np.sqrt(n0 * n1) * sums).reshape(*image.shape[:-2], *x.shape)


def unit_power(F: Complex, W: Real) -> Complex:
    """Transforms scaled so that the integral of |F|^2 over the disk is 1."""
    return F / np.sqrt((W * np.abs(F) ** 2).sum(axis=(-2, -1), keepdims=True))


def electron_wavelength_A(voltage_kv: float, *, charge: float = constants.e, mass: float = constants.m_e) -> float:
    """Relativistic wavelength of electrons, angstrom; charge in coulomb and mass in kilogram, for a code that rounds them."""
    energy = charge * voltage_kv * 1e3
    momentum = np.sqrt(2 * mass * energy * (1 + energy / (2 * mass * constants.c**2)))
    return float(constants.h / momentum * 1e10)


def ctf_cryolike(radii: Real, angles: Real, box_A: float, *, voltage_kv: float, **optics: Any) -> Real:
    """The CTF as CryoLike computes it: the angle counts from the first image axis, and the larger defocus always lies along it."""

    def defocus(u: Real, v: Real, angle: Real) -> Real:
        return (u + v) / 2 + np.abs(u - v) / 2 * np.cos(2 * (angles - angle))

    # CryoLike rounds the charge, which shows in the eighth digit of the CTF.
    wavelength = electron_wavelength_A(voltage_kv, charge=1.60217663e-19, mass=9.1093837015e-31)
    return _ctf(2 * radii[:, None] / box_A, wavelength, defocus, **optics)


def ctf_true(radii: Real, angles: Real, box_A: float, *, voltage_kv: float, **optics: Any) -> Real:
    """The CTF as RELION and CryoSPARC mean it: defocus U lies at ``angle_rad`` from columns (their x) towards rows (their y)."""

    def defocus(u: Real, v: Real, angle: Real) -> Real:
        return (u + v) / 2 + (u - v) / 2 * np.cos(2 * (np.pi / 2 - angles - angle))

    return _ctf(2 * radii[:, None] / box_A, electron_wavelength_A(voltage_kv), defocus, **optics)


def background(x: Real, y: Real) -> Real:
    """s: the transform of a constant 1 on the box [-1, 1]^2."""
    return 4 * np.sinc(2 * x) * np.sinc(2 * y)


def pose_log_likelihood(
    image_fourier: Complex,
    template_fourier: Complex,
    ctf: Real,
    W: Real,
    x: Real,
    y: Real,
    displacements_A: Real,
    box_A: float,
    n_pixels_total: int,
    *,
    mask_term: Variant,
) -> Real:
    """Log-likelihood of an image for each pose of a template, with scale, offset and noise integrated out.

    Parameters
    ----------
    image_fourier, template_fourier, ctf, W, x, y : (n_shells, n_inplanes) each
    displacements_A : (n_d, 2) displacements of the template along (rows, columns), angstrom
    box_A : side of the image, angstrom
    n_pixels_total : pixels of the image, D^2
    mask_term : "exact" takes the overlap of s with the posed template R. "cryolike" takes its overlap with C T instead, neither displaced
        nor rotated, and the real part of a product that lacks a conjugate; D may then be negative where the fit is close, which gives NaN.

    Returns
    -------
    (n_d, n_inplanes): entry [d, w] is for the template displaced by d, then rolled by w angles, R(theta) = C(theta) T_d(theta + 2 pi w/n):
    a density at c is seen at c + d, turned by -2 pi w / n (rows towards columns count as positive)
    """
    n_inplanes = W.shape[1]
    s = background(x, y)
    Iss = (W * s**2).sum()
    Iyy = (W * np.abs(image_fourier) ** 2).sum()
    Isy = (W * s * image_fourier).sum()
    Ixy, Ixx = np.empty((2, len(displacements_A), n_inplanes))
    Isx = np.empty((len(displacements_A), n_inplanes), np.complex128)
    for d, (along_rows, along_columns) in enumerate(displacements_A):
        displaced = template_fourier * np.exp(-2j * np.pi * (x * (2 * along_rows / box_A) + y * (2 * along_columns / box_A)))
        R = ctf * np.stack([np.roll(displaced, -w, axis=-1) for w in range(n_inplanes)])
        Ixy[d] = np.tensordot(R, W * image_fourier.conj(), 2).real
        Ixx[d] = np.tensordot(np.abs(R) ** 2, W, 2)
        Isx[d] = np.tensordot(R, W * s, 2)
    if mask_term == "exact":
        overlap = (Isx * Isy.conj()).real
    else:
        Isx = np.full_like(Isx, (W * s * ctf * template_fourier).sum())
        overlap = (Isx * Isy).real

    n, p = n_pixels_total, n_pixels_total / 2 - 2
    A = Ixx * Iss - np.abs(Isx) ** 2
    B = Ixy * Iss - overlap
    D = Iyy * Iss - np.abs(Isy) ** 2 - B**2 / A
    constant = (3 - n) / 2 * np.log(2 * np.pi) - np.log(2) - np.log(Iss) / 2 + gammaln(p) + p * np.log(2 * Iss)
    return -p * np.log(D) - np.log(A) / 2 + constant


def integrated(
    images_fourier: Complex,
    templates_fourier: Complex,
    ctf: Real,
    W: Real,
    x: Real,
    y: Real,
    displacements_A: Real,
    box_A: float,
    n_pixels_total: int,
    weights: Real,
    *,
    variant: Variant,
) -> Real:
    """(M,) log-likelihood of each image, the mean over poses and the weighted sum over templates taken of the likelihoods.

    Parameters
    ----------
    images_fourier : (M, n_shells, n_inplanes)
    templates_fourier : (S, n_shells, n_inplanes)
    ctf : (M, n_shells, n_inplanes), one for each image
    W, x, y, displacements_A, box_A, n_pixels_total : as for ``pose_log_likelihood``
    weights : (S,) weights of the templates. "exact" multiplies likelihoods by them; "cryolike" adds them to log-likelihoods, as if they
        were logarithms.
    variant : also the ``mask_term``
    """
    log_weights = np.log(weights) if variant == "exact" else weights
    n_poses = len(displacements_A) * W.shape[1]
    values = np.empty(len(images_fourier))
    for m, (image, image_ctf) in enumerate(zip(images_fourier, ctf, strict=True)):
        of_templates = [
            logsumexp(pose_log_likelihood(image, template, image_ctf, W, x, y, displacements_A, box_A, n_pixels_total, mask_term=variant))
            for template in templates_fourier
        ]
        values[m] = logsumexp(np.array(of_templates) + log_weights) - np.log(n_poses)
    return values


def _per_image(*columns: ArrayLike) -> list[Real]:
    """Columns with two more axes, for shells and angles."""
    return [np.asarray(column, dtype=np.float64)[..., None, None] for column in columns]


def _ctf(
    frequency: Real,
    wavelength: float,
    defocus_of: Callable[[Real, Real, Real], Real],
    *,
    defocus_u_A: ArrayLike,
    defocus_v_A: ArrayLike,
    angle_rad: ArrayLike,
    phase_shift_rad: ArrayLike,
    spherical_aberration_mm: float,
    amplitude_contrast: float,
) -> Real:
    """CTF at ``frequency`` (1/A), +amplitude_contrast at frequency 0; ``defocus_of`` gives the underfocus (A) at each angle.

    Defoci, angle and phase shift may be scalars or (n,) arrays; gives (n_shells, n_inplanes) or (n, n_shells, n_inplanes).
    """
    u, v, angle, phase = _per_image(defocus_u_A, defocus_v_A, angle_rad, phase_shift_rad)
    aberration = np.pi / 2 * (spherical_aberration_mm * 1e7) * wavelength**3 * frequency**4
    gamma = aberration - np.pi * wavelength * frequency**2 * defocus_of(u, v, angle) - phase
    return -np.sqrt(1 - amplitude_contrast**2) * np.sin(gamma) + amplitude_contrast * np.cos(gamma)
