"""``on_device``: units of batches that were read go to a CUDA device and through the transforms there, ahead of the consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from .batch import ParticleBatch
from .collate import Collate
from .columns import Columns
from .ring import outside_inference_mode, rows_apart
from .unit_reader import Unit, UnitReader

#: Units that are copied, and those of them that are transformed, before the consumer asks for them.
UNITS_AHEAD, _TRANSFORMED_AHEAD = 1, 1

#: Host images whose copy to the device may not be over: letting go of them gives their buffer back.
Copying = deque[tuple[torch.cuda.Event, Tensor]]


@dataclass(frozen=True)
class _Lanes:
    """CUDA streams: copies of later units run beside the transforms of earlier ones, and those beside the consumer's work."""

    images: torch.cuda.Stream
    transforms: torch.cuda.Stream


@cache
def lanes_of(device: torch.device) -> _Lanes:
    """The same ones for every iteration, because what is planned for a stream (polar transforms) is kept for it."""
    return _Lanes(*(torch.cuda.Stream(device) for _ in range(2)))  # type: ignore[no-untyped-call]


class _Moving:
    """Columns that go to a device when they are first asked for, in whatever CUDA stream that is."""

    def __init__(self, columns: Columns, device: torch.device) -> None:
        self._columns, self._device = columns, device
        self.stream: torch.cuda.Stream | None = None

    def __call__(self) -> dict[str, Tensor]:
        self.stream = torch.cuda.current_stream(self._device.index)
        return self._columns.to(self._device, non_blocking=True).tensors


@dataclass(frozen=True)
class _There:
    """A unit on the device: its images as they were copied, and its batches as one; ``done`` is when they are there, or transformed."""

    places: list[tuple[int, int]]
    images: Tensor
    batch: ParticleBatch
    columns: _Moving
    done: torch.cuda.Event


def on_device(reader: UnitReader, device: torch.device, collate: Collate | None, copying: Copying) -> Iterator[tuple[int, ParticleBatch]]:
    """The batches of a reader for a device, each with the position in the epoch after it, ready for the consumer's CUDA stream.

    Some units are under way at a time. Where the device takes longer than the processor, this waits: memory does not grow.

    ``copying`` holds what is still being copied, for the caller to wait for when the iteration ends in whatever way.
    """
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    lanes = lanes_of(device)
    copied: deque[_There] = deque()
    ready: deque[_There] = deque()
    # Of units that the consumer has had: when all work on them is done, until when the images they were made of are kept.
    used: deque[tuple[torch.cuda.Event, Tensor]] = deque()
    reader.start()
    try:
        while True:
            with outside_inference_mode():
                while len(copied) + len(ready) <= UNITS_AHEAD:
                    unit = reader.take(wait=not (copied or ready))
                    if unit is None:
                        break
                    if len(used) > UNITS_AHEAD:
                        used.popleft()[0].synchronize()
                    # All copies are started before any transform, which may wait for numbers from the device.
                    copied.append(_copy(unit, device, lanes, copying))
                while copied and len(ready) <= _TRANSFORMED_AHEAD:
                    ready.append(_transform(copied.popleft(), collate, lanes))
            if not ready:
                return
            reader.refill()
            current = ready.popleft()
            yield from _hand_over(current, device)
            consumer = torch.cuda.current_stream(device.index)
            consumer.wait_event(current.done)  # for one that took none of the batches
            used.append((consumer.record_event(torch.cuda.Event(blocking=True)), current.images))  # type: ignore[no-untyped-call]
            del current
    finally:
        lanes.images.wait_stream(lanes.transforms)  # before a later copy takes the place of images that are being transformed


def _copy(unit: Unit, device: torch.device, lanes: _Lanes, copying: Copying) -> _There:
    places, held = unit
    with torch.cuda.stream(lanes.images):
        images = held.images.to(device, non_blocking=True)
        there = lanes.images.record_event()
    copying.append((there, held.images))
    while copying and copying[0][0].query():  # type: ignore[no-untyped-call]
        copying.popleft()
    columns = _Moving(held.columns, device)
    return _There(places, images, replace(held, images=images, columns=Columns(columns)), columns, there)


def _transform(unit: _There, collate: Collate | None, lanes: _Lanes) -> _There:
    if collate is None:
        return unit
    with torch.cuda.stream(lanes.transforms):
        lanes.transforms.wait_event(unit.done)
        return replace(unit, batch=collate(unit.batch), done=lanes.transforms.record_event())


def _hand_over(unit: _There, device: torch.device) -> Iterator[tuple[int, ParticleBatch]]:
    """The batches of a unit. The consumer's stream waits for each, and the allocator for the consumer's stream."""
    start = 0
    told: torch.cuda.Stream | None = None
    for position, count in unit.places:
        rows = slice(start, start + count)
        start += count
        consumer = torch.cuda.current_stream(device.index)
        if consumer != told:
            consumer.wait_event(unit.done)
            unit.batch.map_images(partial(_hold, user=consumer), unit.batch.columns)
            told = consumer
        columns = partial(_columns_of_part, unit.batch.columns, unit.columns, rows, device)  # not the unit, which has the pixels
        yield position, unit.batch.map_images(partial(rows_apart, rows=rows), Columns(columns))


def _hold(tensor: Tensor, user: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(user)
    return tensor


def _columns_of_part(columns: Columns, moving: _Moving, rows: slice, device: torch.device) -> dict[str, Tensor]:
    with outside_inference_mode():
        made = columns.tensors  # those of the unit go there when the first of its batches asks for any
    asking, first = torch.cuda.current_stream(device.index), moving.stream
    if first is not None and asking != first:
        if first != lanes_of(device).transforms:  # for which the consumer has waited
            asking.wait_stream(first)
        for column in made.values():
            column.record_stream(asking)
    return {name: rows_apart(column, rows) for name, column in made.items()}
