"""``Reader``: batches in host memory, read by a thread of its own or by whoever waits for them."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Any

import torch

from .batch import ParticleBatch
from .dataset import ParticleDataset
from .ring import BufferRing
from .sampler import ParticleSampler

#: A consumer that comes back sooner than this, or than this share of the time a read takes, has done nothing that reading
#: ahead could hide behind.
_BUSY_SECONDS, _BUSY_SHARE = 2e-4, 0.25

#: Seconds that a thread which may never have started is waited for.
_LONGEST_START = 1.0

#: A batch, and before it the position in the epoch after it.
Placed = tuple[int, ParticleBatch]

#: Readers that may have a thread.
READERS: weakref.WeakSet[Any] = weakref.WeakSet()

#: Held while a reader's thread starts, which for a moment changes what other threads take for torch's number of threads.
_STARTING = threading.Lock()
if sys.platform != "win32":  # a fork has no thread that would release it
    os.register_at_fork(before=_STARTING.acquire, after_in_parent=_STARTING.release, after_in_child=_STARTING.release)


def end_idle_threads() -> None:
    """End the OpenMP threads that this one has used and may use again, but for one.

    They would be counted: with more threads in all than processors, the runtime puts those of all others to sleep after each call, too,
    and waking them takes as long as copying some megabytes.
    """
    with _STARTING:
        threads = torch.get_num_threads()
        if threads > 2:
            try:
                torch.set_num_threads(2)
                torch.zeros(1 << 17, device="cpu").add_(1)  # in parallel, which ends threads that are too many
            finally:
                torch.set_num_threads(threads)


@atexit.register
def _close_readers() -> None:
    """A thread that is still reading while the interpreter goes down would end the program with an error."""
    for reader in list(READERS):
        reader.close()


def start_reading(thread: threading.Thread, ready: SimpleQueue[None]) -> None:
    """Start a thread whose work begins with ``limit_threads``."""
    with _STARTING:
        # Asked for first, because torch sets up a thread's number when it is first needed, from a default that the reader changes.
        threads = torch.get_num_threads()
        try:
            thread.start()
            ready.get()
        except BaseException:  # Ctrl-C
            with contextlib.suppress(Empty):
                ready.get(timeout=_LONGEST_START)
            raise
        finally:
            # torch keeps the number of threads per thread, but its default for threads to come is changed by the reader's. That
            # has to come before this.
            torch.set_num_threads(threads)


def limit_threads(share: Callable[[int], int], ready: SimpleQueue[None]) -> None:
    """Let torch use a share of its threads in this one.

    With all of them, there would be more than there are cores, and the OpenMP runtime then puts each to sleep between any two calls.
    """
    torch.set_num_threads(max(1, share(torch.get_num_threads())))
    ready.put(None)


def wait_for_end(thread: threading.Thread, process: int) -> bool:
    """Wait for the thread of a reader, made in ``process``, which was told to end; False in that thread itself and in a fork."""
    # Python may collect an abandoned iteration in any thread, this one too. In a fork, what the thread was at stays undone.
    if thread is threading.current_thread() or process != os.getpid():
        return False
    if thread.is_alive():
        thread.join()
    return True


class Reader:
    """Batches in the order of the sampler, read ahead by a thread while the consumer is busy.

    A batch that is not there when the consumer asks is read by the consumer itself: handing it over from a thread would take longer.
    Where the images of a batch lie is found out for many batches at once: after each copy, which has filled the caches with
    images, Python takes long for the least thing. The thread runs whenever the consumer has something else to do, from the start of
    the iteration until ``close``.

    Parameters
    ----------
    dataset, sampler : what is read, and in which order
    ahead : batches that are read before the consumer asks for them
    ring : lends the buffers
    """

    def __init__(self, dataset: ParticleDataset, sampler: ParticleSampler, ahead: int, ring: BufferRing) -> None:
        self._dataset, self._ahead, self._ring = dataset, ahead, ring
        self._drawn = sampler.steps(dataset.places)
        self._steps = chain.from_iterable(self._drawn)
        self._filled: deque[Placed] = deque()
        self._reading = threading.RLock()  # whoever holds it reads the next batches, so that they come in order
        self._error: BaseException | None = None
        self._read_seconds = 0.0
        self._busy = True  # the consumer
        self._finished = self.closed = self._by_thread = False
        # No Event: Ctrl-C at the end of its "with", which is Python code, leaves the lock in it locked for ever.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._ready: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="cryolike-reader", daemon=True)
        self._process = os.getpid()
        READERS.add(self)

    def __iter__(self) -> Iterator[Placed]:
        start_reading(self._thread, self._ready)
        while (read := self._next()) is not None:
            self._fill_up()
            left = time.perf_counter()
            yield read
            # A consumer that finds what the thread has read is not too fast for it.
            self._busy = (self._by_thread and bool(self._filled)) or time.perf_counter() - left > max(
                _BUSY_SECONDS, _BUSY_SHARE * self._read_seconds
            )

    def close(self) -> None:
        """End the thread; what it has read ahead goes back to the ring. From any thread; what is being read is waited for."""
        self.closed = True
        self._wake.put(None)
        if not wait_for_end(self._thread, self._process):
            return
        with self._reading:
            self._drawn.close()
            self._filled.clear()

    def _fill_up(self) -> None:
        # Not for one batch at a time: each time the thread wakes, it takes the interpreter lock from a busy consumer once more.
        if self._busy and len(self._filled) <= self._ahead // 2 and self._wake.empty():
            self._wake.put(None)

    def _next(self) -> Placed | None:
        if not self._filled:
            with self._reading:
                if not self._filled:
                    self._by_thread = False
                    self._read()
        try:
            return self._filled.popleft()
        except IndexError:  # the end, or another thread has closed the reader
            pass
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # it holds this frame, and with it the data set
        return None

    def _run(self) -> None:
        limit_threads(lambda threads: threads // 2, self._ready)
        while not (self._finished or self.closed):
            self._wake.get()
            while self._busy and len(self._filled) < self._ahead and not (self._finished or self.closed):
                with self._reading:
                    self._by_thread = True
                    self._read()

    def _read(self) -> None:
        """Read the next batch, or find out that there is none; to be called with ``_reading`` held.

        An error is for the consumer, with its traceback, after the batches before it.
        """
        try:
            step = None if self._finished or self.closed else next(self._steps, None)
            if step is None:
                self._finished = True
                return
            started = time.perf_counter()
            position, rows, places = step
            images, target = self._ring.lend(len(rows))
            self._dataset.reading(rows, target, places)()
            self._filled.append((position, self._dataset.batch_of(rows, images)))
            self._read_seconds = time.perf_counter() - started
        except BaseException as error:
            self._error, self._finished = error, True
