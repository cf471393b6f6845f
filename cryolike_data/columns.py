"""The columns of a batch: worked out when the first of them is asked for, and moved between devices together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from .ctf import Ctf


@cache
def torch_dtype(dtype: DTypeLike) -> torch.dtype:
    """The torch dtype of a NumPy dtype."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


#: Dtypes that NumPy has too.
_OF_NUMPY = set(map(torch_dtype, ("?", *"bBhHiI", "i8", "u8", *"efdFD")))

Maker = Callable[[], dict[str, Tensor]]


class Columns:
    """Tensors with one row per particle, by name; optics are named ``ctf/...``.

    Parameters
    ----------
    tensors : the columns, or a function that makes them, called once and only if a column is used
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: dict[str, Tensor] | Maker) -> None:
        self._tensors = tensors

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all columns."""
        return tuple(self.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All columns by name."""
        tensors = self._tensors  # another thread may be at it too
        if callable(tensors):
            self._tensors = tensors = tensors()
        return tensors

    @property
    def ctf(self) -> Ctf[Tensor] | None:
        """The optics, or None where there are none."""
        optics = {name.removeprefix("ctf/"): column for name, column in self.tensors.items() if name.startswith("ctf/")}
        return Ctf(**optics) if optics else None

    def map(self, function: Callable[[Tensor], Tensor]) -> Columns:
        """Columns with ``function`` applied to each."""
        return Columns({name: function(column) for name, column in self.tensors.items()})

    def recentred(self, offset_A: float) -> Columns:
        """The columns for images whose centre is moved by so much along x and along y: the shifts grow by it."""
        if offset_A == 0:
            return self
        return Columns(lambda: {name: column + offset_A if name == "shift_A" else column for name, column in self.tensors.items()})

    def to(self, device: torch.device | str | None, *, non_blocking: bool = False) -> Columns:
        """The columns on another device, in one transfer for each dtype: many small ones would take longer than the images."""
        groups: dict[torch.dtype, list[str]] = {}
        for name, column in self.tensors.items():
            groups.setdefault(column.dtype, []).append(name)
        moved: dict[str, Tensor] = {}
        for names in groups.values():
            flat = [self.tensors[name][:, None].flatten(1) for name in names]
            together = torch.cat(flat, dim=1).to(device, non_blocking=non_blocking)
            # Not as views, which would be part of what is computed in place from each other.
            there = torch.unsafe_split_with_sizes(together, [part.shape[1] for part in flat], dim=1)
            moved |= {name: part.reshape(self.tensors[name].shape) for name, part in zip(names, there, strict=True)}
        return Columns({name: moved[name] for name in self.names})

    def __reduce__(self) -> tuple[Callable[..., Columns], tuple[dict[str, Any]]]:
        # Between processes torch gives each tensor a file of shared memory, of which a process may have open as many as of other files.
        return _of_arrays, ({name: tensor.numpy() if _is_array(tensor) else tensor for name, tensor in self.tensors.items()},)


def _is_array(tensor: Tensor) -> bool:
    """Whether NumPy can show a tensor as it is."""
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.dtype in _OF_NUMPY
    return plain and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())


def _of_arrays(arrays: dict[str, Any]) -> Columns:
    return Columns({name: column if isinstance(column, Tensor) else torch.from_numpy(column) for name, column in arrays.items()})


def concatenate(parts: Sequence[Columns]) -> Columns:
    """The rows of several sets of columns with the same names, one after the other."""
    return Columns({name: concatenate_tensors([part.tensors[name] for part in parts]) for name in parts[0].names})


def rows_of(tensor: Tensor, key: Any) -> Tensor:
    """``tensor[key]``, also of unsigned pixels of 16 bits, which torch cannot index everywhere."""
    if tensor.dtype == torch.uint16:
        return tensor.view(torch.int16)[key].view(torch.uint16)
    return tensor[key]


def concatenate_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenated in the dtype that holds them all; torch itself does not know that of int16 and uint16."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        common = torch_dtype(np.result_type(*[tensor[:0].cpu().numpy().dtype for tensor in tensors]))
        tensors = [tensor.to(common) for tensor in tensors]
    return torch.cat(list(tensors))
