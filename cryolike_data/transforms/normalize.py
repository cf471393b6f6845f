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
    background_radius : radius of the particle as a fraction of the box, 0 < radius <= 0.5 sqrt(2); for "background" only

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
        if not 0 < self.background_radius <= 0.5 * math.sqrt(2):
            raise ArgumentError(
                f"background_radius={self.background_radius!r} is a fraction of the box: more than 0, at most 0.5 sqrt(2) = 0.707; "
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

    def apply(self, images: Tensor) -> tuple[Tensor, int]:
        """The same without a warning: the normalised images, and how many of them were constant."""
        box = square_box(images)
        outside = _outside(box, self.background_radius).to(images.device) if self.method == "background" else None
        flat = images.reshape(-1, box * box)
        normalized, constant = torch.empty_like(flat), 0
        for group in cache_sized_groups(flat):
            pixels = flat[group].to(computing_dtype(images.dtype))
            normalized[group], count = _standardize(pixels, outside, by_peak=self.method == "max")
            constant += count
        return normalized.reshape(images.shape), constant


def _standardize(pixels: Tensor, chosen: Tensor | None, *, by_peak: bool) -> tuple[Tensor, int]:
    """(B, P) pixels shifted and scaled by the statistics of the ``chosen`` ones, and the number of images where these are constant."""
    low, high = torch.aminmax(_part(pixels, chosen), dim=-1, keepdim=True)
    constant = low == high  # of the values as they came: the rounded mean of a constant need not equal it
    # Twice, because the first mean carries the rounding of the offset: 1e-3 in float32 where the offset is 1e4.
    for _ in range(2):
        mean = _part(pixels, chosen).mean(-1, keepdim=True)
        pixels, low, high = pixels - mean, low - mean, high - mean
    peak = torch.maximum(-low, high)  # exactly the largest magnitude, because rounding keeps the order
    pixels = pixels / torch.where(constant, 1, peak)
    if not by_peak:
        # The largest measured magnitude is 1 here, so squaring can neither overflow nor underflow to zero.
        deviation = _part(pixels, chosen).square().mean(-1, keepdim=True).sqrt()
        pixels = pixels / torch.where(constant, 1, deviation)
    count = int(constant.sum())
    return (torch.where(constant, 0, pixels) if count else pixels), count


def _part(pixels: Tensor, chosen: Tensor | None) -> Tensor:
    return pixels if chosen is None else pixels[:, chosen]


def _outside(box: int, radius: float) -> Tensor:
    """(box * box,) bool mask of the pixels farther than radius * box from the centre pixel."""
    away = (torch.arange(box) - box // 2).double()
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
