"""What CryoSPARC's columns mean: from a table to optics, poses and shifts in this package's names and units."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..ctf import Ctf
from ..errors import TableError
from ..memory import own_array
from ..repeated import once, one_value_once
from .table import Table

log = logging.getLogger(__name__)

#: Optics by their names in ``Ctf``, as CryoSPARC names them and in its order.
CTF_FIELDS = {
    "exposure_group": "ctf/exp_group_id",
    "voltage_kv": "ctf/accel_kv",
    "spherical_aberration_mm": "ctf/cs_mm",
    "amplitude_contrast": "ctf/amp_contrast",
    "defocus_u": "ctf/df1_A",
    "defocus_v": "ctf/df2_A",
    "astigmatism_angle_rad": "ctf/df_angle_rad",
    "phase_shift_rad": "ctf/phase_shift_rad",
    "scale": "ctf/scale",
    "beam_shift_A": "ctf/shift_A",
    "tilt_A": "ctf/tilt_A",
    "trefoil_A": "ctf/trefoil_A",
    "tetrafoil_A": "ctf/tetra_A",
    "anisomag": "ctf/anisomag",
    "bfactor_A2": "ctf/bfactor",
}
_USED_CTF = frozenset(CTF_FIELDS.values())
_ALIGNMENTS = ("alignments3D", "alignments2D")
_NUMBER, _PAIR, _FOUR = ((),), ((2,),), ((4,),)
#: Below this a float64 holds every whole number.
_MOST_WHOLE = 2.0**53
#: Kinds (see ``numpy.dtype.kind``) and shapes that a row of a column may have, of those that are made use of.
_KNOWN = (
    {"uid": ("iu", _NUMBER), "blob/path": ("SU", _NUMBER), "blob/shape": ("iuf", _PAIR)}
    | dict.fromkeys(("blob/idx", "blob/psize_A", "blob/sign", *CTF_FIELDS.values()), ("iuf", _NUMBER))
    | {f"ctf/{field}": ("iuf", _PAIR) for field in ("shift_A", "tilt_A", "trefoil_A")}
    | {f"ctf/{field}": ("iuf", _FOUR) for field in ("tetra_A", "anisomag")}
    | {f"{slot}/{field}": ("iuf", _NUMBER) for slot in _ALIGNMENTS for field in ("psize_A", "split")}
    | {f"{slot}/shift": ("iuf", _PAIR) for slot in _ALIGNMENTS}
    | {f"{slot}/pose": ("iuf", ((), (3,))) for slot in _ALIGNMENTS}
)
_OTHER_SLOTS = {"map": "a volume", "mask": "a mask", "precision": "a volume", "micrograph_blob": "micrographs", "movie_blob": "movies"}


def says_where(name: str) -> bool:
    """Whether a column says where images lie and of which size they are."""
    return name in ("blob/idx", "blob/shape", "blob/psize_A", "blob/sign")


def is_detail(name: str) -> bool:
    """Whether a column is one of those that ``Details`` makes something of."""
    slot, _, field = name.partition("/")
    return name == "uid" or name in _USED_CTF or (slot in _ALIGNMENTS and field in ("pose", "shift", "psize_A", "split"))


def image_numbers(table: Table, *, base: int = 0) -> np.ndarray:
    """``blob/idx``, which counts from ``base``, as int64 from 0; a ``TableError`` for numbers with a fraction."""
    numbers = table["blob/idx"]
    if numbers.dtype.kind == "f" and (broken := ~(np.abs(numbers) < _MOST_WHOLE) | (numbers != np.trunc(numbers))).any():
        first = int(np.argmax(broken))
        raise TableError(
            f"blob/idx of {table.origin('blob/idx')} holds {numbers[first]} in row {first} ({broken.sum()} rows have no whole number). "
            "Export or save the table again."
        )
    found = own_array(numbers.shape, np.int64)
    np.subtract(numbers, base, out=found, dtype=np.int64, casting="unsafe")
    return found


def detail_names(table: Table) -> list[str]:
    """The attributes of ``Particles`` that ``Details`` may find in a table."""
    slot = _alignment(table)
    found = {
        "ctf": not _USED_CTF.isdisjoint(table.fields),
        "pose": f"{slot}/pose" in table,
        "shift_A": f"{slot}/shift" in table,
        "half_set": _half_sets(table) is not None,
    }
    return ["row", "uid", *(name for name, present in found.items() if present)]


def warn_of_poses_left_aside(table: Table) -> None:
    """Log that poses of several classes are not read, where there are no others in 3-D."""
    slot = _alignment(table)
    left_aside = [name for name in table.slots if name.startswith("alignments") and name not in _ALIGNMENTS and f"{name}/pose" in table]
    if left_aside and f"{_ALIGNMENTS[0]}/pose" not in table:
        log.warning(
            "The poses in %s of %s are those of several classes and are not read; %s. The particles of one class, as CryoSPARC puts them "
            "out, have one pose each.",
            ", ".join(left_aside[:3]) + (", ..." if len(left_aside) > 3 else ""),
            table.path,
            f"{slot}/pose is" if f"{slot}/pose" in table else "the particles have none",
        )


@dataclass(frozen=True)
class Details:
    """Reads rows, uids, optics, poses and half sets of a table, by their names in ``Particles``."""

    table: Table

    def __call__(self, rows: np.ndarray | None = None) -> dict[str, Any]:
        """These columns of all rows, or of those given."""
        loaded = self.table.load(is_detail, rows=rows)
        # Taken out one by one, so that those that become something else are not kept beside it.
        found = {"uid": _read_uid(loaded), "ctf": _read_ctf(loaded), **_read_pose(loaded, shifts=self._shifts_have_a_unit)}
        return found | {"row": np.arange(len(loaded), dtype=np.int64) if loaded.kept is None else loaded.kept.astype(np.int64, copy=False)}

    @cached_property
    def _shifts_have_a_unit(self) -> bool:
        """Whether all rows have one: then all have shifts, and else none."""
        slot, table = _alignment(self.table), self.table
        if f"{slot}/shift" not in table:
            return False
        unit = table.get(f"{slot}/psize_A")
        if unit is not None and (unit > 0).all():
            return True
        log.warning("%s has %s/shift without a positive %s/psize_A, their unit; the shifts are left out.", table.path, slot, slot)
        return False


def _alignment(table: Table) -> str | None:
    """The slot with poses; without any, the first that has shifts."""
    return next((slot for field in ("pose", "shift") for slot in _ALIGNMENTS if f"{slot}/{field}" in table), None)


def _half_sets(table: Table) -> str | None:
    """The column of the half sets, which need not lie beside the poses."""
    return next((name for slot in _ALIGNMENTS if (name := f"{slot}/split") in table), None)


def _read_ctf(table: Table) -> Ctf[np.ndarray] | None:
    """Optics per particle, or None where the table has no ctf columns."""
    columns: dict[str, Any] = {name: one_value_once(table.pop(field)) for name, field in CTF_FIELDS.items() if field in table}
    # torch has no arithmetic on uint32; exposure group ids are small.
    if "exposure_group" in columns:
        columns["exposure_group"] = one_value_once(columns["exposure_group"].astype(np.int64))
    return Ctf(**columns) if columns else None


def _read_pose(table: Table, *, shifts: bool) -> dict[str, np.ndarray]:
    """Whichever of ``pose``, ``shift_A`` and ``half_set`` the table holds, the first two in alignments3D, else in alignments2D.

    A shift is in pixels of the alignment's own pixel size (``alignments3D/psize_A``), which may differ from the image's.
    """
    slot = _alignment(table)
    found: dict[str, np.ndarray] = {}
    if f"{slot}/pose" in table:
        pose = table.pop(f"{slot}/pose").astype(np.float32, copy=False)
        found["pose"] = pose if pose.ndim == 2 else np.stack([np.zeros_like(pose), np.zeros_like(pose), pose], axis=1)
    shift, unit = (table.pop(name) if name in table else None for name in (f"{slot}/shift", f"{slot}/psize_A"))
    if shift is not None and unit is not None and shifts:
        found["shift_A"] = shift.astype(np.float32, copy=False) * unit.astype(np.float32)[:, None]
    if (half_sets := _half_sets(table)) is not None:
        found["half_set"] = table.pop(half_sets).astype(np.int64)
    return found


def read_sign(table: Table) -> np.ndarray | None:
    """``blob/sign``, with a warning if it differs within the table."""
    sign = table.get("blob/sign")
    if sign is not None and len(sign) and once(sign).min() != once(sign).max():
        log.warning("%s mixes particles of both contrast signs (blob/sign); the pixels are given as stored.", table.path)
    return None if sign is None else one_value_once(sign)


def _read_uid(table: Table) -> np.ndarray:
    """The uid column as uint64, zeros where there is none."""
    return table.pop("uid").astype(np.uint64, copy=False) if "uid" in table else np.zeros(len(table), np.uint64)


def require_known_columns(table: Table) -> None:
    """Raise a ``TableError`` that lists the columns of known names that do not hold what CryoSPARC keeps in them."""
    problems = []
    for name, (kinds, shapes) in _KNOWN.items():
        dtype = table.fields.get(name)
        if dtype is not None and not (dtype.base.kind in kinds and dtype.shape in shapes and (kinds == "SU" or dtype.base.itemsize <= 8)):
            wanted = "text" if kinds == "SU" else "an integer" if kinds == "iu" else "a number"
            if shapes[-1]:
                wanted = f"{' or '.join(str(shape[0] if shape else 1) for shape in shapes)} numbers"
            problems.append(f"  {name} of {table.origin(name)} holds {dtype} for each particle, and should hold {wanted}")
    if problems:
        raise TableError("\n".join([f"{table.path} is not laid out as CryoSPARC does it:", *problems, "Export or save the table again."]))


def require_images(table: Table) -> None:
    """Raise a ``TableError`` that says what the table describes instead, if it does not say where images lie."""
    missing = [name for name in ("blob/path", "blob/idx") if name not in table]
    if not missing:
        return
    other = next((meaning for slot, meaning in _OTHER_SLOTS.items() if any(name.startswith(slot) for name in table.slots)), None)
    if other is not None and not any(slot.startswith("alignments") for slot in table.slots):
        raise TableError(f"{table.path} describes {other}, not particles (it has {table.describe_slots()}).")
    near = sorted(path.name for path in table.path.absolute().parent.glob("*.cs") if path.name != table.path.name)
    picked = " Particles that were picked and not extracted have none yet." if "location" in table.slots else ""
    raise TableError(
        f"{table.path} has no {' and '.join(missing)}, so it does not say where its images lie (it has {table.describe_slots()}). "
        "Pass the file that does as passthrough=, or the .csg of the job instead of the .cs"
        + (f"; beside it lie {', '.join(near[:6])}." if near else ".")
        + picked
    )
