"""The polar Fourier transform of images as CryoLike defines it, and its normalisation.

Axes are CryoLike's: the first coordinate r cos(theta) belongs to the first image axis (rows, y) and r sin(theta) to the second
(columns, x). Units are those of ``PolarGrid``.
"""

from __future__ import annotations

import math
import os
import threading

import numpy as np
import torch
from torch import Tensor

from ..arguments import device_here
from ..compiled import not_compiled
from ..errors import ArgumentError
from .downsample import square_box
from .finufft_plan import make_plan, stream_of
from .polar_grid import PolarGrid, require_grid

#: Transforms that one call of finufft takes: on a CPU (False) so few that the numbers of a call stay in the cache.
_N_TRANS = {False: 8, True: 64}

#: CryoLike's accuracies.
EPS = {torch.complex64: 1e-6, torch.complex128: 1e-12}
#: The last transform of each thread, and what it is for: a plan costs as much as the transforms of some images.
_KEPT = threading.local()


class PolarTransform:
    """The polar Fourier transform of images of one box, through one plan of finufft (CPU) or cufinufft (CUDA) that every call reuses.

    F(r, theta) = 4 pi / D * sum over (j, l) of I[j, l] exp(-i 4 pi / D * (r cos(theta) (j - D//2) + r sin(theta) (l - D//2))).
    Not thread safe, because finufft plans are not: make one for each thread.
    No gradient passes through it; one does through ``to_polar_exact``.

    Parameters
    ----------
    grid : points at which to evaluate
    box : D, box of the images, pixels
    eps : relative accuracy asked of finufft, for each image in relation to its own largest pixel; by default CryoLike's, 1e-12 for
        complex128 and 1e-6 for complex64
    n_trans : transforms a finufft call; with an even ``grid.n_inplanes`` each takes two images. Smaller batches are padded to it.
    dtype : complex128, or complex64, which is faster and whose rounded coordinates limit the accuracy whatever ``eps`` is: to 1e-7 D
        in the root mean square, and to 2e-7 D of the largest coefficient anywhere
    device : where the transform is done. On CUDA all calls must be made on the torch stream that is current here.

    Raises
    ------
    ArgumentError
        if an argument is out of range
    MissingDependencyError
        if finufft (on CUDA: cufinufft) is not installed or cannot be loaded
    """

    def __init__(
        self,
        grid: PolarGrid,
        box: int,
        *,
        eps: float | None = None,
        n_trans: int = 32,
        dtype: torch.dtype = torch.complex128,
        device: torch.device | str = "cpu",
    ) -> None:
        require_grid(grid)
        if dtype not in EPS:
            raise ArgumentError(f"dtype of a transform is torch.complex64 or torch.complex128, not {dtype}")
        eps = EPS[dtype] if eps is None else eps
        if box < 1 or n_trans < 1 or not eps > 0:
            raise ArgumentError(f"box={box}, n_trans={n_trans} and eps={eps} must all be positive.")
        self.grid, self.box, self.eps, self.n_trans, self.dtype, self.device = grid, box, eps, n_trans, dtype, device_here(device)
        radial = (4 * math.pi / box) * grid.radii[:, None]
        points = [(radial * part(grid.angles)).ravel() for part in (np.cos, np.sin)]
        # Written over by every call, in inference mode and outside of it.
        with torch.inference_mode(False):
            self._execute = make_plan(points, box, eps, n_trans, dtype, self.device)
            self._packed = torch.zeros(n_trans, box, box, dtype=dtype, device=self.device)
            self._spectra = torch.empty(n_trans, grid.n_shells * grid.n_inplanes, dtype=dtype, device=self.device)
        # A real image has F(-k) = conj F(k), and with an even number of angles -k is on the grid, half a turn on: the transforms
        # of a pair a, b can then be told apart in the one of a + i b.
        self._paired = grid.n_inplanes % 2 == 0

    def __call__(self, images: Tensor) -> Tensor:
        """(B, n_shells, n_inplanes) complex on the device of the images, for any number of (B, box, box) real images.

        An image with a NaN or an infinity gives NaN, one with nothing but numbers too small to be divided by gives zeros; both leave
        the others alone.
        """
        _check_batch(images, self.box)
        transformed: Tensor = not_compiled(self._transform)(images)  # it writes into buffers that finufft reads
        return transformed

    def _transform(self, images: Tensor) -> Tensor:
        pixels = images.detach().to(self.device)
        pixels = pixels if pixels.dtype in (torch.float32, torch.float64) else pixels.to(self.dtype.to_real())
        # Pairing images of very different scale would leave the fainter one with the error of the brighter one.
        scale = pixels.abs().amax((-2, -1), keepdim=True).to(self.dtype.to_real())
        inverse = scale.reciprocal()
        usable = inverse.isfinite() & (inverse > 0)
        if pixels.is_cuda or not bool(usable.all()):  # to look would be to wait for a GPU
            pixels = torch.where(usable, pixels, 0)
        inverse = torch.where(usable, inverse, 0)
        scale = scale * (4 * math.pi / self.box)
        result = torch.empty(len(images), self.grid.n_shells, self.grid.n_inplanes, dtype=self.dtype, device=self.device)
        step = self.n_trans * (2 if self._paired else 1)
        for start in range(0, len(images), step):
            group = slice(start, start + step)
            self._transform_group(pixels[group], inverse[group], scale[group], result[group])
        return result.to(images.device)

    def _transform_group(self, images: Tensor, inverse: Tensor, scale: Tensor, result: Tensor) -> None:
        """Fill (b, n_shells, n_inplanes) ``result`` from (b, box, box) real images, b at most what one finufft call takes."""
        count = -(-len(images) // 2) if self._paired else len(images)
        more = len(images) - count
        torch.mul(images[:count], inverse[:count], out=self._packed.real[:count])
        torch.mul(images[count:], inverse[count:], out=self._packed.imag[:more])
        self._packed.imag[more:count] = 0  # what earlier images left beyond is transformed as well, and not looked at
        self._execute(self._packed, self._spectra)
        spectra = self._spectra[:count].view(count, self.grid.n_shells, self.grid.n_inplanes)
        if not self._paired:
            torch.mul(spectra, scale, out=result)
            return
        # Straight into the result, because fresh memory takes as long as the arithmetic.
        half = self.grid.n_inplanes // 2
        at_k, at_minus_k = spectra[..., :half], torch.conj_physical(spectra[..., half:])
        torch.add(at_k, at_minus_k, out=result[:count, :, :half]).mul_(0.5 * scale[:count])
        torch.sub(at_k[:more], at_minus_k[:more], out=result[count:, :, :half]).mul_(-0.5j * scale[count:])
        torch.conj_physical(result[..., :half], out=result[..., half:])

    def __repr__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')}, {self.device}"
        return f"PolarTransform({self.grid!r}, box={self.box}, eps={self.eps:g}, n_trans={self.n_trans}, {kind})"


def to_polar(images: Tensor, grid: PolarGrid, *, eps: float | None = None, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Polar Fourier transform of (B, D, D) real images: (B, n_shells, n_inplanes) complex, to a relative accuracy of ``eps``.

    Done on the device of the images, through a plan that is kept for the next call of the same thread with the same arguments and
    box, with no gradient. See ``PolarTransform`` for the formula, the accuracy of each ``dtype`` and the errors.
    """
    transform: PolarTransform = not_compiled(_kept_transform)(images, grid, eps, dtype)
    return transform(images)


def to_polar_exact(images: Tensor, grid: PolarGrid) -> Tensor:
    """The same as ``to_polar`` by direct summation in float64, on the device of the images and without finufft.

    Costs D^2 complex multiplications an image and point: at D = 128 with CryoLike's default grid about 300 times finufft's
    arithmetic. For tests, for a few images, and where finufft is not installed.

    Parameters
    ----------
    images : (B, D, D) real floating tensor
    grid : points at which to evaluate

    Returns
    -------
    (B, n_shells, n_inplanes) complex128 tensor
    """
    require_grid(grid)
    box = square_box(images)
    _check_batch(images, box)
    offset = torch.arange(box, dtype=torch.float64, device=images.device) - box // 2
    angles = torch.as_tensor(grid.angles, device=images.device)
    pixels = images.to(torch.complex128)
    shells = []
    for radius in grid.radii.tolist():  # a shell at a time bounds the memory to (B, D, n_inplanes)
        phase = -4 * math.pi / box * radius * offset
        down = torch.exp(1j * phase[:, None] * angles.cos())
        across = torch.exp(1j * phase[:, None] * angles.sin())
        shells.append(((pixels @ across) * down).sum(-2))
    return torch.stack(shells, dim=1) * (4 * math.pi / box)


def normalize_polar(fourier: Tensor, grid: PolarGrid, *, out: Tensor | None = None) -> Tensor:
    """Scale each transform so that the integral of its squared magnitude over the disk is 1, as CryoLike does (``ord=2``).

    Parameters
    ----------
    fourier : (..., n_shells, n_inplanes) complex tensor
    grid : the grid it was evaluated on
    out : where the result goes, such as ``fourier`` itself; a new tensor if not given

    Returns
    -------
    tensor of the same shape and dtype; a transform that is zero everywhere stays zero

    Raises
    ------
    ArgumentError
        if the tensor does not have the shape of the grid
    """
    require_grid(grid)
    shape = (grid.n_shells, grid.n_inplanes)
    if tuple(fourier.shape[-2:]) != shape:
        raise ArgumentError(f"The transform is {tuple(fourier.shape)}, but the grid has {shape[0]} shells x {shape[1]} angles.")
    numbers = torch.view_as_real(fourier.resolve_conj())
    weights = torch.as_tensor(grid.integration_weights[:, 0], device=fourier.device)  # the same at all angles
    # As real numbers: norms and products of complex ones are slow.
    of_shells = torch.linalg.vector_norm(numbers.flatten(-2), dim=-1, dtype=torch.float64)
    power = (of_shells.square() * weights).sum(-1)[..., None, None, None]
    scale = torch.where(power == 0, 1, power).rsqrt().to(numbers.dtype)
    if out is None:
        return torch.view_as_complex(numbers * scale)
    torch.mul(numbers, scale, out=torch.view_as_real(out))
    return out


def _kept_transform(images: Tensor, grid: PolarGrid, eps: float | None, dtype: torch.dtype) -> PolarTransform:
    require_grid(grid)
    box, device = square_box(images), images.device
    a_transform = 2 if grid.n_inplanes % 2 == 0 else 1
    n_trans = max(1, min(_N_TRANS[images.is_cuda], -(-len(images) // a_transform)))
    # A process that was forked must not use the plan of its parent.
    key = (grid, box, eps, n_trans, dtype, device, torch.get_num_threads(), stream_of(device), os.getpid())
    if _KEPT.__dict__.get("key") != key:
        _KEPT.__dict__.clear()  # before there is another one
        _KEPT.transform = PolarTransform(grid, box, eps=eps, n_trans=n_trans, dtype=dtype, device=device)
        _KEPT.key = key
    transform: PolarTransform = _KEPT.transform
    return transform


def _check_batch(images: Tensor, box: int) -> None:
    if images.ndim != 3 or square_box(images) != box:
        raise ArgumentError(f"The polar transform takes (B, {box}, {box}) images; these are {tuple(images.shape)}.")
