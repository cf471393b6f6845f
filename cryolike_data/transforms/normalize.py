"""Per-image normalisation: CryoLike's (mean and largest magnitude), mean and standard deviation, or the same of the background."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from .downsample import cache_sized_groups, computing_dtype, square_box

NormalizeMethod = Literal["max", "std", "background"]

_DEFAULT_RADIUS = 0.375


@dataclass(frozen=True)
class Normalize:
    """Shift and scale every image by its own statistics.

    Parameters
    ----------
    method : "max": subtract the mean, divide by the largest magnitude (what CryoLike does to images before its transform);
        "std": mean 0 and population standard deviation 1;
        "background": the same, measured over the pixels farther than ``background_radius`` from the centre pixel (box // 2, box // 2)
    background_radius : radius of the particle as a fraction of the box, 0 < radius < 0.5 sqrt(2); for "background" only

    Raises
    ------
    ArgumentError
        if an argument is out of range, or (when called) no pixel of the images lies outside the radius
    """

    method: NormalizeMethod
    background_radius: float = _DEFAULT_RADIUS

    def __post_init__(self) -> None:
        if self.method not in get_args(NormalizeMethod):
            raise ArgumentError(f"method={self.method!r} is unknown; choose one of {', '.join(map(repr, get_args(NormalizeMethod)))}.")
        if not 0 < self.background_radius < 0.5 * math.sqrt(2):
            raise ArgumentError(
                f"background_radius={self.background_radius!r} is a fraction of the box: more than 0, less than 0.5 sqrt(2) = 0.707; "
                f"the usual value is {_DEFAULT_RADIUS}."
            )
        if self.method != "background" and self.background_radius != _DEFAULT_RADIUS:
            raise ArgumentError(f"background_radius is for method='background'; method={self.method!r} takes all pixels. Leave it out.")

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise (..., D, D) real floating images on any device; a new tensor of the same shape and dtype.

        float16 and bfloat16 are computed in float32. An image whose pixels (for "background": background pixels) are all equal has
        no scale: it becomes zeros, and one ``UserWarning`` a call counts such images. A NaN stays within its own image.
        """
        normalized, constant = self.apply(images)
        if constant:
            _warn_of_constant(constant, math.prod(images.shape[:-2]), self.method)
        return normalized

    def apply(self, images: Tensor, *, out: Tensor | None = None) -> tuple[Tensor, int]:
        """The same without a warning: the normalised images (in ``out``, where that is given), and how many of them were constant."""
        box = square_box(images)
        outside = _outside(box, self.background_radius).to(images.device) if self.method == "background" else None
        flat = images.reshape(-1, box * box)
        normalized = torch.empty_like(flat) if out is None else out.view(flat.shape)
        mean, peak = (torch.empty((len(flat), 1), dtype=computing_dtype(images.dtype), device=images.device) for _ in range(2))
        by_peak = self.method == "max"
        for group in cache_sized_groups(flat):
            pixels = flat[group].to(mean.dtype)
            # In place, because every temporary of this size costs fresh pages from the system.
            work = normalized[group] if pixels.dtype == images.dtype else torch.empty_like(pixels)
            _subtract_mean(pixels, work, mean[group], peak[group], outside)
            _scale(work, peak[group], outside, by_peak=by_peak)
            if work.dtype != images.dtype:
                normalized[group] = work
        # A mean carries the rounding of an offset: 1e-3 where that is 1e4. Each image is judged by itself, so that what becomes of it
        # does not depend on those beside it. A NaN passes no comparison.
        trusted = mean.abs() < peak
        constant = 0
        if not bool(trusted.all()):
            rows = (~trusted[:, 0]).nonzero()[:, 0]
            for group in cache_sized_groups(flat[: len(rows)]):
                centred, scale, constant_here = _centred(flat[rows[group]].to(mean.dtype), outside)
                _scale(centred, scale, outside, by_peak=by_peak)
                normalized[rows[group]] = centred.to(images.dtype)
                constant += constant_here
        return normalized.reshape(images.shape), constant


def _subtract_mean(pixels: Tensor, out: Tensor, mean: Tensor, peak: Tensor, chosen: Tensor | None) -> None:
    """Fill ``out`` with (B, P) pixels without the mean of the ``chosen`` ones, and ``peak`` with the largest magnitude of these."""
    # Few calls: each gives the interpreter lock away, which another thread of an export then has.
    torch.mean(_part(pixels, chosen), -1, keepdim=True, out=mean)
    torch.sub(pixels, mean, out=out)
    _peak(_part(out, chosen), out=peak)


def _scale(pixels: Tensor, peak: Tensor, chosen: Tensor | None, *, by_peak: bool) -> None:
    """Divide (B, P) pixels by the largest magnitude of the ``chosen`` ones, or by their deviation, in place."""
    pixels.div_(peak)
    if not by_peak:
        # The largest measured magnitude is 1 here, so squaring can neither overflow nor underflow to zero.
        deviation = _part(pixels, chosen).square().mean(-1, keepdim=True).sqrt()
        pixels.div_(torch.where(deviation == 0, 1, deviation))


def _centred(pixels: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """(B, P) pixels of any offset without the mean of the ``chosen`` ones, and the largest magnitude of these.

    An image has no scale where the chosen ones are all equal: it becomes zeros, with a magnitude of 1. The last value counts them.
    """
    measured = _part(pixels, chosen)
    low, high = measured.amin(-1, keepdim=True), measured.amax(-1, keepdim=True)
    constant = low == high  # of the values as they came: the rounded mean of a constant need not equal it
    out = pixels - (low + (high - low) / 2)
    out.sub_(_part(out, chosen).mean(-1, keepdim=True)).masked_fill_(constant, 0)
    return out, torch.where(constant, 1, _peak(_part(out, chosen))), int(constant.sum())


def _peak(pixels: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Largest magnitude of each image."""
    # torch.aminmax is slow along an axis.
    return torch.maximum(pixels.amin(-1, keepdim=True).neg_(), pixels.amax(-1, keepdim=True), out=out)


def _part(pixels: Tensor, chosen: Tensor | None) -> Tensor:
    return pixels if chosen is None else pixels[:, chosen]


def _outside(box: int, radius: float) -> Tensor:
    """(box * box,) bool mask of the pixels farther than radius * box from the centre pixel."""
    away = (torch.arange(box, device="cpu") - box // 2).double()
    distance = (away[:, None] ** 2 + away**2).sqrt().flatten()
    mask = distance > radius * box
    if not bool(mask.any()):
        largest = float(distance.max()) / box
        raise ArgumentError(
            f"background_radius={radius} leaves no pixel of a {box} pixel box outside; it must be less than {largest:.4g} for this box."
        )
    return mask


def _warn_of_constant(count: int, total: int, method: str) -> None:
    what = "have a constant background" if method == "background" else "are constant"
    warnings.warn(
        f"{count} of {total} images {what} and cannot be normalised by method={method!r}; they became zeros.", UserWarning, stacklevel=3
    )
