"""Fourier cropping beside mean pooling (torch's own) on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cryolike_data import Downsample

from .measure import Figure, Settings, in_turn, rate_figure

BOUND = 0.7


def downsample(settings: Settings) -> Iterator[Figure]:
    """Images a second: Fourier cropping / mean pooling, by a factor of two."""
    for box, batch in ((128, 256), (256, 64)):
        images = torch.randn((batch, box, box), generator=torch.Generator().manual_seed(0))
        crop = Downsample(box=box // 2)
        calls = max(2, round(settings.seconds / min(_seconds(crop, images, 1) for _ in range(3))))
        rates = in_turn([partial(_rate, _pool, images, calls), partial(_rate, crop, images, calls)])
        yield rate_figure("downsample", f"{box} to {box // 2} px, {batch} images", rates, "img/s", bound=("at least", BOUND))


def _pool(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images[:, None], 2)[:, 0]


def _rate(action: Callable[[Tensor], Tensor], images: Tensor, calls: int) -> float:
    return calls * len(images) / _seconds(action, images, calls)


def _seconds(action: Callable[[Tensor], Tensor], images: Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        action(images)
    return time.perf_counter() - start
