"""``UnitReader``: batches for a device, several in one unit, copied into host memory by a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from torch import Tensor

from .batch import ParticleBatch
from .dataset import ParticleDataset
from .lookahead import Step
from .reader import READERS, end_idle_threads, limit_threads, start_reading, wait_for_end
from .ring import BufferRing, outside_inference_mode
from .sampler import ParticleSampler

log = logging.getLogger(__name__)

#: Small batches go together, up to so many bytes: to start a copy and transforms takes Python about as long as the bus needs for these.
#: Not more, because a cache of the CPU should hold all units that are under way.
_UNIT_BYTES = 32 << 20
#: Units that are ready to be read, being read, and waiting to be taken, at least.
_UNITS = 3

#: Batches as one, and before it for each of them the position in the epoch after it and how many particles it has.
Unit = tuple[list[tuple[int, int]], ParticleBatch]


@dataclass
class _Read:
    """What is read next.

    Attributes
    ----------
    steps : the batches
    rows, images : all rows, and where their images go
    copy : what copies them; None where something is wrong with a file
    units, error : what came of it
    """

    steps: Sequence[Step]
    rows: np.ndarray
    images: Tensor
    copy: Callable[[], object] | None
    units: list[Unit] = field(default_factory=list)
    error: BaseException | None = None


class UnitReader:
    """Units in the order of the sampler, read ahead until ``close``.

    The thread does nothing but copy images, with all processors but two: anything else would take it long, as its caches are full of
    images, and it would want the interpreter lock while the consumer's thread starts copies and transforms.

    Parameters
    ----------
    dataset, sampler : what is read, and in which order
    ahead : batches that are read before they are asked for, in units of several small ones
    ring : lends the buffers
    """

    def __init__(self, dataset: ParticleDataset, sampler: ParticleSampler, ahead: int, ring: BufferRing) -> None:
        self._dataset, self._ring = dataset, ring
        self._lending, self._drawing = threading.Lock(), threading.Lock()
        self._together = max(1, min(_UNIT_BYTES // (sampler.batch_size * dataset.image_bytes), 1 + ahead))
        self._most = max(_UNITS, -(-ahead // self._together))
        self._runs = sampler.steps()
        self._steps = chain.from_iterable(self._runs)
        self._under_way = 0
        self._to_copy: SimpleQueue[_Read | None] = SimpleQueue()
        self._copied: SimpleQueue[_Read | None] = SimpleQueue()
        self._units: deque[Unit] = deque()
        self._error: BaseException | None = None
        self._drawn = self.closed = False
        self._ready: SimpleQueue[None] = SimpleQueue()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._copy_all, name="cryolike-reader", daemon=True)
        READERS.add(self)

    def start(self) -> None:
        """Begin to read."""
        end_idle_threads()
        start_reading(self._thread, self._ready)
        self.refill()

    def refill(self) -> None:
        """Let the thread go on to read as many units ahead as there may be."""
        while self._under_way < self._most and not (self._drawn or self.closed):
            try:
                with self._drawing:
                    steps = list(islice(self._steps, self._together))
                self._drawn = len(steps) < self._together
                if steps:
                    self._to_copy.put(self._prepared(steps))
                    self._under_way += 1
            except Exception as error:  # for the consumer, after the batches before it
                self._error, self._drawn = error, True

    def take(self, *, wait: bool) -> Unit | None:
        """The next unit; None at the end, and where it is not there yet and nobody is to wait for it.

        An error comes after the units before it, with its traceback, to who waits.
        """
        while not self._units and self._under_way and not self.closed:
            try:
                read = self._copied.get(block=wait)
            except Empty:
                return None
            if read is None or self.closed:  # meanwhile
                return None
            self._under_way -= 1
            self._units.extend(read.units)
            if read.error is not None:
                self._error, self._drawn, self._under_way = read.error, True, 0
                read.error = None  # which holds the frame that holds this
        with suppress(IndexError):  # none is left, or another thread has just closed the reader
            return self._units.popleft()
        if self._error is not None and wait:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # it holds this frame, and with it the data set
        return None

    def close(self) -> None:
        """End the thread; what it has read goes back to the ring. From any thread; what is being read is waited for."""
        self.closed = True
        self._to_copy.put(None)
        if not wait_for_end(self._thread, self._process):
            return
        with self._drawing:
            self._runs.close()
        self._units.clear()
        for queue in (self._to_copy, self._copied):
            while not queue.empty():
                queue.get_nowait()
        self._copied.put(None)

    def _prepared(self, steps: Sequence[Step]) -> _Read:
        rows = steps[0][1] if len(steps) == 1 else np.concatenate([rows for _, rows, _ in steps])
        images, target = self._lend(len(rows))
        copy = None
        try:
            with outside_inference_mode():  # in which the thread is not
                copy = self._dataset.reading(rows, target)
        except Exception as error:
            _warn_one_by_one(len(steps), error)
        return _Read(steps, rows, images, copy)

    def _copy_all(self) -> None:
        # One processor is for the consumer's thread and one for whatever else: where these work on one that copies, all wait for it.
        limit_threads(lambda threads: threads - 2, self._ready)
        while (read := self._to_copy.get()) is not None:
            try:
                if not self.closed:
                    self._copy(read)
            except BaseException as error:
                read.error = error
            self._copied.put(read)
            del read

    def _copy(self, read: _Read) -> None:
        if read.copy is not None:
            try:
                read.copy()
            except Exception as error:
                _warn_one_by_one(len(read.steps), error)
            else:
                read.units.append(self._unit(read.steps, read.rows, read.images))
                return
        for step in read.steps:  # those before the one that fails reach the consumer, and then its error does
            rows = step[1]
            images, target = self._lend(len(rows))
            self._dataset.reading(rows, target)()
            read.units.append(self._unit([step], rows, images))

    def _unit(self, steps: Sequence[Step], rows: np.ndarray, images: Tensor) -> Unit:
        return [(position, len(part)) for position, part, _ in steps], self._dataset.batch_of(rows, images)

    def _lend(self, images: int) -> tuple[Tensor, Any]:
        with self._lending:
            return self._ring.lend(images)


def _warn_one_by_one(batches: int, error: Exception) -> None:
    """Say that several batches which could not be read in one call are read again, each by itself."""
    if batches > 1:
        log.warning("Reading %d batches in one call failed, so they are read one by one: %s", batches, error)
