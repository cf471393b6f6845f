"""Asking the system for the pages of the next batches from a thread of its own, so that the reader finds them in memory."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import repeat
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from torch import Tensor

from .pages import waits_for_disk

#: Batches that go by without a look when many in a row have been in memory, as long as nobody has to wait for the disk.
MAX_PATIENCE = 128
#: Batches between looks at whether anybody had to wait, which take longer than all the rest.
_BETWEEN_LOOKS = 8
#: Seconds after which a batch is handed out even if asking for it is not done: asking must never hold up the reader for long.
_LONGEST_WAIT = 0.05
#: Never more than this is asked for ahead of the reader, however large a batch is (but always one batch).
MAX_BYTES_AHEAD = 512 << 20

#: A batch: the position in the epoch after it, its rows, and what a data set says of where their images lie.
Step = tuple[int, np.ndarray, Tensor | None]


def nowhere(rows: np.ndarray) -> Iterable[None]:
    """Of each of some batches, (batches, size), that it is not known where its images lie."""
    return repeat(None, len(rows))


@runtime_checkable
class AsksAhead(Protocol):
    """A data set that can have the pages of some rows brought into memory."""

    image_bytes: int

    def in_memory(self, rows: np.ndarray) -> bool:
        """Whether the images of these rows (a sample of them) are in the page cache, as far as this is known without waiting."""

    def ask_ahead(self, rows: np.ndarray) -> bool:
        """Start to bring the images of these rows into the page cache, or False if they (a sample of them) are there."""


class LookAhead:
    """A thread that asks for the pages of rows it is told of, a few batches ahead of their being handed out."""

    def __init__(self, dataset: AsksAhead, batches: int) -> None:
        self._dataset = dataset
        self._batches = batches
        self._waiting: deque[tuple[int, np.ndarray]] = deque()
        self._asked = self._done = 0
        # No Condition or Event: Ctrl-C at the end of its "with", which is Python code, leaves the lock in it locked for ever.
        self._changing = threading.Lock()  # what is waiting
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._told: SimpleQueue[None] | None = None  # of requests that are done, while somebody waits for one
        self._open = True
        self._patience = self._skip = 0
        self._waits = 0
        self._thread: threading.Thread | None = None  # data that stay in memory need none

    @staticmethod
    def over(dataset: Any, batches: int) -> LookAhead | NoLookAhead:
        """A look-ahead over a data set, or none where the data set cannot use it."""
        return LookAhead(dataset, batches) if batches and isinstance(dataset, AsksAhead) else NoLookAhead()

    def pass_on(self, drawn: Iterator[list[Step]]) -> Iterator[list[Step]]:
        """The same batches in the same order, each held back until those after it have been asked for.

        One at a time while they have to be asked for, and else several, because whoever takes them has less to do for each then.
        """
        held: deque[tuple[int, list[Step]]] = deque()
        depth = n_held = 0
        for steps in drawn:
            depth = depth or self._depth(len(steps[0][1]))  # no later batch is larger than the first
            start = 0
            while start < len(steps):
                request, count = self._ask(steps[start][1], len(steps) - start)
                held.append((request, steps[start : start + count]))
                start, n_held = start + count, n_held + count
                while n_held - len(held[0][1]) >= depth:
                    request, first = held.popleft()
                    n_held -= len(first)
                    self._wait_for(request)
                    yield first
        for request, first in held:
            self._wait_for(request)
            yield first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open = False
        self._wake.put(None)
        # Python may collect an abandoned iteration in any thread, this one too, and at its own end, where waiting may take for ever.
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread() and not sys.is_finalizing():
            thread.join()

    def _depth(self, batch_size: int) -> int:
        return min(self._batches, max(1, MAX_BYTES_AHEAD // max(1, batch_size * self._dataset.image_bytes)))

    def _ask(self, rows: np.ndarray, batches: int) -> tuple[int, int]:
        """Let the thread ask for the rows of the first of some batches, unless these, or the last ones, are in memory.

        Returns the number of the request to wait for (0: none), and how many of the batches are seen to.
        """
        waits = waits_for_disk()
        if min(self._skip, self._patience) > 0 and self._waits == waits:
            count = min(self._skip, _BETWEEN_LOOKS, batches)
            self._skip -= count
            return 0, count
        self._waits = waits
        if self._dataset.in_memory(rows):
            self._look_again_later()
            self._skip = self._patience
            return 0, 1
        self._skip = self._patience
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cryolike-lookahead", daemon=True)
            self._thread.start()
        self._asked += 1
        with self._changing:
            self._waiting.append((self._asked, rows))
        self._wake.put(None)
        return self._asked, 1

    def _wait_for(self, request: int) -> None:
        # Pages that a reader finds missing are read with far more around them than is wanted; except at the start, the request is
        # some batches old and long done.
        if request <= self._done:
            return
        told = self._told = SimpleQueue()
        latest = time.monotonic() + _LONGEST_WAIT
        with contextlib.suppress(Empty):
            while self._done < request:
                told.get(timeout=max(0, latest - time.monotonic()))
        self._told = None
        with self._changing:
            while self._waiting and self._waiting[0][0] <= request:
                self._waiting.popleft()  # too late to be of use

    def _look_again_later(self) -> None:
        # Data that are in memory are looked at less and less often, because even looking takes time from the reader.
        self._patience = min(MAX_PATIENCE, 2 * self._patience + 1)

    def _run(self) -> None:
        while True:
            self._wake.get()
            if not self._open:
                return
            with self._changing:
                if not self._waiting:
                    continue
                request, rows = self._waiting.popleft()
            if self._dataset.ask_ahead(rows):
                self._patience = 0
            else:
                self._look_again_later()
            self._done = request
            if (told := self._told) is not None:
                told.put(None)


class NoLookAhead:
    """In place of a look-ahead where there is nothing to ask for."""

    def pass_on(self, drawn: Iterator[list[Step]]) -> Iterator[list[Step]]:
        """The batches as they are."""
        return drawn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None
