"""Synthetic CryoSPARC projects to measure on, made once in a folder and found there again by the next run."""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Pixels = Literal["float32", "float16", "int8"]
_MODES = {"float32": 2, "float16": 12, "int8": 0}
_HEADER_BYTES = 1024
#: Noise is drawn once and written again and again: the figures do not depend on what the pixels are.
_NOISE_BYTES = 32 << 20
_PATH = "J7/extract/{:021d}_FoilHole_29355245_Data_29355900_fractions_particles.mrc"

#: The fields of a table from CryoSPARC's refinement, 246 bytes a row.
_FIELDS = np.dtype(
    [("uid", "<u8"), ("blob/path", "S89"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,)), ("blob/psize_A", "<f4"), ("blob/sign", "<f4")]
    + [("ctf/type", "S9"), ("ctf/exp_group_id", "<u4")]
    + [(f"ctf/{name}", "<f4") for name in ("accel_kv", "cs_mm", "amp_contrast", "df1_A", "df2_A", "df_angle_rad", "phase_shift_rad")]
    + [("ctf/scale", "<f4"), ("ctf/scale_const", "<f4")]
    + [("alignments3D/split", "<u4"), ("alignments3D/shift", "<f4", (2,)), ("alignments3D/pose", "<f4", (3,))]
    + [(f"alignments3D/{name}", "<f4") for name in ("psize_A", "error", "error_min", "resid_pow", "slice_pow", "image_pow", "cross_cor")]
    + [(f"alignments3D/{name}", "<f4") for name in ("alpha", "weight", "pose_ess", "shift_ess", "class_posterior")]
    + [("alignments3D/class", "<u4"), ("alignments3D/class_ess", "<f4")]
)


@dataclass(frozen=True)
class Project:
    """A table over stacks of equal size.

    Attributes
    ----------
    images, stacks : how many; a stack holds ``images / stacks`` of them
    box, pixels : size and dtype of an image
    sparse : leave the pixels out of the files, which keep their length but take no room
    shuffled : rows of the table in random order, else in that of the stacks
    private : a word that keeps this copy apart from another of the same kind
    """

    images: int
    stacks: int
    box: int = 128
    pixels: Pixels = "float32"
    sparse: bool = False
    shuffled: bool = False
    private: str = ""

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.box * self.box * np.dtype(self.pixels).itemsize

    @property
    def label(self) -> str:
        """What tells it from the others in a line of figures."""
        return f"{self.box}px {self.pixels} {self.stacks} stacks"

    def folder(self, data: Path) -> Path:
        """Where it lies below the folder of all data."""
        words = [f"{self.images}x{self.box}px", self.pixels, f"{self.stacks}stacks"]
        words += [word for word, is_so in (("sparse", self.sparse), ("shuffled", self.shuffled)) if is_so]
        return data / "_".join(words + ([self.private] if self.private else []))

    def table(self, data: Path) -> Path:
        """The path of its table."""
        return self.folder(data) / "J7" / "particles.cs"

    def paths(self, data: Path) -> list[Path]:
        """The paths of its stacks."""
        return [self.folder(data) / _PATH.format(number) for number in range(self.stacks)]

    def make(self, data: Path) -> Path:
        """Write it unless it is there; the path of its table, which is written last."""
        table = self.table(data)
        if not table.exists():
            shutil.rmtree(self.folder(data), ignore_errors=True)
            table.parent.joinpath("extract").mkdir(parents=True)
            self._write_stacks(data)
            partial = table.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, self._rows())
            partial.rename(table)
        return table

    def _write_stacks(self, data: Path) -> None:
        per_stack = self.images // self.stacks
        header = _mrc_header(self.box, per_stack, self.pixels)
        length = per_stack * self.image_bytes
        noise = memoryview(_noise(self.pixels))
        for number, path in enumerate(self.paths(data)):
            with path.open("wb") as file:
                file.write(header)
                if self.sparse:
                    file.truncate(_HEADER_BYTES + length)
                    continue
                # Each stack starts elsewhere in the noise, so that images differ.
                place, left = number * 7919 * self.image_bytes % len(noise), length
                while left:
                    left -= file.write(noise[place : place + left])
                    place = 0
                file.flush()
                os.fsync(file.fileno())  # or the writing would go on beside what is measured; nor can such pages be evicted

    def _rows(self) -> np.ndarray:
        n, rng = self.images, np.random.default_rng(self.images)
        rows = np.zeros(n, _FIELDS)
        per_stack = n // self.stacks
        names = np.array([_PATH.format(number).encode() for number in range(self.stacks)])
        rows["blob/path"] = names[np.arange(n) // per_stack]
        rows["blob/idx"] = np.arange(n) % per_stack
        if self.shuffled:
            rows = rows[rng.permutation(n)]
        rows["uid"] = rng.integers(1, 2**63, n, dtype=np.uint64)
        rows["blob/shape"], rows["blob/psize_A"], rows["blob/sign"], rows["ctf/type"] = self.box, 1.5, 1, b"imported"
        rows["ctf/exp_group_id"] = rng.integers(0, 9, n)
        for name, value in (("accel_kv", 300), ("cs_mm", 2.7), ("amp_contrast", 0.1), ("scale", 1)):
            rows[f"ctf/{name}"] = value
        rows["ctf/df1_A"] = rng.uniform(10_000, 20_000, n)
        rows["ctf/df2_A"] = rows["ctf/df1_A"] - 500
        rows["ctf/df_angle_rad"] = rng.uniform(-1.5, 1.5, n)
        rows["alignments3D/pose"] = rng.normal(size=(n, 3))
        rows["alignments3D/shift"] = rng.normal(size=(n, 2))
        rows["alignments3D/split"] = np.arange(n) % 2
        rows["alignments3D/psize_A"] = 1.5
        return rows


def _mrc_header(box: int, count: int, pixels: Pixels) -> bytes:
    header = bytearray(_HEADER_BYTES)
    struct.pack_into("<4i", header, 0, box, box, count, _MODES[pixels])
    struct.pack_into("<3i", header, 28, box, box, count)
    struct.pack_into("<3f", header, 40, box * 1.5, box * 1.5, count * 1.5)
    header[208:212], header[212:216] = b"MAP ", b"\x44\x44\0\0"
    return bytes(header)


def _noise(pixels: Pixels) -> bytes:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(_NOISE_BYTES // np.dtype(pixels).itemsize, dtype=np.float32)
    drawn = (normal * 25).clip(-127, 127).astype(np.int8) if pixels == "int8" else normal.astype(pixels)
    return drawn.tobytes()
