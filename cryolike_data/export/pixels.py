"""What becomes of the images on their way out: box, pixel size and dtype, and the images themselves piece by piece."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..collate import Collate
from ..dataset import ParticleDataset
from ..errors import ArgumentError, ExportError, TableError
from ..memory import kept_tensor
from ..particles import Particles
from ..repeated import once
from ..transforms import Downsample
from ..transforms.downsample import computing_dtype, moved_centre_A, resized

log = logging.getLogger(__name__)

#: Pixels as they are stored, or multiplied by ``blob/sign``, so that particles are bright.
Contrast = Literal["stored", "positive"]

#: The note of images with a pixel that is not finite, see ``UnitRecord``.
NOT_FINITE = "not_finite"

#: Bytes that are worked on at a time: so many that threads seldom wait for the interpreter lock, and little memory.
_PIECE_BYTES = 8 << 20
#: Bytes whose pages are asked for ahead of what is read.
_AHEAD_BYTES = 16 << 20
#: Such stretches from one look to the next where the pages were in memory.
_PATIENCE = 4
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Pixels:
    """Images as they are written.

    Attributes
    ----------
    box : pixels
    pixel_size : angstrom
    dtype : NumPy's name of it
    downsample : how they become smaller
    added_shift_A : what is added to a shift along x and along y, because the centre of the images moves, angstrom
    as_stored : nothing is done to them
    turned : those of dark particles are multiplied by -1
    """

    box: int
    pixel_size: float
    dtype: str
    downsample: Downsample | None
    added_shift_A: float
    as_stored: bool
    turned: bool

    @classmethod
    def of(
        cls, dataset: ParticleDataset, *, downsample: Downsample | None, dtype: str | torch.dtype | None, contrast: Contrast = "stored"
    ) -> Pixels:
        """The images of a data set, made smaller and converted.

        Parameters
        ----------
        dataset : the particles
        downsample : how to make the images smaller
        dtype : "float16", "float32" or "float64"; by default that of the files, or float32 after downsampling and for integers that
            are turned
        contrast : "positive" multiplies the images of dark particles by -1

        Raises
        ------
        ArgumentError
            if the images cannot be made so, or this is no data set of particles
        TableError
            if it is not known which particles are dark
        """
        if not isinstance(dataset, ParticleDataset):
            raise ArgumentError(
                f"What is exported is a data set, such as IndexedDataset(...), not a {type(dataset).__name__}; "
                "dataset.select(subset.indices) is a data set of the particles of a Subset."
            )
        stored = dataset.source.dtype.name
        turned = _are_to_turn(dataset, contrast)
        kept = downsample is None and not (turned and not stored.startswith("float"))
        name = (stored if kept else "float32") if dtype is None else str(dtype).removeprefix("torch.")
        if dtype is not None and name not in _DTYPES:
            raise ArgumentError(f"dtype is one of {', '.join(_DTYPES)}, or None for that of the files, not {dtype!r}")
        if downsample is not None and not isinstance(downsample, Downsample):
            raise ArgumentError(f"downsample is a Downsample, such as Downsample(box=128), not {downsample!r}")
        box, pixel_size = resized(downsample, dataset.box, dataset.pixel_size)
        as_stored = downsample is None and name == stored and not turned
        added_shift_A = moved_centre_A(downsample, dataset.box, dataset.pixel_size)
        return cls(box, pixel_size, name, downsample, added_shift_A, as_stored, turned)

    def as_written(self, particles: Particles) -> Particles:
        """Particles with the contrast that they have in the images that are written, and the shifts that centre them there."""
        if self.turned and particles.sign is not None:
            particles = replace(particles, sign=np.ones_like(particles.sign))
        if self.added_shift_A == 0 or (shift := particles.shift_A) is None:
            return particles
        return replace(particles, shift_A=(shift.astype(np.float64) + self.added_shift_A).astype(shift.dtype))

    def recentring(self) -> dict[str, float]:
        """``added_shift_A`` as a setting, if it changes anything."""
        return {"added_shift_A": self.added_shift_A} if self.added_shift_A else {}

    @property
    def image_bytes(self) -> int:
        """Bytes of an image as it is written."""
        return self.box * self.box * np.dtype(self.dtype).itemsize

    def settings(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "box": self.box,
            "pixel_size_A": self.pixel_size,
            "dtype": self.dtype,
            "downsample": None if self.downsample is None else asdict(self.downsample),
        } | ({"contrast": "positive"} if self.turned else {})

    def pieces(self, dataset: ParticleDataset, rows: range, notes: Counter[str], *, images: int | None = None) -> Iterator[Tensor]:
        """The images of some rows piece by piece. A piece may be overwritten when the next one is asked for.

        Parameters
        ----------
        dataset : the particles
        rows : which, one after the other
        notes : where images are counted that have a pixel that is not finite, as ``NOT_FINITE``
        images : in a piece; by default as many as stay in the cache of a CPU

        Raises
        ------
        ExportError
            if a pixel is too large for what is written
        """
        computed = torch.float64 if self.dtype == "float64" else torch.float32
        collate = None if self.as_stored else Collate(downsample=self.downsample, dtype=computed)
        step = images or max(1, _PIECE_BYTES // dataset.image_bytes)
        ahead = max(step, _AHEAD_BYTES // dataset.image_bytes)
        asked = rows.start
        for start in range(rows.start, rows.stop, step):
            if start >= asked:
                # A whole stretch at a time, the next one while this one is read; less often where nothing has to be brought.
                cold = dataset.ask_ahead(np.arange(asked, min(rows.stop, asked + 2 * ahead)))
                asked += ahead if cold else _PATIENCE * ahead
            chosen = np.arange(start, min(rows.stop, start + step))
            read = dataset.view_rows(chosen)  # rows in order lie side by side, and need not be copied
            if read is None:
                read = dataset.read_rows(chosen, kept_tensor("read", (len(chosen), dataset.box, dataset.box), dataset.dtype))
            done = read if collate is None else collate.process_images(read)
            if self.turned and (sign := dataset.particles.sign) is not None:
                factors = torch.from_numpy(sign[chosen]).to(done.dtype)[:, None, None]
                done = torch.mul(done, factors, out=kept_tensor("turned", done.shape, done.dtype))
            written = done.to(torch.float16) if self.dtype == "float16" else done
            if not_finite := _count_not_finite(written):
                _require_as_finite(read, done)
                _require_as_finite(done, written)
                notes[NOT_FINITE] += not_finite
            yield written


def _count_not_finite(images: Tensor) -> int:
    """How many of (B, D, D) images have a pixel that is NaN or infinite."""
    # A sum takes a small part of the time of a look at each pixel, and is not finite if one of them is not.
    if not images.is_floating_point() or images.sum(dtype=computing_dtype(images.dtype)).isfinite():
        return 0
    return int(images.flatten(1).isfinite().all(dim=1).logical_not().sum())


def _require_as_finite(before: Tensor, after: Tensor) -> None:
    """Raise an ``ExportError`` if (B, D, D) images were finite before, pixel by pixel or, where these are others after, as a whole."""
    finite, still = before.isfinite(), after.isfinite()
    if before.shape != after.shape:
        finite, still = finite.flatten(1).all(dim=1), still.flatten(1).all(dim=1)
    if (finite & ~still).any():
        largest, wider = torch.finfo(after.dtype).max, "float32" if after.dtype == torch.float16 else "a float64 store"
        name = str(after.dtype).removeprefix("torch.")
        raise ExportError(f"Some pixels are larger than {name} can hold ({largest:g}); normalize them, or export {wider}.")


def rounded(pixels: np.ndarray, keep_bits: int, *, finite: bool) -> np.ndarray:
    """Floating pixels, rounded as the bit rounding codec does, which readers need not know then; ``finite`` says that all are."""
    from numcodecs import BitRound

    found = np.frombuffer(BitRound(keep_bits).encode(pixels), pixels.dtype).reshape(pixels.shape)
    if not finite:
        found[np.isnan(pixels)] = np.nan  # some of whose patterns of bits would be rounded to zero
    if (infinite := np.isinf(found)).any() and not np.isinf(pixels[infinite]).all():
        raise ExportError(
            f"Some pixels are larger than {found.dtype} can hold rounded to {keep_bits} bits; keep more bits, or normalize them."
        )
    return found


def warn_of_dark_particles(dataset: ParticleDataset, pixels: Pixels, reader: str) -> None:
    """Log it if particles are written dark for a program that takes them to be bright."""
    sign = dataset.particles.sign
    if sign is not None and not pixels.turned and (once(sign) < 0).any():
        log.warning(
            'Particles are dark (blob/sign is -1) and are written as they are stored. %s takes particles to be bright: contrast="positive" '
            "(--contrast positive) turns them.",
            reader,
        )


def _are_to_turn(dataset: ParticleDataset, contrast: Contrast) -> bool:
    if contrast not in get_args(Contrast):
        raise ArgumentError(f"contrast is one of {', '.join(map(repr, get_args(Contrast)))}, not {contrast!r}")
    if contrast == "stored":
        return False
    sign = dataset.particles.sign
    if sign is None or not np.isin(once(sign), (-1, 1)).all():
        other = "the table has no such column."
        if sign is not None:
            wrong = np.flatnonzero(~np.isin(sign, (-1, 1)))
            other = f"it is {sign[wrong[0]]:g} in row {wrong[0]}, one of {len(wrong)} such rows. Leave them out with select=."
        raise TableError(f"contrast='positive' needs blob/sign, which is 1 or -1 for each particle; {other}")
    return bool((once(sign) < 0).any())
