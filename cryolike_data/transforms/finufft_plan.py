"""Plans of finufft (CPU) and cufinufft (CUDA), and how these packages are found."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingDependencyError

#: What the library of cufinufft is linked with, each after those it needs itself. A torch for CUDA 13 brings none of them along,
#: and the loader of the system does not look where pip puts them.
_CUDA_12 = ("nvjitlink/lib/libnvJitLink.so.12", "cuda_runtime/lib/libcudart.so.12", "cufft/lib/libcufft.so.11")


def make_plan(
    points: Sequence[np.ndarray], box: int, eps: float, n_trans: int, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor], object]:
    """A function that writes the Fourier sums of (n_trans, box, box) complex images at (down, across) points into (n_trans, points).

    On CUDA all calls must be made on the torch stream that is current now.

    Raises
    ------
    MissingDependencyError
        if finufft (on CUDA: cufinufft) is not installed or cannot be loaded
    """
    name, real = str(dtype).removeprefix("torch."), dtype.to_real()
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        plan = require_cufinufft().Plan(2, (box, box), n_trans, eps, -1, name, gpu_device_id=index, gpu_stream=stream_of(device))
        plan.setpts(*(torch.from_numpy(values).to(device, real) for values in points))
        return lambda images, spectra: plan.execute(images, out=spectra)
    # As many threads as torch may use, so that the worker processes of a DataLoader keep to one each, and as many transforms at a time:
    # of more, finufft opens a thread for each, whatever it was given.
    threads = torch.get_num_threads()
    plan = require_finufft().Plan(2, (box, box), n_trans, eps, -1, name, nthreads=threads, maxbatchsize=threads)
    plan.setpts(*(values.astype(np.float32 if real == torch.float32 else np.float64) for values in points))
    return lambda images, spectra: plan.execute(images.numpy(), out=spectra.numpy())


def stream_of(device: torch.device) -> int:
    """What tells the current CUDA stream from others; 0 for other devices."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def require_finufft(*, or_else: str = "") -> Any:
    """The package finufft, or a ``MissingDependencyError`` that says how to get it, or what else to do."""
    try:
        import finufft
    except ImportError as error:
        raise MissingDependencyError(f'The polar transform needs finufft: pip install "cryolike-data[fourier]"{or_else}.') from error
    return finufft


def require_cufinufft() -> Any:
    """The package cufinufft, or a ``MissingDependencyError`` that says what is amiss."""
    there = importlib.util.find_spec("cufinufft") is not None
    try:
        return _import_cufinufft()
    except (ImportError, OSError) as error:
        wrong = f"cufinufft, which cannot be loaded: {error}. Its CUDA 12 libraries come with" if there else "cufinufft:"
        raise MissingDependencyError(
            f'The polar transform on CUDA needs {wrong} pip install "cryolike-data[cuda]". Without it, transform on the CPU.'
        ) from error


def _import_cufinufft() -> Any:
    try:
        return importlib.import_module("cufinufft")
    except ImportError:
        for library in _installed_by_pip(_CUDA_12):
            ctypes.CDLL(str(library))
    return importlib.import_module("cufinufft")


def _installed_by_pip(libraries: Sequence[str]) -> list[Path]:
    """Those of NVIDIA's libraries that lie in its Python packages."""
    packages = importlib.util.find_spec("nvidia")
    folders = [] if packages is None else packages.submodule_search_locations or []
    return [path for library in libraries for folder in folders if (path := Path(folder) / library).is_file()]
