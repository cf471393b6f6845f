"""The likelihood of images given templates, integrated over scale, offset, noise, displacement and in-plane rotation.

A real image has F(-k) = conj F(k). On a grid that holds -k with every k it is then as well described by the real numbers Re F + Im F
(its Hartley transform), whose sums of products are those of F conj G. All is done with these: half the memory, and real Fourier
transforms over the angle, along which a rotation is a shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import ParticleBatch
from ..errors import ArgumentError, TableError
from ..polar_batch import PolarBatch
from ..transforms import PolarGrid
from .precision import full_precision
from .result import ImageLikelihood, pose_and_shift
from .templates import Templates, as_displacements, require_fit

#: Bytes that the arrays of one step take by default: on a CPU (True) few enough for its caches.
_MEMORY_BYTES = {True: 64 << 20, False: 4 << 30}

#: Images that are made ready at a time.
_PREPARED = 16


@torch.no_grad()
def integrated_log_likelihood(
    batch: ParticleBatch,
    templates: Templates,
    displacements_A: Any,
    *,
    by_template: bool = False,
    memory_bytes: int | None = None,
) -> ImageLikelihood:
    """Log-likelihood of each image of a batch, on the device and in the precision of its transforms.

    With weights W of the grid, an image I with CTF C and a template T, displaced by d (angstrom) and then rotated by w into R = C T_dw;
    s = 4 sinc(2x) sinc(2y), the transform of a constant over the box; and sums Ixy = sum W conj(I) R, Ixx = sum W R conj(R),
    Iyy = sum W I conj(I), Iss = sum W s^2, Isx = sum W s R, Isy = sum W s I:

        A = Ixx Iss - Isx^2,  B = Ixy Iss - Isx Isy,  D = Iyy Iss - Isy^2 - B^2 / A,  p = n / 2 - 2,  n pixels in an image
        log L(s, d, w) = -p ln D - ln(A) / 2 + (3 - n) / 2 ln(2 pi) - ln 2 - ln(Iss) / 2 + ln Gamma(p) + p ln(2 Iss)

    which is the marginal over scale, offset (both from -inf to inf) and variance of white noise of CryoLike (its
    ``template_image_comparator``), but with the mask term Isx of the displaced and rotated template. The result is the mean of L
    over displacements and rotations, and its sum over templates with their priors. An image that is multiplied by a has
    ``-2 p ln |a|`` added, a template ``-ln |a|``; the sign of the contrast does not matter. Images should have mean 0
    (``normalize="max"`` or ``"std"``): s is the transform of a constant over a continuous box, and that of a constant over pixels is
    not quite the same.

    In single precision the error is about 1e-7 p / (1 - r^2), r being the correlation of image and template: it matters where there is
    hardly any noise. On CUDA, products are taken in full float32 whatever torch's precision of matrix products is set to.

    Parameters
    ----------
    batch : images with transforms and CTF, from ``stream(..., polar=grid)`` or ``PolarCollate``
    templates : on the same grid
    displacements_A : (n, 2) displacements (x, y) of the template that are tried, angstrom, see ``displacement_grid``
    by_template : also give the matrix of images by templates
    memory_bytes : about what the arrays of one step may take, beside the batch, the templates and what is kept of each pair of the two (24
        bytes); at least one template and displacement are done in a step. By default 64 MB on a CPU, 4 GB elsewhere.

    Raises
    ------
    ArgumentError
        if the batch has no transforms, or its grid or box is not that of the templates
    TableError
        if the table has no optics
    """
    if not isinstance(batch, PolarBatch) or len(batch) == 0:
        what = "is empty" if isinstance(batch, PolarBatch) else "has no polar transforms"
        raise ArgumentError(f"The batch {what}; make it by stream(..., polar=templates.grid) or PolarCollate(grid).")
    tried = as_displacements(displacements_A, templates.box_A)
    require_fit(batch.grid, batch.box, batch.pixel_size, templates, memory_bytes)
    images = _Images.of(batch)
    found = _Found.nothing(len(batch), len(templates), images)
    with nullcontext() if images.on_cpu else full_precision():
        for step in _steps(images, templates, tried, _MEMORY_BYTES[images.on_cpu] if memory_bytes is None else int(memory_bytes)):
            found.add(step, *images.compare(step))
    return _result(images, found, templates, tried, by_template)


@dataclass(frozen=True, eq=False)
class _Step:
    """Some templates at some displacements; spectra are over the angle, with the angular frequency first.

    Attributes
    ----------
    templates : which
    first_displacement, displacements : number of the first of them, and how many
    spectra : (n_q, n_shells, templates * displacements) of the displaced templates
    power : (n_q of half a turn, n_shells, templates) of their squared magnitude
    log_scale : (templates,) logarithm of what they are to be multiplied by to be those that were given
    """

    templates: slice
    first_displacement: int
    displacements: int
    spectra: Tensor
    power: Tensor
    log_scale: Tensor


@dataclass(frozen=True, eq=False)
class _Images:
    """B images made ready: background taken out, scaled, CTF and weights applied; spectra as in ``_Step``.

    Attributes
    ----------
    spectra : (n_q, 2 B, n_shells) conjugates of those of conj(C) I, then of conj(C) s; I without background and s have norm 1
    power : (n_q of half a turn, B, n_shells) conjugates of those of |C|^2
    constant : (B,) float64, all of the log-likelihood that does not depend on the template
    half_n : p
    n_inplanes : number of angles
    """

    spectra: Tensor
    power: Tensor
    constant: Tensor
    half_n: float
    n_inplanes: int

    @classmethod
    def of(cls, batch: PolarBatch) -> _Images:
        grid, count, dtype = batch.grid, len(batch), batch.fourier.dtype
        half_turn, n = grid.n_inplanes // 2, batch.box**2
        half_n = n / 2 - 2
        spectra = batch.fourier.new_empty(half_turn + 1, 2, count, grid.n_shells)
        power = batch.fourier.new_empty(half_turn // 2 + 1, count, grid.n_shells)
        constant = torch.empty(count, dtype=torch.float64, device=batch.device)
        # Of half a turn all is known about the other half, and a sum over both is twice the real part of that over one.
        weights = torch.as_tensor(2 * grid.integration_weights[:, :1], device=batch.device)
        mask = _mask(grid).to(batch.device)
        iss = (weights * mask.square()).sum()
        for start in range(0, count, _PREPARED):  # in double precision, which takes memory
            part = slice(start, start + _PREPARED)
            image = batch.fourier[part, :, :half_turn].to(torch.complex128)
            ctf = _ctf(batch)[part, :, :half_turn].conj()
            isy = (weights * mask * image.real).sum((-2, -1), keepdim=True)
            centred = image - isy / iss * mask
            iyy, rest = ((weights * (some.real**2 + some.imag**2)).sum((-2, -1), keepdim=True) for some in (image, centred))
            # Nothing is left of the mask itself but rounding.
            rest = torch.where(rest > (1e-9 if dtype == torch.complex64 else 1e-18) * iyy, rest, torch.nan)
            scale = weights / 2 * rest.rsqrt()
            power[:, part] = _over_angle(weights * ctf.abs().square()).conj()
            spectra[:, 0, part] = _over_angle(_hartley(centred * ctf * scale)).conj()
            spectra[:, 1, part] = _over_angle(_hartley(ctf * (mask * weights / 2 * iss.rsqrt()))).conj()
            constant[part] = -half_n * rest.flatten().log() - iss.log()
        constant += (3 - n) / 2 * math.log(2 * math.pi) - math.log(2) + math.lgamma(half_n) + half_n * math.log(2)
        return cls(spectra.flatten(1, 2), power, constant, half_n, grid.n_inplanes)

    @property
    def on_cpu(self) -> bool:
        return self.spectra.device.type == "cpu"

    def compare(self, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
        """The log-likelihood but for ``constant``, for (B, templates).

        Log of its sum over displacements and rotations, its largest value, and the place of that among all of them
        (displacement * n_inplanes + rotation).
        """
        half_turn = self.n_inplanes // 2
        ixx = torch.fft.irfft(torch.bmm(self.power, step.power), n=half_turn, dim=0).permute(1, 2, 0).repeat(1, 1, 2)[:, :, None]
        sums = torch.fft.irfft(torch.bmm(self.spectra, step.spectra), n=self.n_inplanes, dim=0).permute(1, 2, 0)
        b, isx = sums.reshape(2, len(self.constant), -1, step.displacements, self.n_inplanes)
        # In place, because these arrays are what takes the memory.
        a = torch.addcmul(ixx, isx, isx, value=-1, out=isx)
        tiny = 8 * torch.finfo(a.dtype).eps
        torch.maximum(a, tiny * ixx, out=a)  # of a template that is all background, rounding is left
        value = b.square_().div_(a).clamp_(max=1 - tiny).neg_().log1p_().mul_(-self.half_n)
        value = value.sub_(a.log_(), alpha=0.5).flatten(2)
        largest, place = value.max(-1)
        total = value.sub_(largest[..., None]).exp_().sum(-1).log_().add_(largest)
        return total - step.log_scale, largest - step.log_scale, place + step.first_displacement * self.n_inplanes


@dataclass(frozen=True, eq=False)
class _Found:
    """What ``_Images.compare`` gave over all steps so far, (B, S) each."""

    total: Tensor
    largest: Tensor
    place: Tensor

    @classmethod
    def nothing(cls, images: int, templates: int, like: _Images) -> _Found:
        low = like.spectra.real.new_full((images, templates), -math.inf)
        return cls(low, low.clone(), torch.zeros_like(low, dtype=torch.int64))

    def add(self, step: _Step, total: Tensor, largest: Tensor, place: Tensor) -> None:
        so_far, highest, at = (values[:, step.templates] for values in (self.total, self.largest, self.place))
        so_far.copy_(torch.logaddexp(so_far, total))
        at.copy_(torch.where(largest > highest, place, at))
        highest.copy_(torch.maximum(largest, highest))


def _steps(images: _Images, templates: Templates, displacements_A: Tensor, memory_bytes: int) -> Iterator[_Step]:
    """All templates at all displacements, as many at a time as the memory allows."""
    grid, dtype, device = templates.grid, images.spectra.dtype, images.spectra.device
    # Of one template at one displacement: the numbers and their spectrum before and after it is put in order, for it and the sums.
    each = (grid.n_shells + images.spectra.shape[1]) * 3 * grid.n_inplanes * dtype.to_real().itemsize
    at_once = max(1, memory_bytes // each)
    few = min(at_once, len(displacements_A))
    for first in range(0, len(displacements_A), few):
        phase = _phase(grid, displacements_A[first : first + few].to(device), templates.box_A)
        cosine, sine = (part(phase).to(dtype.to_real()) for part in (torch.cos, torch.sin))
        for start in range(0, len(templates), max(1, at_once // few)):
            chosen = slice(start, start + max(1, at_once // few))
            given = templates.fourier[chosen, :, : grid.n_inplanes // 2].to(device, dtype)
            scale = given.abs().amax((-2, -1))  # taken out, because squares of very large or small numbers leave single precision
            fourier = given / scale[:, None, None]
            here, opposite = fourier.real + fourier.imag, fourier.real - fourier.imag  # at theta and at theta + pi
            here, opposite = here[:, None], opposite[:, None]
            displaced = torch.cat([here * cosine - opposite * sine, opposite * cosine + here * sine], dim=-1)
            spectra = _over_angle(displaced.flatten(0, 1)).transpose(1, 2)
            power = _over_angle(fourier.abs().square()).transpose(1, 2)
            yield _Step(chosen, first, len(phase), spectra.contiguous(), power.contiguous(), scale.log())


def _result(images: _Images, found: _Found, templates: Templates, displacements_A: Tensor, by_template: bool) -> ImageLikelihood:
    priors = templates.log_weights
    assert isinstance(priors, Tensor)
    tried = len(displacements_A) * images.n_inplanes
    given = (found.total.double() + images.constant[:, None]).cpu() - math.log(tried)
    template = (found.largest.double().cpu() + priors).argmax(1)
    place = found.place.cpu().gather(1, template[:, None])[:, 0]
    rotation = (place % images.n_inplanes).double() * (2 * math.pi / images.n_inplanes)
    displacement = displacements_A[place // images.n_inplanes]
    pose, shift = pose_and_shift(templates.rotvecs[template], displacement, rotation)
    unknown = given.isnan().any(1)
    for numbers in (displacement, rotation, pose, shift):
        numbers[unknown] = torch.nan
    return ImageLikelihood((given + priors).logsumexp(1), template, displacement, rotation, pose, shift, given if by_template else None)


def _ctf(batch: PolarBatch) -> Tensor:
    if batch.polar_ctf is None:
        raise TableError("The table has no optics, which the likelihood needs; pass the file that holds the ctf/* columns as passthrough=.")
    return batch.polar_ctf


def _hartley(fourier: Tensor) -> Tensor:
    """(..., n_inplanes) real part plus imaginary part, from half a turn of a transform of something real."""
    if not fourier.is_complex():
        return torch.cat([fourier, fourier], dim=-1)
    return torch.cat([fourier.real + fourier.imag, fourier.real - fourier.imag], dim=-1)


def _over_angle(values: Tensor) -> Tensor:
    """(n_q, N, n_shells) Fourier transform over the last axis of (N, n_shells, angles) real numbers."""
    spectra: Tensor = torch.fft.rfft(values)
    return spectra.permute(2, 0, 1)


def _mask(grid: PolarGrid) -> Tensor:
    """(n_shells, n_inplanes // 2) transform of 1 over the box, over half a turn."""
    radii, angles = torch.from_numpy(grid.radii)[:, None], torch.from_numpy(grid.angles[: grid.n_inplanes // 2])
    mask: Tensor = 4 * torch.sinc(2 * radii * angles.cos()) * torch.sinc(2 * radii * angles.sin())
    return mask


def _phase(grid: PolarGrid, displacements_A: Tensor, box_A: float) -> Tensor:
    """(n, n_shells, n_inplanes // 2) phase, radian, that displacements (x, y) take from a transform, over half a turn."""
    k = torch.from_numpy(grid.radii * (4 * math.pi / box_A))[:, None].to(displacements_A.device)
    angles = torch.from_numpy(grid.angles[: grid.n_inplanes // 2]).to(displacements_A.device)
    x, y = displacements_A.T[:, :, None, None]
    phase: Tensor = k * (y * angles.cos() + x * angles.sin())
    return phase
