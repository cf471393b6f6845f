"""``ImageDescriptor``: CryoLike's description of image grid, polar grid and precision, and its npz files, without CryoLike.

The files hold CryoLike's keys and dtypes. ``None`` is written as an array of size 0, which CryoLike reads as None; CryoLike itself
writes it as a pickled object, which is recognised here from its header and never unpickled.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from dataclasses import dataclass, replace
from typing import IO, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import ArgumentError, ExportError, ExportExistsError, MissingStackError
from .files import whole_file
from .on_disk import expanded, is_file, is_folder
from .transforms.polar import EPS
from .transforms.polar_grid import PolarGrid

Precision = Literal["single", "double"]
AtomShape = Literal["gaussian", "hard-sphere"]

#: A descriptor tells pixel sizes to the digits a user typed, a table to those of float32 or of a refined magnification.
PIXEL_SIZE_TOLERANCE = 1e-3

_KEYS = (
    "n_pixels",
    "pixel_size",
    "radius_max",
    "dist_radii",
    "n_inplanes",
    "precision",
    "viewing_distance",
    "atom_radii",
    "atom_selection",
    "use_protein_residue_model",
    "atom_shape",
)
_OPTIONAL = ("viewing_distance", "atom_radii", "atom_selection")


@dataclass(frozen=True)
class ImageDescriptor:
    """Grids and settings that CryoLike keeps in ``params_input.npz`` and beside every image stack.

    Attributes
    ----------
    n_pixels : box, pixels (images are square)
    pixel_size : angstrom
    radius_max, dist_radii : polar grid, units of 1 / (half box): n_pixels / 4 is Nyquist
    n_inplanes : angles on each shell
    precision : "single" (complex64) or "double" (complex128)
    viewing_distance, atom_radii, atom_selection, use_protein_residue_model, atom_shape : CryoLike's settings for templates

    Raises
    ------
    ArgumentError
        if a value is out of range
    """

    n_pixels: int
    pixel_size: float
    radius_max: float
    dist_radii: float
    n_inplanes: int
    precision: Precision = "single"
    viewing_distance: float | None = None
    atom_radii: float | None = None
    atom_selection: str | None = "name CA"
    use_protein_residue_model: bool = True
    atom_shape: AtomShape = "gaussian"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_pixels", _box(self.n_pixels))
        object.__setattr__(self, "pixel_size", float(_one_of_two("pixel_size", self.pixel_size)))
        if self.n_pixels < 1 or not 0 < self.pixel_size < math.inf:
            raise ArgumentError(f"n_pixels={self.n_pixels} and pixel_size={self.pixel_size} (angstrom) must be positive.")
        for name, allowed in (("precision", get_args(Precision)), ("atom_shape", get_args(AtomShape))):
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(map(repr, allowed))}.")
        # The grid checks its three numbers.
        object.__setattr__(self, "n_inplanes", self.polar_grid.n_inplanes)

    @classmethod
    def from_individual_values(
        cls,
        n_pixels: int,
        pixel_size: float,
        precision: Precision = "single",
        resolution_factor: float = 1.0,
        viewing_distance: float | None = None,
        n_inplanes: int | None = None,
        atom_radii: float | None = None,
        atom_selection: str | None = "name CA",
        use_protein_residue_model: bool = True,
        atom_shape: AtomShape = "gaussian",
    ) -> ImageDescriptor:
        """A descriptor with CryoLike's defaults: ``resolution_factor`` 1 reaches Nyquist, 0.5 half of it."""
        n_pixels = _box(n_pixels)
        grid = PolarGrid.of_box(n_pixels, resolution_factor=resolution_factor, n_inplanes=n_inplanes)
        return cls(
            n_pixels=n_pixels,
            pixel_size=pixel_size,
            radius_max=grid.radius_max,
            dist_radii=grid.dist_radii,
            n_inplanes=grid.n_inplanes,
            precision=precision,
            viewing_distance=1 / (4 * math.pi) / resolution_factor if viewing_distance is None else viewing_distance,
            atom_radii=atom_radii,
            atom_selection=atom_selection,
            use_protein_residue_model=use_protein_residue_model,
            atom_shape=atom_shape,
        )

    @classmethod
    def load(cls, filename: str | os.PathLike[str]) -> ImageDescriptor:
        """The descriptor in a params file, or in the npz of an image stack, written here or by CryoLike.

        Raises
        ------
        MissingStackError
            if there is no such file
        ArgumentError
            if it is not an npz file, lacks keys (all are listed) or describes a grid that is not square
        """
        members = read_npz_without_pickles(filename)
        missing = [key for key in _KEYS if key not in members]
        if missing:
            raise ArgumentError(f"{filename} is not an image descriptor: it lacks {', '.join(missing)}.")
        values = {key: _plain_value(members[key]) for key in _KEYS}
        empty = [key for key in _KEYS if values[key] is None and key not in _OPTIONAL]
        if empty:
            raise ArgumentError(f"{filename} holds no value for {', '.join(empty)}, which a descriptor needs.")
        return cls(**values)

    def save(self, filename: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the descriptor to exactly ``filename``, which ends in .npz, in one step: readers never see half a file.

        Raises
        ------
        ArgumentError
            if the name does not end in .npz
        ExportError
            if its folder does not exist or may not be written to, or the disk is full
        ExportExistsError
            if there is such a file and ``overwrite`` is false
        """
        target = expanded(filename)
        if target.suffix != ".npz":
            raise ArgumentError(f"{target} must end in .npz: CryoLike loads descriptors from such names only.")
        if not is_folder(target.parent):
            raise ExportError(f"{target} cannot be written: the folder {target.parent} does not exist; create it first.")
        if os.path.exists(target) and not overwrite:
            raise ExportExistsError(f"{target} exists; pass overwrite=True to replace it.")
        arrays: dict[str, Any] = self.to_npz_dict()
        try:
            with whole_file(target) as partial, partial.open("wb") as stream:
                np.savez_compressed(stream, **arrays)
        except OSError as error:
            raise ExportError(f"{target} cannot be written: {error.strerror or error}.") from error

    def to_npz_dict(self) -> dict[str, NDArray[Any]]:
        """The eleven arrays of the file, in CryoLike's order and dtypes."""
        pairs = {"n_pixels": [self.n_pixels] * 2, "pixel_size": [self.pixel_size] * 2}
        types = {"n_pixels": np.int64, "n_inplanes": np.int64, "use_protein_residue_model": np.bool_}
        types |= dict.fromkeys(("precision", "atom_selection", "atom_shape"), np.str_)
        values = {key: pairs.get(key, getattr(self, key)) for key in _KEYS}
        return {key: np.zeros(0) if value is None else np.array(value, types.get(key, np.float64)) for key, value in values.items()}

    def for_images(self, *, source_box: int, source_pixel_size: float, box: int, pixel_size: float) -> ImageDescriptor:
        """The descriptor for images of ``box`` pixels that were made from images of ``source_box`` pixels by downsampling.

        A descriptor of the output grid is returned as it is. One of the source grid is reduced: the polar grid keeps its physical
        extent, but ends at the new Nyquist frequency, beyond which there would be nothing but aliases.

        Parameters
        ----------
        source_box, box : pixels before and after downsampling
        source_pixel_size, pixel_size : angstrom before and after downsampling; 0.1 % of deviation is tolerated

        Raises
        ------
        ArgumentError
            if the descriptor fits neither grid
        """
        if self._describes(box, pixel_size):
            return self
        if not self._describes(source_box, source_pixel_size):
            raise ArgumentError(
                f"The descriptor does not fit the images:\n"
                f"  descriptor  {self.n_pixels} px of {self.pixel_size:.6g} A\n"
                f"  as read     {source_box} px of {source_pixel_size:.6g} A\n"
                f"  as written  {box} px of {pixel_size:.6g} A\n"
                f"Make one for the images as written: ImageDescriptor.from_individual_values(n_pixels={box}, pixel_size={pixel_size:.6g})."
            )
        reduced = self.pixel_size * source_box / box
        return replace(self, n_pixels=box, pixel_size=reduced, radius_max=min(self.radius_max, box / 4))

    @property
    def polar_grid(self) -> PolarGrid:
        """The polar grid of the Fourier images."""
        return PolarGrid(self.radius_max, self.dist_radii, self.n_inplanes)

    @property
    def box_size_A(self) -> float:
        """Length of a side of the box, angstrom."""
        return self.n_pixels * self.pixel_size

    @property
    def eps(self) -> float:
        """Relative accuracy that CryoLike asks of the polar transform."""
        return EPS[self.complex_dtype]

    @property
    def complex_dtype(self) -> torch.dtype:
        """Dtype of the Fourier images."""
        return torch.complex64 if self.precision == "single" else torch.complex128

    def _describes(self, box: int, pixel_size: float) -> bool:
        return self.n_pixels == box and math.isclose(self.pixel_size, pixel_size, rel_tol=PIXEL_SIZE_TOLERANCE)


def read_npz_without_pickles(path: str | os.PathLike[str]) -> dict[str, NDArray[Any] | None]:
    """The arrays of an npz file by name; None for a scalar object, which is how CryoLike writes None.

    Nothing is unpickled: an object array is told by its header.

    Raises
    ------
    MissingStackError
        if there is no such file
    ArgumentError
        if it is not an npz file, or holds an array of objects
    """
    path = expanded(path)
    if not is_file(path):
        raise MissingStackError(f"{path} does not exist or is not a file.")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _read_member(archive, name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, SyntaxError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise ArgumentError(f"{path}: {error}") from None
        raise ArgumentError(f"{path} is not a readable npz file: {error}") from error


def _read_member(archive: zipfile.ZipFile, name: str) -> NDArray[Any] | None:
    with archive.open(name) as stream:
        shape, dtype = _npy_header(stream)
    if dtype.hasobject:
        if shape == ():
            return None
        raise ArgumentError(f"{name.removesuffix('.npy')} is an array of Python objects, which only unpickling could read.")
    with archive.open(name) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _plain_value(array: NDArray[Any] | None) -> Any:
    """A Python scalar for a 0-d array, the array itself for a pair, None for None and for size 0."""
    if array is None or array.size == 0:
        return None
    return array.item() if array.ndim == 0 else array


def _box(value: Any) -> int:
    number = _one_of_two("n_pixels", value)
    if not math.isfinite(number) or number != int(number):
        raise ArgumentError(f"n_pixels={value} is no number of pixels; it is an integer.")
    return int(number)


def _one_of_two(name: str, value: Any) -> Any:
    """The value of a number or of a pair (rows, columns) of equal numbers."""
    numbers = np.asarray(value).ravel()
    if numbers.size not in (1, 2) or numbers.dtype.kind not in "iuf" or not np.isclose(numbers, numbers[0], rtol=1e-6, atol=0).all():
        raise ArgumentError(f"{name}={value} is not one number; only square images with square pixels can be used.")
    return numbers[0].item()
