"""Transforms over the angle of a polar grid, and what of a grid they are taken of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..transforms import PolarGrid


def at_rotations(images: Tensor, templates: Tensor, angles: int) -> Tensor:
    """(B, T, angles) sums over shells and angles of images with templates that are rotated by each angle."""
    # The angle first of all to the end, because strided transforms are slow on CUDA.
    sums: Tensor = torch.fft.irfft(torch.bmm(images, templates).permute(1, 2, 0), n=angles, norm="forward")
    return sums


def hartley(fourier: Tensor) -> Tensor:
    """(..., n_inplanes) real part plus imaginary part, from half a turn of a transform of something real."""
    return torch.cat([fourier.real + fourier.imag, fourier.real - fourier.imag], dim=-1)


def over_angle(values: Tensor, norm: str = "backward") -> Tensor:
    """(n_q, N, n_shells) Fourier transform over the last axis of (N, n_shells, angles) real numbers."""
    spectra: Tensor = torch.fft.rfft(values, norm=norm)
    return spectra.permute(2, 0, 1)


def on(few: Tensor, device: torch.device) -> Tensor:
    """Some numbers on a device, without waiting for what it is at."""
    return few.to(device, non_blocking=True)


def mask_transform(grid: PolarGrid) -> Tensor:
    """(n_shells, n_inplanes // 2) transform of 1 over the box, over half a turn."""
    radii, angles = torch.from_numpy(grid.radii)[:, None], torch.from_numpy(grid.angles[: grid.n_inplanes // 2])
    mask: Tensor = 4 * torch.sinc(2 * radii * angles.cos()) * torch.sinc(2 * radii * angles.sin())
    return mask


def displacement_phase(grid: PolarGrid, displacements_A: Tensor, box_A: float) -> Tensor:
    """(n, n_shells, n_inplanes // 2) phase, radian, that displacements (x, y) take from a transform, over half a turn."""
    k = on(torch.from_numpy(grid.radii * (4 * math.pi / box_A))[:, None], displacements_A.device)
    angles = on(torch.from_numpy(grid.angles[: grid.n_inplanes // 2]), displacements_A.device)
    x, y = displacements_A.T[:, :, None, None]
    phase: Tensor = k * (y * angles.cos() + x * angles.sin())
    return phase
