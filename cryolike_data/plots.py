"""Pictures: a montage of particles, and CryoLike's three figures of an image stack. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .errors import ArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .descriptor import ImageDescriptor

#: Images shown in one figure of a stack.
_SHOWN = 16


def montage(images: Tensor, *, columns: int = 8, titles: list[str] | None = None) -> Figure:
    """A figure of images side by side, each in grey from the 1st to the 99th percentile of its pixels that are finite.

    Parameters
    ----------
    images : (N, H, W) tensor of any dtype and device
    columns : images per row
    titles : one line above each image
    """
    if not isinstance(images, Tensor) or images.ndim != 3:
        given = f"a tensor of {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise ArgumentError(f"A montage is made of an (N, H, W) tensor, such as batch.images, and not of {given}.")
    if len(images) == 0:
        raise ArgumentError("There is no image to show.")
    if titles is not None and len(titles) != len(images):
        raise ArgumentError(f"{len(titles)} titles do not fit {len(images)} images.")
    figure, axes = _panels(len(images), columns, 1.5)
    for axis, image, title in zip(axes, images.detach().float().cpu().numpy(), titles or [""] * len(images), strict=True):
        finite = image[np.isfinite(image)]
        low, high = np.percentile(finite, (1, 99)) if len(finite) else (0, 1)
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower")
        axis.set_title(title, fontsize=7)
        axis.set_axis_off()
    return figure


def require_picture_name(path: Path) -> None:
    """Raise an ``ArgumentError`` unless matplotlib writes pictures under such a name."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ArgumentError(f"{path} has to end in the name of a kind of picture: {', '.join(f'.{kind}' for kind in sorted(known))}.")


def plot_stack(phys: Tensor, fourier: Tensor, grid: ImageDescriptor, folder: Path, number: int) -> None:
    """Draw one stack as CryoLike does: its first images, their polar Fourier transforms, and the mean power spectrum.

    Parameters
    ----------
    phys : (N, D, D) images
    fourier : (N, n_shells, n_inplanes) complex polar Fourier transforms
    grid : their grids
    folder : where ``particles_phys_stack_NNNNNN.png``, ``particles_fourier_stack_NNNNNN.png`` and
        ``power_spectrum_stack_NNNNNN.png`` go
    number : the number of the stack
    """
    folder.mkdir(parents=True, exist_ok=True)
    n = min(_SHOWN, len(phys))
    figure, axes = _panels(n, 4, 2.5)
    half = grid.box_size_A / 2
    for axis, image in zip(axes, phys[:n].numpy(), strict=True):
        axis.imshow(image, cmap="gray", origin="lower", extent=(-half, half, -half, half))
        axis.tick_params(labelsize=6)
    figure.supxlabel("x (angstrom)")
    figure.supylabel("y (angstrom)")
    figure.savefig(folder / f"particles_phys_stack_{number:06d}.png")

    polar = grid.polar_grid
    figure, axes = _panels(n, 4, 2.5, subplot_kw={"projection": "polar"})
    for axis, transform in zip(axes, fourier[:n].real.numpy(), strict=True):
        limit = np.percentile(np.abs(transform), 99) or 1.0
        # theta is measured from the slow axis (y); matplotlib's from x.
        angles = np.pi / 2 - np.asarray(polar.angles)
        axis.pcolormesh(angles, polar.radii, transform, cmap="RdBu", vmin=-limit, vmax=limit, shading="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(folder / f"particles_fourier_stack_{number:06d}.png")

    figure, (axis,) = _panels(1, 1, 5.0)
    spectrum = fourier.abs().square().mean(dim=(0, 2)).numpy()
    draw = axis.loglog if (spectrum > 0).any() else axis.semilogx
    draw(grid.box_size_A / (2 * np.asarray(polar.radii)), spectrum)
    axis.invert_xaxis()
    axis.set_xlabel("resolution (angstrom)")
    axis.set_ylabel("mean power")
    figure.savefig(folder / f"power_spectrum_stack_{number:06d}.png")


def _panels(n: int, columns: int, inches: float, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure with ``n`` axes, drawn without a display and without pyplot's global state."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    figure = Figure(figsize=(columns * inches, rows * inches), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False, **options)))
    for axis in axes[n:]:
        axis.remove()
    return figure, axes[:n]


def require_matplotlib() -> None:
    """Raise a ``MissingDependencyError`` where matplotlib is not installed."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError('Pictures need matplotlib: pip install "cryolike-data[plot]", or leave plots out.') from error
