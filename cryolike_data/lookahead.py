"""Asking the system for the pages of the next batches from a thread of its own, so that the reader finds them in memory."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from .pages import waits_for_disk

#: Batches that go by without a look when many in a row have been in memory, as long as nobody has to wait for the disk.
MAX_PATIENCE = 128
#: Batches between looks at whether anybody had to wait, which take longer than all the rest.
_BETWEEN_LOOKS = 8
#: Seconds after which a batch is handed out even if asking for it is not done: asking must never hold up the reader for long.
_LONGEST_WAIT = 0.05
#: Never more than this is asked for ahead of the reader, however large a batch is (but always one batch).
MAX_BYTES_AHEAD = 512 << 20


@runtime_checkable
class AsksAhead(Protocol):
    """A data set that can have the pages of some rows brought into memory."""

    image_bytes: int

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
        self._thread = threading.Thread(target=self._run, name="cryolike-lookahead", daemon=True)

    @staticmethod
    def over(dataset: Any, batches: int) -> LookAhead | NoLookAhead:
        """A look-ahead over a data set, or none where the data set cannot use it."""
        return LookAhead(dataset, batches) if batches and isinstance(dataset, AsksAhead) else NoLookAhead()

    def pass_on(self, drawn: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
        """The same items in the same order, each held back until those after it have been asked for."""
        held: deque[tuple[int, tuple[int, np.ndarray]]] = deque()
        depth = 0
        for item in drawn:
            depth = depth or self._depth(len(item[1]))  # no later batch is larger than the first
            held.append((self._ask(item[1]), item))
            if len(held) > depth:
                request, item = held.popleft()
                self._wait_for(request)
                yield item
        for request, item in held:
            self._wait_for(request)
            yield item

    def __enter__(self) -> Self:
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C; there is no __exit__ then
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        # Python may collect an abandoned iteration in any thread, this one too, and at its own end, where waiting may take for ever.
        if self._thread is not threading.current_thread() and not sys.is_finalizing():
            self._thread.join()

    def _end(self) -> None:
        self._open = False
        self._wake.put(None)

    def _depth(self, batch_size: int) -> int:
        return min(self._batches, max(1, MAX_BYTES_AHEAD // max(1, batch_size * self._dataset.image_bytes)))

    def _ask(self, rows: np.ndarray) -> int:
        """Let the thread ask for these rows, or not where the last ones were in memory; the number of the request to wait for."""
        if self._skip > 0:
            self._skip -= 1
            if self._skip % _BETWEEN_LOOKS or self._waits == waits_for_disk():
                return 0
        self._waits = waits_for_disk()
        self._skip = self._patience
        self._asked += 1
        with self._changing:
            self._waiting.append((self._asked, rows))
        self._wake.put(None)
        return self._asked

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

    def _run(self) -> None:
        while True:
            self._wake.get()
            if not self._open:
                return
            with self._changing:
                if not self._waiting:
                    continue
                request, rows = self._waiting.popleft()
            # Data that are in memory are looked at less and less often, because even looking takes time from the reader.
            cold = self._dataset.ask_ahead(rows)
            self._patience = 0 if cold else min(MAX_PATIENCE, 2 * self._patience + 1)
            self._done = request
            if (told := self._told) is not None:
                told.put(None)


class NoLookAhead:
    """In place of a look-ahead where there is nothing to ask for."""

    def pass_on(self, drawn: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
        """The items as they are."""
        return drawn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None
