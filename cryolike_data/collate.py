"""``Collate``: a batch onto the device in the dtype of the file, then through the transforms there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .arguments import device_of
from .batch import Particle, ParticleBatch, merge_particles
from .errors import ArgumentError
from .transforms import Downsample, Normalize
from .transforms.downsample import moved_centre_A, resized
from .transforms.normalize import NormalizeMethod


@dataclass(frozen=True)
class Collate:
    """A ``collate_fn`` for ``DataLoader`` that gives a ``ParticleBatch`` ready to use.

    Parameters
    ----------
    downsample : how to make the images smaller; their pixel size follows, and their shifts where it moves the centre (pooling does)
    normalize : "max" (CryoLike's: subtract the mean, divide by the largest magnitude), "std" (mean 0, standard deviation 1),
        "background" (mean 0 and standard deviation 1 outside a circle), or a ``Normalize``
    device : where the batch goes; where it is by default. Pixels travel in the dtype of the file.
    dtype : floating dtype of the images that come out

    In a worker process nothing touches CUDA: the batch comes back unfinished, and ``batch.finish()`` (or
    ``collate.finish(batch)``) does the rest in the main process. Calling it on a finished batch does nothing.
    """

    downsample: Downsample | None = None
    normalize: NormalizeMethod | Normalize | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ArgumentError(f"dtype of a batch is a floating one, such as torch.float32 or torch.float16, not {self.dtype!r}")
        if self.downsample is not None and not isinstance(self.downsample, Downsample):
            raise ArgumentError(f"downsample is a Downsample, such as Downsample(box=128), not {self.downsample!r}")
        if isinstance(self.normalize, str):
            Normalize(self.normalize)
        elif self.normalize is not None and not isinstance(self.normalize, Normalize):
            raise ArgumentError(f'normalize is "max", "std", "background" or a Normalize, not {self.normalize!r}')
        if self.device is not None:
            device_of(self.device)

    def __call__(self, items: Sequence[Particle] | ParticleBatch) -> ParticleBatch:
        """Read the particles in one call and process them, or leave that for ``finish`` where this is a worker and CUDA is meant."""
        batch = merge_particles(items)
        if get_worker_info() is not None and self.device is not None and torch.device(self.device).type != "cpu":
            return replace(batch, pending=self._process)
        return self._process(batch)

    def finish(self, batch: ParticleBatch) -> ParticleBatch:
        """Do in the main process what a worker left to do."""
        return batch.finish()

    def process_images(self, images: Tensor) -> Tensor:
        """(B, H, W) images of any dtype through conversion, downsampling and normalisation, on the device where they are."""
        double = torch.float64 in (images.dtype, self.dtype)
        work = images.to(torch.float64 if double else torch.float32)
        if self.downsample is not None:
            work = self.downsample(work)
        if self.normalize is not None:
            work = (Normalize(self.normalize) if isinstance(self.normalize, str) else self.normalize)(work)
        return work.to(self.dtype)

    def output_pixel_size(self, batch: ParticleBatch) -> float:
        """Pixel size after downsampling, angstrom."""
        return resized(self.downsample, batch.box, batch.pixel_size)[1]

    def _process(self, batch: ParticleBatch) -> ParticleBatch:
        pixel_size = self.output_pixel_size(batch)
        if self.device is not None:
            # Towards a CPU, which reads the images at once, the copy has to be over.
            batch = batch.to(self.device, non_blocking=torch.device(self.device).type != "cpu")
        columns = batch.columns.recentred(moved_centre_A(self.downsample, batch.box, batch.pixel_size))
        return ParticleBatch(self.process_images(batch.images), pixel_size, columns)
