"""Reused buffers: aligned, and never used again while anyone can still see them."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from support import another_thread_at
from torch import Tensor

from cryolike_data.ring import BufferRing

KEEP = 5
DTYPES = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.float16, torch.float32]


def ring(dtype: torch.dtype = torch.float32) -> BufferRing:
    return BufferRing((5, 5), dtype, pinned=False, keep=KEEP, seen_as=id)


def lend(source: BufferRing, images: int) -> Tensor:
    return source.lend(images)[0]


def free(source: BufferRing) -> list[np.ndarray]:
    """All buffers that nobody has."""
    return [buffer.array for buffers in source._free.values() for buffer in buffers] + [loan.buffer.array for loan in source._back]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_buffers_start_at_multiples_of_64_bytes(dtype: torch.dtype) -> None:
    buffers = [lend(ring(dtype), 4) for _ in range(8)]
    for buffer in buffers:
        assert buffer.data_ptr() % 64 == 0
        assert (tuple(buffer.shape), buffer.dtype, buffer.is_contiguous()) == ((4, 5, 5), dtype, True)


def test_buffers_that_are_in_use_do_not_overlap() -> None:
    source = ring()
    lent = [lend(source, 4) for _ in range(5)]
    for value, tensor in enumerate(lent):
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in lent] == [[0.0], [1.0], [2.0], [3.0], [4.0]]


def test_a_buffer_is_lent_again_to_who_wants_as_many_images() -> None:
    source = ring()
    lent = lend(source, 4)
    address = lent.data_ptr()
    del lent
    others = [lend(source, 3), lend(source, 5)]
    assert [other.shape for other in others] == [(3, 5, 5), (5, 5, 5)]
    assert lend(source, 4).data_ptr() == address


def test_the_buffer_given_back_last_is_lent_first() -> None:
    source = ring()
    first, second = lend(source, 4), lend(source, 4)
    addresses = [second.data_ptr(), first.data_ptr()]
    del first
    del second
    again = [lend(source, 4), lend(source, 4)]
    assert [lent.data_ptr() for lent in again] == addresses


def test_what_fills_a_buffer_is_worked_out_once_for_each() -> None:
    made: list[np.ndarray] = []

    def see(array: np.ndarray) -> np.ndarray:
        made.append(array)
        return array.reshape(-1)

    source = BufferRing((5, 5), torch.float32, pinned=False, keep=KEEP, seen_as=see)
    for _ in range(3):
        (first, one), (second, other) = source.lend(4), source.lend(4)
        one.fill(1)
        other.fill(2)
        assert (first == 1).all()
        assert (second == 2).all()
        del first, second
    assert len(made) == 2


def memory(source: BufferRing) -> list[weakref.ref[np.ndarray]]:
    """What owns the memory of each buffer that is lent."""
    return [weakref.ref(loan.buffer.array.base) for loan in source._lent.values()]


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda tensor: tensor,
    "slice": lambda tensor: tensor[1:2],
    "one pixel": lambda tensor: tensor[3, 4, 4],
    "view": lambda tensor: tensor.view(-1),
    "other dtype": lambda tensor: tensor.view(torch.int32),
    "transpose": lambda tensor: tensor.mT,
    "detached": lambda tensor: tensor.detach(),
    "array": lambda tensor: tensor.numpy(),
    "part of an array": lambda tensor: tensor.numpy()[2:, 1],
    "memoryview": lambda tensor: memoryview(tensor.numpy()),
    "storage": lambda tensor: tensor.untyped_storage(),
    "dlpack": lambda tensor: torch.from_dlpack(tensor),
    "array by dlpack": lambda tensor: np.from_dlpack(tensor),
    "autograd": lambda tensor: tensor * torch.ones(1, requires_grad=True),
    "closure": lambda tensor: lambda: tensor,
    "unbound": lambda tensor: torch.unbind(tensor)[2],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_buffer_comes_back_when_the_last_thing_that_sees_it_is_gone(holder: str) -> None:
    source = ring()
    lent = lend(source, 4)
    address = lent.data_ptr()
    held = HOLDERS[holder](lent)
    del lent
    gc.collect()
    assert free(source) == []
    del held
    gc.collect()
    assert [buffer.ctypes.data for buffer in free(source)] == [address]


def test_a_copy_does_not_hold_the_buffer() -> None:
    source = ring()
    copy = lend(source, 4).clone()
    assert len(free(source)) == 1
    assert copy.shape == (4, 5, 5)


def test_a_buffer_comes_back_once_for_each_time_it_was_lent() -> None:
    source = ring()
    for _ in range(10):
        lent = lend(source, 4)
        del lent
    assert len(free(source)) == 1


def test_a_closed_ring_keeps_nothing() -> None:
    source = ring()
    lent = lend(source, 4)
    other = lend(source, 4)
    del other
    assert len(free(source)) == 1
    source.close()
    assert free(source) == []
    lent.fill_(3)  # still the user's
    del lent
    assert free(source) == []


def test_no_python_code_runs_when_a_buffer_comes_back() -> None:
    # It would run inside a destructor, where Ctrl-C is only printed.
    called: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        called.append(frame.f_code.co_qualname)

    source = ring()
    lent, before = lend(source, 4), sys.gettrace()
    sys.settrace(note)
    try:
        del lent
    finally:
        sys.settrace(before)
    assert called == []
    assert len(free(source)) == 1


@pytest.mark.parametrize("images", [4, 7])
def test_no_more_free_buffers_are_kept_than_asked_for(images: int) -> None:
    source = ring()
    lent = [lend(source, 4) for _ in range(3 * KEEP)]
    last = [tensor.data_ptr() for tensor in lent[-KEEP:]]
    gone = memory(source)
    while lent:
        del lent[0]
    lend(source, images)
    assert [buffer.ctypes.data for buffer in free(source) if len(buffer) == 4] == last
    assert [buffer() is None for buffer in gone] == [True] * 2 * KEEP + [False] * KEEP


def test_buffers_that_are_held_while_a_ring_rests_are_kept_up_to_a_number_when_they_come_back() -> None:
    source = ring()
    lent = [lend(source, 4) for _ in range(3 * KEEP)]
    last = [tensor.data_ptr() for tensor in lent[-KEEP:]]
    gone = memory(source)
    source.rest()
    for number, tensor in enumerate(lent):
        tensor.fill_(number)
    assert [int(tensor.max()) for tensor in lent] == list(range(3 * KEEP))
    assert [buffer() is None for buffer in gone] == [False] * 3 * KEEP
    del tensor
    while lent:
        del lent[0]
    assert sorted(buffer.ctypes.data for buffer in free(source)) == sorted(last)
    assert [buffer() is None for buffer in gone] == [True] * 2 * KEEP + [False] * KEEP


def test_buffers_that_came_back_before_a_ring_rests_are_kept_up_to_a_number() -> None:
    source = ring()
    lent = [lend(source, 4) for _ in range(3 * KEEP)]
    lent.clear()
    source.rest()
    assert len(free(source)) == KEEP


@pytest.mark.parametrize("line", range(5))
def test_a_ring_may_be_closed_by_another_thread_while_it_rests(line: int) -> None:
    source = ring()
    lent = [lend(source, 4) for _ in range(3 * KEEP)]
    with another_thread_at(line, BufferRing.rest, source.close):
        source.rest()
    lent.clear()
    assert free(source) == []


@pytest.mark.parametrize("line", range(5))
def test_a_buffer_may_come_back_from_another_thread_while_a_ring_rests(line: int) -> None:
    source = ring()
    lent = [lend(source, 4) for _ in range(3 * KEEP)]
    with another_thread_at(line, BufferRing.rest, lambda: lent.__delitem__(0)):
        source.rest()
    lent.clear()
    assert len({lend(source, 4).data_ptr() for _ in range(3)}) == 1
    assert KEEP <= len(free(source)) <= KEEP + 1


def test_a_closed_ring_keeps_nothing_that_came_back_before() -> None:
    source = ring()
    lent = [lend(source, 4) for _ in range(4)]
    gone = memory(source)
    lent.pop()
    source.rest()  # which takes it back
    lent.pop()
    source.close()
    assert [buffer() is None for buffer in gone] == [False, False, True, True]
    lent.clear()
    assert [buffer() is None for buffer in gone] == [True] * 4


def test_a_ring_that_was_let_go_of_lives_as_long_as_what_it_lent() -> None:
    source = ring()
    lent = lend(source, 4)
    gone = weakref.ref(source)
    del source
    gc.collect()
    assert lent.fill_(1).sum() == 100
    del lent
    gc.collect()
    assert gone() is None


@pytest.mark.gpu
def test_pinned_buffers_are_page_locked_and_come_back_too() -> None:
    source = BufferRing((5, 5), torch.float32, pinned=True, keep=KEEP, seen_as=id)
    lent = lend(source, 3)
    assert lent.is_pinned()
    assert lent.data_ptr() % 64 == 0
    del lent
    assert len(free(source)) == 1
