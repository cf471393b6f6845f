"""The likelihood of images given templates, integrated over scale, offset, noise, displacement and in-plane rotation.

A real image has F(-k) = conj F(k). On a grid that holds -k with every k it is then as well described by the real numbers Re F + Im F
(its Hartley transform), whose sums of products are those of F conj G. All is done with these: half the memory, and real Fourier
transforms over the angle, along which a rotation is a shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import ParticleBatch
from ..errors import ArgumentError, TableError
from ..polar_batch import PolarBatch
from ..precision import full_precision
from .pointwise import log_marginal, log_sum_exp
from .result import ImageLikelihood, pose_and_shift
from .spectra import at_rotations, displacement_phase, hartley, mask_transform, on, over_angle
from .templates import Templates, as_displacements, require_fit

#: Bytes that the arrays of one step take by default: on a CPU (True) few enough for its caches.
_MEMORY_BYTES = {True: 64 << 20, False: 4 << 30}

#: Images that are made ready at a time, on a CPU (True) and elsewhere.
_PREPARED = {True: 16, False: 256}


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
    return begin_comparison(batch, templates, tried, by_template=by_template, memory_bytes=memory_bytes)()


@torch.no_grad()
def begin_comparison(
    batch: PolarBatch, templates: Templates, tried: Tensor, *, by_template: bool, memory_bytes: int | None
) -> Callable[[], ImageLikelihood]:
    """Start ``integrated_log_likelihood`` of what fits together; what this returns waits for the result.

    On CUDA all work is queued when this returns, so that the next batch can be made ready meanwhile.
    """
    assert isinstance(templates.log_weights, Tensor)
    priors = on(templates.log_weights, batch.device)
    images = _Images.of(batch)
    found = _Found.nothing(len(batch), len(templates), images)
    with nullcontext() if images.on_cpu else full_precision(batch.device):
        for step in _steps(images, templates, tried, _MEMORY_BYTES[images.on_cpu] if memory_bytes is None else int(memory_bytes)):
            found.add(step, *images.compare(step))
    cuda = batch.images.is_cuda
    *summary, given = (tensor.to("cpu", non_blocking=cuda) for tensor in _summary(images, found, priors, len(tried), by_template))
    copied = torch.cuda.current_stream(batch.device).record_event() if cuda else None

    def finish() -> ImageLikelihood:
        if copied is not None:
            copied.synchronize()
        return _result(templates, tried, given if by_template else None, *summary)

    return finish


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
    spectra : (n_q, B, n_shells) conjugates of those of conj(C) I, divided by the number of angles; I without background has norm 1
    mask : (n_q, B, n_shells) the same of conj(C) s, s having norm 1; of half a turn where C is real, since the other half is then the same
    power : (n_q of half a turn, B, n_shells) the same of |C|^2
    constant : (B,) float64, all of the log-likelihood that does not depend on the template
    half_n : p
    n_inplanes : number of angles
    """

    spectra: Tensor
    mask: Tensor
    power: Tensor
    constant: Tensor
    half_n: float
    n_inplanes: int

    @classmethod
    def of(cls, batch: PolarBatch) -> _Images:
        grid, count, dtype = batch.grid, len(batch), batch.fourier.dtype
        half_turn, n = grid.n_inplanes // 2, batch.box**2
        half_n = n / 2 - 2
        all_ctf = _ctf(batch)
        spectra = batch.fourier.new_empty(half_turn + 1, count, grid.n_shells)
        power = batch.fourier.new_empty(half_turn // 2 + 1, count, grid.n_shells)
        masked = torch.empty_like(spectra if all_ctf.is_complex() else power)
        constant = torch.empty(count, dtype=torch.float64, device=batch.device)
        # Of half a turn all is known about the other half, and a sum over both is twice the real part of that over one.
        weights = on(torch.from_numpy(2 * grid.integration_weights[:, :1]), batch.device)
        mask = on(mask_transform(grid), batch.device)
        iss = (weights * mask.square()).sum()
        at_once = _PREPARED[batch.device.type == "cpu"]
        for start in range(0, count, at_once):  # in double precision, which takes memory
            part = slice(start, start + at_once)
            image = batch.fourier[part, :, :half_turn].to(torch.complex128)
            ctf = all_ctf[part, :, :half_turn].conj()
            isy = (weights * mask * image.real).sum((-2, -1), keepdim=True)
            centred = image - isy / iss * mask
            iyy, rest = ((weights * (some.real**2 + some.imag**2)).sum((-2, -1), keepdim=True) for some in (image, centred))
            # Nothing is left of the mask itself but rounding.
            rest = torch.where(rest > (1e-9 if dtype == torch.complex64 else 1e-18) * iyy, rest, torch.nan)
            scale = weights / 2 * rest.rsqrt()
            power[:, part] = over_angle(weights * ctf.abs().square(), norm="forward").conj()
            spectra[:, part] = over_angle(hartley(centred * ctf * scale), norm="forward").conj()
            of_mask = ctf * (mask * weights / 2 * iss.rsqrt())
            masked[:, part] = over_angle(hartley(of_mask) if of_mask.is_complex() else of_mask, norm="forward").conj()
            constant[part] = -half_n * rest.flatten().log() - iss.log()
        constant += (3 - n) / 2 * math.log(2 * math.pi) - math.log(2) + math.lgamma(half_n) + half_n * math.log(2)
        return cls(spectra, masked, power, constant, half_n, grid.n_inplanes)

    @property
    def on_cpu(self) -> bool:
        return self.spectra.device.type == "cpu"

    def compare(self, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
        """The log-likelihood but for ``constant``, for (B, templates).

        Log of its sum over displacements and rotations, its largest value, and the place of that among all of them
        (displacement * n_inplanes + rotation).
        """
        n, half_turn = self.n_inplanes, self.n_inplanes // 2
        of_half = len(self.mask) < len(self.spectra)  # then only every other angular frequency of a template has to do with the mask
        period = half_turn if of_half else n
        shape = (len(self.constant), -1, step.displacements)
        ixx = at_rotations(self.power, step.power, half_turn).repeat(1, 1, period // half_turn)[:, :, None, None]
        isx = at_rotations(self.mask, step.spectra[::2] if of_half else step.spectra, period).reshape(*shape, 1, period)
        b = at_rotations(self.spectra, step.spectra, n).reshape(*shape, n // period, period)
        total, largest, place = log_sum_exp(log_marginal(ixx, isx, b, self.half_n).flatten(2))
        return total - step.log_scale, largest - step.log_scale, place + step.first_displacement * n


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
    sums = len(images.constant) * (1 + len(images.mask) / len(images.spectra))
    each = int((grid.n_shells + sums) * 3 * grid.n_inplanes * dtype.to_real().itemsize)
    at_once = max(1, memory_bytes // each)
    few = min(at_once, len(displacements_A))
    for first in range(0, len(displacements_A), few):
        phase = displacement_phase(grid, on(displacements_A[first : first + few], device), templates.box_A)
        cosine, sine = (part(phase).to(dtype.to_real()) for part in (torch.cos, torch.sin))
        for start in range(0, len(templates), max(1, at_once // few)):
            chosen = slice(start, start + max(1, at_once // few))
            given = templates.fourier[chosen, :, : grid.n_inplanes // 2].to(device, dtype)
            scale = given.abs().amax((-2, -1))  # taken out, because squares of very large or small numbers leave single precision
            fourier = given / scale[:, None, None]
            here, opposite = fourier.real + fourier.imag, fourier.real - fourier.imag  # at theta and at theta + pi
            here, opposite = here[:, None], opposite[:, None]
            displaced = cosine.new_empty(len(scale), len(phase), grid.n_shells, grid.n_inplanes)
            first_half, second_half = displaced.chunk(2, dim=-1)
            torch.mul(here, cosine, out=first_half).addcmul_(opposite, sine, value=-1)
            torch.mul(opposite, cosine, out=second_half).addcmul_(here, sine)
            spectra = over_angle(displaced.flatten(0, 1)).transpose(1, 2)
            power = over_angle(fourier.abs().square()).transpose(1, 2)
            yield _Step(chosen, first, len(phase), spectra.contiguous(), power.contiguous(), scale.log())


def _summary(images: _Images, found: _Found, priors: Tensor, displacements: int, by_template: bool) -> tuple[Tensor, ...]:
    """Of each image: log-likelihood, most likely template, place of its pose, whether it is unknown, and what is given each template.

    The last is of no template unless asked for.
    """
    given = found.total.double() + (images.constant[:, None] - math.log(displacements * images.n_inplanes))
    template = (found.largest.double() + priors).argmax(1)
    place = found.place.gather(1, template[:, None])[:, 0]
    return (given + priors).logsumexp(1), template, place, given.isnan().any(1), given if by_template else given[:, :0]


def _result(templates: Templates, tried: Tensor, given: Tensor | None, *summary: Tensor) -> ImageLikelihood:
    log_likelihood, template, place, unknown = summary
    n_inplanes = templates.grid.n_inplanes
    rotation = (place % n_inplanes).double() * (2 * math.pi / n_inplanes)
    displacement = tried[place // n_inplanes]
    pose, shift = pose_and_shift(templates.rotvecs[template], displacement, rotation)
    for numbers in (displacement, rotation, pose, shift):
        numbers[unknown] = torch.nan
    return ImageLikelihood(log_likelihood, template, displacement, rotation, pose, shift, given)


def _ctf(batch: PolarBatch) -> Tensor:
    if batch.polar_ctf is None:
        raise TableError("The table has no optics, which the likelihood needs; pass the file that holds the ctf/* columns as passthrough=.")
    return batch.polar_ctf
