"""A device that is not the CPU, made up of the CPU: what would mix the two on a GPU fails on it too, and what it computes is real.

Its copies from the CPU wait in a queue, as late as those of a GPU may come: what reads them too early reads garbage.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.utils.backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: torch lets Python stand in for a device of this kind, if it is not too old for that.
OTHER = torch.device("privateuseone:0")
CAN_STAND_IN = hasattr(registration, "_setup_privateuseone_for_python_backend")
#: What takes tensors of two devices on a GPU, too.
_MAY_MIX = {"aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::index_put_"}
_GARBAGE = 77


class Queue:
    """In place of a CUDA stream: work that is done when somebody waits for it.

    Attributes
    ----------
    uses : addresses of memory that the allocator was told not to lend again before all work of this queue is done
    """

    def __init__(self) -> None:
        self.uses: set[int] = set()
        self.waiting: deque[Callable[[], Any]] = deque()
        self.waited_for: list[Queue] = []
        self._queued = self._done = 0

    def add(self, work: Callable[[], Any]) -> None:
        self.waiting.append(work)
        self._queued += 1

    def record_event(self, event: Any = None) -> Event:
        return Event(self, self._queued)

    def wait_event(self, event: Event) -> None:
        self.waited_for.append(event._queue)
        event.synchronize()

    def wait_stream(self, other: Queue) -> None:
        self.waited_for.append(other)
        other.run()

    def run(self, until: int | None = None) -> None:
        while self.waiting and (until is None or self._done < until):
            self.waiting.popleft()()
            self._done += 1


class Event:
    """In place of a CUDA event."""

    def __init__(self, queue: Queue, place: int) -> None:
        self._queue, self._place = queue, place

    def query(self) -> bool:
        return self._queue._done >= self._place

    def synchronize(self) -> None:
        self._queue.run(self._place)


class There(torch.Tensor):
    """A tensor on that device; ``numbers`` are what it holds."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> There:
        numbers = numbers.resolve_conj().resolve_neg()  # torch asks the tensor itself, which knows of neither
        size, stride, start = numbers.size(), numbers.stride(), numbers.storage_offset()
        with torch.inference_mode(numbers.is_inference()):  # a part of a tensor that was made in that mode is one, too
            made = torch.Tensor._make_wrapper_subclass(cls, size, strides=stride, storage_offset=start, dtype=numbers.dtype, device=OTHER)
        made.numbers = numbers
        return made

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def record_stream(self, queue: Queue) -> None:
        queue.uses.add(self.address)

    @property
    def address(self) -> int:
        return self.numbers.untyped_storage().data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("A tensor of the other device is used where there is no such device.")


class _Device(TorchDispatchMode):
    """What is done to tensors while the device exists.

    Attributes
    ----------
    queue : where copies wait and other work is done after them; None for at once
    pinned : arrays in page-locked memory, from which a queue copies at its own time; of others it takes a copy first, as CUDA does
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: Queue | None = None
        self.pinned: list[np.ndarray] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, There)]
        if there and name not in _MAY_MIX and any(tensor.ndim for tensor in tensors if not isinstance(tensor, There)):
            raise RuntimeError(f"{function} takes tensors of two devices")
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        if name == "aten::_to_copy" and not there and device == OTHER and kwargs.get("non_blocking") and self.queue is not None:
            source = self._source(args[0])
            target = torch.full_like(args[0], _GARBAGE)
            self.queue.add(lambda: target.copy_(source))
            return There(target)
        if there and self.queue is not None and not function.is_view:
            self.queue.run()  # what comes later in a queue sees what came before
            self.queue.add(lambda: None)  # and counts as done when somebody waits for it
        here_args, here_kwargs = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, There) else leaf, (args, kwargs))
        result = function(*here_args, **here_kwargs)
        target_is_here = name == "aten::copy_" and not isinstance(args[0], There)
        if target_is_here or not (there if device is None else device.type == OTHER.type):
            return result
        given = {id(tensor.numbers): tensor for tensor in there}  # what works in place returns what it was given

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return given[id(leaf)] if id(leaf) in given else There(leaf)

        return tree_map(move, result)

    def _source(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a queue copies from: page-locked memory as it is when the copy is done, which nothing but the caller keeps."""
        first = tensor.data_ptr()
        if any(array.ctypes.data <= first < array.ctypes.data + array.nbytes for array in self.pinned):
            bare: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(first)
            return torch.frombuffer(bare, dtype=tensor.dtype).view(tensor.shape)
        return tensor.clone()


class _Hook(torch._C._acc.PrivateUse1Hooks if CAN_STAND_IN else object):  # type: ignore[misc]
    def is_available(self) -> bool:
        return False  # to those who look for an accelerator

    def has_primary_context(self, device: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


@cache
def _register() -> None:
    registration._setup_privateuseone_for_python_backend(hook=_Hook())


@contextmanager
def other_device() -> Iterator[_Device]:
    """Let that device exist for a while."""
    _register()
    torch._C._set_only_lift_cpu_tensors(True)  # so that new tensors come through here before they go anywhere
    try:
        with _Device() as device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
