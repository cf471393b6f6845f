"""Downsampling of square images: Fourier cropping to any smaller box, or mean and max pooling by an integer factor.

Fourier cropping keeps the mean and the centre: pixel ``D0 // 2`` lands on ``D // 2``. Pooling averages (or takes the largest of)
blocks of pixels, which moves the centre (see ``Downsample.centre_offset``) and lets frequencies beyond the new Nyquist alias.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..memory import keep_freed_memory
from ..precision import full_precision

Method = Literal["fourier", "mean", "max"]

# On a CPU the intermediates of a large batch fall out of the cache and each costs fresh pages from the system; groups of about this
# many bytes of images for each thread (of a few: their cache is shared) are faster than the whole batch at once.
_CPU_GROUP_BYTES, _MOST_THREADS = 2 << 20, 4

#: Pixels along a side up to which a GPU multiplies by matrices: the arithmetic grows faster than what there is to copy, and larger
#: images leave more time to start transforms in.
_LARGEST_MULTIPLIED = 256


@dataclass(frozen=True, repr=False)
class Downsample:
    """How to make images smaller: a rule that works for any source box.

    Parameters
    ----------
    factor : positive integer that divides the source box
    box : target box, pixels; exactly one of ``factor`` and ``box`` is given
    method : "fourier" (crop the Fourier transform: no aliasing, any smaller box), or "mean" or "max" (pool blocks of pixels:
        the source box must be a multiple of the new one)

    Raises
    ------
    ArgumentError
        if the arguments cannot work for any image; the methods raise it for a source box that does not fit
    """

    factor: int | None = None
    box: int | None = None
    method: Method = "fourier"

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.box is None):
            raise ArgumentError("Downsample takes exactly one of factor= (for example 2) and box= (the new box in pixels).")
        if self.method not in get_args(Method):
            raise ArgumentError(f"method={self.method!r} is unknown; choose one of {', '.join(map(repr, get_args(Method)))}.")
        if self.factor is not None:
            given: object = self.factor
            whole = int(given) if isinstance(given, float) and given.is_integer() else given
            object.__setattr__(self, "factor", _positive_integer("factor", whole, hint="for other ratios pass box="))
        else:
            object.__setattr__(self, "box", _positive_integer("box", self.box, hint="it is the new box in pixels"))

    def output_box(self, box: int) -> int:
        """Box of the result, pixels, for images of ``box`` pixels; ArgumentError if they cannot be downsampled so."""
        if self.factor is not None:
            if box % self.factor:
                nearest = f", or box={max(1, round(box / self.factor))}" if self.method == "fourier" else ""
                raise ArgumentError(
                    f"factor={self.factor} does not divide a box of {box} pixels; factors that do: {_divisors(box)}{nearest}."
                )
            return box // self.factor
        assert self.box is not None
        if self.box > box:
            raise ArgumentError(f"box={self.box} is larger than the images ({box} pixels); any box from 1 to {box} can be asked for.")
        if self.method != "fourier" and box % self.box:
            raise ArgumentError(
                f"method={self.method!r} cannot go from {box} to {self.box} pixels, because it pools whole blocks; boxes that work: "
                f"{_divisors(box)}. method='fourier' reaches any smaller box."
            )
        return self.box

    def output_pixel_size(self, pixel_size: float, box: int) -> float:
        """Pixel size of the result, in the unit of ``pixel_size``, for images of ``box`` pixels; the field of view stays the same."""
        new = self.output_box(box)
        return pixel_size if new == box else pixel_size * box / new

    def centre_offset(self, box: int) -> float:
        """How far the centre of the new images (pixel D // 2) lies beyond that of the old ones (D0 // 2), along x and along y.

        In source pixels. A shift that centres the particle in an image of ``box`` pixels does so in the new one when this is added.
        Fourier cropping keeps the centre. Pooling moves it by (factor - 1) / 2 where the new box is even, because that is how far the
        middle of a block lies from its first pixel; by -1/2 where only the new box is odd; and not at all where both are.
        """
        new = self.output_box(box)
        if self.method == "fourier":
            return 0.0
        factor = box // new
        return (factor - 1) / 2 + factor * (new // 2) - box // 2

    def __call__(self, images: Tensor) -> Tensor:
        """Downsample (..., D0, D0) floating images to (..., D, D) of the same dtype; the images themselves where D = D0."""
        source = square_box(images)
        target = self.output_box(source)
        if target == source:
            return images
        if self.method == "fourier":
            return crop_fourier(images, target)
        return pool(images, source // target, self.method)

    def __repr__(self) -> str:
        size = f"factor={self.factor}" if self.factor is not None else f"box={self.box}"
        return f"Downsample({size}, method={self.method!r})"


def resized(downsample: Downsample | None, box: int, pixel_size: float) -> tuple[int, float]:
    """Box and pixel size of images of this box and pixel size after downsampling; the same where there is none."""
    return (box, pixel_size) if downsample is None else (downsample.output_box(box), downsample.output_pixel_size(pixel_size, box))


def moved_centre_A(downsample: Downsample | None, box: int, pixel_size: float) -> float:
    """What is added to a shift along x and along y because downsampling moves the centre of images of this box and pixel size, angstrom."""
    return 0.0 if downsample is None else downsample.centre_offset(box) * pixel_size


def crop_fourier(images: Tensor, box: int) -> Tensor:
    """Resample images to a smaller box by cropping their Fourier transform.

    With F(k) the transform about the centre pixel D0 // 2, the result is the real part of the sum over -box/2 <= k < box/2 of
    F(k) exp(2 pi i k (n - box // 2) / box) / D0^2. For an even box that real part averages the coefficients at
    +Nyquist and -Nyquist (so that a wave of exactly that frequency keeps half its amplitude at most).

    Parameters
    ----------
    images : (..., D0, D0) real floating tensor, any device; float16 and bfloat16 are computed in float32
    box : target box size in pixels, 1 <= box <= D0

    Returns
    -------
    (..., box, box) tensor of the same dtype; the mean is kept and pixel D0 // 2 lands on box // 2. The images where box = D0.

    Raises
    ------
    ArgumentError
        if the images are not square and floating, or ``box`` is not between 1 and D0
    """
    source = square_box(images)
    box = _positive_integer("box", box, hint="it is the new box in pixels")
    if box > source:
        raise ArgumentError(f"box={box} is larger than the images ({source} pixels); cropping can only make them smaller.")
    if box == source:
        return images
    if images.numel() == 0:  # FFT libraries refuse an empty batch
        return images.new_empty(*images.shape[:-2], box, box)
    flat = images.reshape(-1, source, source)
    crop = crop_by_products if images.is_cuda and source <= _LARGEST_MULTIPLIED else _crop_groups
    return crop(flat, box).to(images.dtype).reshape(*images.shape[:-2], box, box)


def pool(images: Tensor, factor: int, method: Literal["mean", "max"]) -> Tensor:
    """Replace each block of factor x factor pixels by its mean or its largest value.

    Parameters
    ----------
    images : (..., D0, D0) real floating tensor, any device; float16 and bfloat16 are computed in float32
    factor : positive integer that divides D0
    method : "mean" or "max"

    Returns
    -------
    (..., D0 / factor, D0 / factor) tensor of the same dtype

    Raises
    ------
    ArgumentError
        if the images are not square and floating, the factor does not divide D0, or the method is unknown
    """
    source = square_box(images)
    if method not in ("mean", "max"):
        raise ArgumentError(f"method={method!r} is unknown; pooling knows 'mean' and 'max'.")
    factor = _positive_integer("factor", factor, hint="pooling takes whole blocks of pixels")
    if source % factor:
        raise ArgumentError(f"factor={factor} does not divide a box of {source} pixels; factors that do: {_divisors(source)}.")
    flat = images.reshape(-1, 1, source, source).to(computing_dtype(images.dtype))
    pooled: Tensor = torch.nn.functional.avg_pool2d(flat, factor) if method == "mean" else torch.nn.functional.max_pool2d(flat, factor)
    return pooled.to(images.dtype).reshape(*images.shape[:-2], source // factor, source // factor)


def square_box(images: Tensor) -> int:
    """Box of (..., D, D) real floating images, pixels; ArgumentError for anything else."""
    if not isinstance(images, Tensor):
        raise ArgumentError(f"Images are a torch tensor, such as batch.images, and not a {type(images).__name__}.")
    if images.ndim < 2 or images.shape[-1] != images.shape[-2] or images.shape[-1] < 1:
        raise ArgumentError(f"Images must be square, (..., box, box); these are {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ArgumentError(f"Images must be real floating point, and these are {images.dtype}; convert them, for example images.float().")
    return int(images.shape[-1])


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cache_sized_groups(images: Tensor) -> list[slice]:
    """Slices of (B, ...) images that keep their intermediates in the cache of a CPU; the whole batch on other devices."""
    count = len(images)
    if images.device.type == "cpu" and count:
        room = _CPU_GROUP_BYTES * min(torch.get_num_threads(), _MOST_THREADS)
        count = max(1, room // (images[0].numel() * images.element_size()))
    return [slice(start, start + count) for start in range(0, len(images), count or 1)]


def _crop_groups(images: Tensor, box: int) -> Tensor:
    keep_freed_memory()
    groups = cache_sized_groups(images)
    if len(groups) == 1:
        return _crop_group(images, box)
    cropped = images.new_empty(len(images), box, box)
    for group in groups:
        cropped[group] = _crop_group(images[group], box)
    return cropped


def _crop_group(images: Tensor, box: int) -> Tensor:
    """(B, D0, D0) to (B, box, box), box < D0, on the half-plane kx >= 0 of the Fourier transform."""
    source, half = images.shape[-1], box // 2
    # Columns are dropped before the second transform, so that it runs over box // 2 + 1 columns only. What it leaves lies side by side
    # in memory along y: the axes are kx, ky from there on, and nothing has to be turned round until the last transform.
    images = images.to(computing_dtype(images.dtype)).contiguous()  # images that are one repeated are too much for MKL in older torch
    columns = torch.fft.rfft(images, dim=-1, norm="forward")[..., : half + 1]
    spectrum = torch.fft.fft(columns.mT, dim=-1, norm="forward")
    kept = torch.cat([spectrum[..., : box - half], spectrum[..., source - half :]], dim=-1)
    plus = spectrum[..., half]  # ky = +box/2, which only an even box needs
    if source % 2 or box % 2:  # for two even boxes the phases are 1
        phase = _centre_phase(source, box, spectrum)
        kept = kept * phase[half:, None] * phase[:box].roll(-half)
        plus = plus * phase[-1] * phase[half:]
    if box % 2 == 0:
        # ky = -box/2 and its partner at +box/2 are one frequency of the new grid. In the corner (kx = ky = box/2) the partner
        # of +,+ is -,- and not +,-, so the corner takes +,+ alone and gets its partner with the column below.
        kept[..., :half, half] = 0.5 * (kept[..., :half, half] + plus[..., :half])
        kept[..., half, half] = plus[..., half]
    rows = torch.fft.ifft(kept, dim=-1, norm="forward")
    if box % 2 == 0:
        # kx = +box/2 averaged with its partner at -box/2, which the half-plane does not hold: the real part along y.
        rows[..., half, :] = rows[..., half, :].real.to(rows.dtype)
    cropped: Tensor = torch.fft.irfft(rows.mT, n=box, dim=-1, norm="forward")
    return cropped


def crop_by_products(images: Tensor, box: int) -> Tensor:
    """The same as ``crop_fourier`` of (B, D0, D0) images by two products with matrices: a GPU starts them in less time than transforms.

    With a[n, j] the sum over -box/2 <= k < box/2 of exp(2 pi i k ((n - box // 2) / box - (j - D0 // 2) / D0)) / D0, the result is the
    real part of a X a^T, which is Re a X Re a^T - Im a X Im a^T; for an odd box a is real.
    """
    along_x, along_y = _crop_matrices(images.shape[-1], box, computing_dtype(images.dtype), images.device)
    with full_precision(images.device):
        rows = torch.mm(images.to(along_x.dtype).reshape(-1, len(along_x)), along_x)
        return torch.bmm(along_y.expand(len(images), -1, -1), rows.view(len(images), -1, box))


@lru_cache(maxsize=8)
def _crop_matrices(source: int, box: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What ``crop_by_products`` multiplies rows by, then columns; where a is complex, both parts of each row lie one below the other."""
    with torch.inference_mode(False):
        k, new, old = (torch.arange(n, dtype=torch.float64, device="cpu") - n // 2 for n in (box, box, source))
        angle = 2 * math.pi * k * (new[:, None, None] / box - old[:, None] / source)
        a = torch.polar(torch.ones_like(angle), angle).sum(-1) / source
        parts = [a.real] if box % 2 else [a.real, a.imag]
        along_x = torch.cat(parts).mT
        along_y = torch.stack([a.real, -a.imag][: len(parts)], dim=-1).flatten(1)
        return along_x.to(device, dtype).contiguous(), along_y.to(device, dtype).contiguous()


def _centre_phase(source: int, box: int, like: Tensor) -> Tensor:
    """(2 (box // 2) + 1,) phases of k = -box//2 ... box//2 that carry pixel source // 2 to pixel box // 2; dtype of ``like``."""
    k = torch.arange(-(box // 2), box // 2 + 1, dtype=torch.float64, device="cpu")
    angle = 2 * math.pi * k * ((source // 2) / source - (box // 2) / box)
    return torch.polar(torch.ones_like(angle), angle).to(like.dtype).to(like.device)


def _positive_integer(name: str, value: object, *, hint: str) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        raise ArgumentError(f"{name}={value!r} must be a positive integer; {hint}.")
    return number


def _divisors(number: int) -> str:
    """All positive divisors, ascending, in words."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
