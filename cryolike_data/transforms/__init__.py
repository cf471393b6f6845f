"""Pure functions of image tensors: downsampling, normalisation and the polar Fourier transform. They know no files and no particles."""

from .downsample import Downsample, crop_fourier, pool
from .normalize import Normalize
from .polar import PolarTransform, normalize_polar, to_polar, to_polar_exact
from .polar_grid import PolarGrid

__all__ = [
    "Downsample",
    "Normalize",
    "PolarGrid",
    "PolarTransform",
    "crop_fourier",
    "normalize_polar",
    "pool",
    "to_polar",
    "to_polar_exact",
]
