"""``stream``: the fast loader. One reader thread fills reused buffers, and copies and transforms overlap with the consumer."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch

from .batch import ParticleBatch
from .collate import Collate
from .dataset import ParticleDataset
from .errors import ArgumentError
from .ring import BufferRing
from .sampler import ParticleSampler, Shuffle
from .transforms import Downsample, Normalize
from .transforms.normalize import NormalizeMethod

#: Batches that are on the device before the consumer asks for them.
_ON_DEVICE = 2
#: A consumer that comes back sooner than this, or than this share of the time a read takes, has done nothing that reading
#: ahead could hide behind.
_BUSY_SECONDS, _BUSY_SHARE = 2e-4, 0.25


def stream(
    dataset: ParticleDataset,
    *,
    batch_size: int | None = None,
    sampler: ParticleSampler | None = None,
    shuffle: Shuffle = False,
    seed: int = 0,
    downsample: Downsample | None = None,
    normalize: NormalizeMethod | Normalize | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    prefetch: int = 3,
) -> ParticleStream:
    """Batches of a data set, read, copied and transformed while the consumer works on earlier ones.

    Parameters
    ----------
    dataset : the particles
    batch_size : particles per batch (default 256); with ``sampler`` it is the sampler's
    sampler : which particles come when; by default every one once, in order unless ``shuffle`` is given
    shuffle, seed : for the default sampler, see ``ParticleSampler``
    downsample, normalize : see ``Collate``
    device : where batches go; pixels travel in the dtype of the file
    dtype : floating dtype of the images; by default the file's where nothing is done to them, else float32
    prefetch : batches that are read ahead of the consumer

    Returns
    -------
    An iterable of ``ParticleBatch``, once over the epoch for each ``iter``. Each batch is the consumer's for as long as any
    tensor of it is held: a buffer is used again only after the last of them is gone.
    """
    if sampler is None:
        sampler = ParticleSampler(dataset, 256 if batch_size is None else batch_size, shuffle=shuffle, seed=seed)
    elif batch_size is not None or shuffle is not False or seed != 0:
        raise ArgumentError("batch_size, shuffle and seed are the sampler's; pass either them or sampler")
    if prefetch < 1:
        raise ArgumentError(f"prefetch is at least 1, not {prefetch}")
    as_stored = dtype is None and downsample is None and normalize is None
    collate = None if as_stored else Collate(downsample, normalize, None, torch.float32 if dtype is None else dtype)
    return ParticleStream(dataset, sampler, collate, None if device is None else torch.device(device), prefetch)


class ParticleStream:
    """What ``stream`` returns: an epoch of batches for each ``iter``, from its beginning or from a state that was loaded."""

    def __init__(
        self, dataset: ParticleDataset, sampler: ParticleSampler, collate: Collate | None, device: torch.device | None, prefetch: int
    ) -> None:
        self.dataset, self.sampler, self.collate, self.device, self.prefetch = dataset, sampler, collate, device, prefetch
        self._state = sampler.state_dict()
        self._position = self._state["position"]  # of the particles that were handed out
        self._resume: dict[str, int] | None = None
        self._reader: _Reader | None = None
        # Kept from epoch to epoch, because fresh memory costs as much as the reading of a batch into it.
        self._ring: BufferRing | None = None
        # Host batches whose copy to the device may not be over; letting go of them gives their buffers back.
        self._copying: deque[tuple[torch.cuda.Event, ParticleBatch]] = deque()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[ParticleBatch]:
        self._stop()
        if self._resume is not None:
            self.sampler.load_state_dict(self._resume)
            self._resume = None
        self._state = self.sampler.state_dict()
        self._position, epoch = self._state["position"], self._state["epoch"]
        if self._ring is None:
            shape = (self.sampler.batch_size, self.dataset.box, self.dataset.box)
            self._ring = BufferRing(shape, self.dataset.dtype, pinned=self._cuda)
        reader = self._reader = _Reader(self.dataset, self.sampler, self.prefetch, self._ring)
        try:
            for position, batch in self._on_device(reader) if self._cuda else reader:
                finished = batch if self._cuda else self._on_host(batch)
                self._position = position
                yield finished
            if not reader.closed:
                epoch += 1
                self._state, self._position = self._state | {"epoch": epoch}, 0
        finally:
            reader.close()
            for copied, _ in self._copying:
                copied.synchronize()  # a buffer that is still being copied from must not be filled again
            self._copying.clear()
            # The reader runs ahead: whether it had come to the end of the epoch must not decide what the next one is.
            self.sampler.set_epoch(epoch)

    def close(self) -> None:
        """End a started iteration, whose thread is gone when this returns, and let go of the buffers."""
        self._stop()
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch and position after the last batch that was handed out."""
        return self._state | {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on from a state."""
        self._resume = self._state = dict(state)
        self._position = state["position"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @property
    def _cuda(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

    def _on_host(self, batch: ParticleBatch) -> ParticleBatch:
        if self.device is not None:
            batch = batch.to(self.device)
        return batch if self.collate is None else self.collate(batch)

    def _on_device(self, reader: _Reader) -> Iterator[_Placed]:
        """Copies and transforms on a stream of their own, a few batches ahead of the consumer's stream."""
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        launched: deque[tuple[int, ParticleBatch, torch.cuda.Event]] = deque()
        for read in reader:
            launched.append(self._launch(*read, side))
            while len(launched) <= _ON_DEVICE and (more := reader.ready()) is not None:
                launched.append(self._launch(*more, side))
            yield _hand_over(*launched.popleft())
        while launched:
            yield _hand_over(*launched.popleft())

    def _launch(self, position: int, held: ParticleBatch, side: torch.cuda.Stream) -> tuple[int, ParticleBatch, torch.cuda.Event]:
        assert self.device is not None
        with torch.cuda.stream(side):
            batch = held.to(self.device, non_blocking=True)
            copied = side.record_event()
            if self.collate is not None:
                batch = self.collate(batch)
            done = side.record_event()
        self._copying.append((copied, held))
        while self._copying and self._copying[0][0].query():  # type: ignore[no-untyped-call]
            self._copying.popleft()
        return position, batch, done


#: A batch, and before it the position in the epoch after it.
_Placed = tuple[int, ParticleBatch]
_READERS: weakref.WeakSet[_Reader] = weakref.WeakSet()


@atexit.register
def _close_readers() -> None:
    """A thread that is still reading while the interpreter goes down would end the program with an error."""
    for reader in list(_READERS):
        reader.close()


class _Reader:
    """Batches in the order of the sampler, read ahead by a thread while the consumer is busy.

    A batch that is not there when the consumer asks is read by the consumer itself: handing it over from a thread would take
    longer. The thread runs whenever the consumer has something else to do.
    """

    def __init__(self, dataset: ParticleDataset, sampler: ParticleSampler, ahead: int, ring: BufferRing) -> None:
        self._dataset, self._ahead, self._ring = dataset, ahead, ring
        self._steps = sampler.steps()
        self._filled: deque[_Placed] = deque()
        self._reading = threading.Lock()  # whoever holds it reads the next batch, so that they come in order
        self._error: BaseException | None = None
        self._read_seconds = 0.0
        self._busy = True  # the consumer
        self._finished = self.closed = False
        self._wake, self._ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="cryolike-reader", daemon=True)
        _READERS.add(self)
        # Asked for first, because torch sets up a thread's number when it is first needed, from a default that the reader changes.
        threads = torch.get_num_threads()
        self._thread.start()
        self._ready.wait()
        # torch keeps the number of threads per thread, but its default for threads to come was changed by the reader's.
        torch.set_num_threads(threads)

    def __iter__(self) -> Iterator[_Placed]:
        while (read := self._next()) is not None:
            if self._busy:
                self._wake.set()
            left = time.perf_counter()
            yield read
            # A consumer that finds the next batch ready is not too fast for the thread.
            self._busy = bool(self._filled) or time.perf_counter() - left > max(_BUSY_SECONDS, _BUSY_SHARE * self._read_seconds)

    def ready(self) -> _Placed | None:
        """The next batch if it has been read ahead."""
        return self._filled.popleft() if self._filled else None

    def close(self) -> None:
        """End the thread; what it has read ahead goes back to the ring."""
        self.closed = True
        self._wake.set()
        # Python may collect an abandoned iteration in any thread, this one too.
        if self._thread is threading.current_thread():
            return
        self._thread.join()
        self._steps.close()
        self._filled.clear()

    def _next(self) -> _Placed | None:
        if not self._filled:
            with self._reading:
                if not self._filled:
                    return self._read()
        return self._filled.popleft()

    def _run(self) -> None:
        # With all of them, the reader's threads and the consumer's would be twice as many as there are cores, and the OpenMP
        # runtime then puts each to sleep between any two calls.
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        self._ready.set()
        while not (self._finished or self.closed):
            self._wake.wait()
            self._wake.clear()
            while self._busy and len(self._filled) < self._ahead and not (self._finished or self.closed):
                with self._reading:
                    try:
                        read = self._read()
                    except BaseException as error:  # for the consumer, with its traceback, after the batches before it
                        self._error, self._finished = error, True
                        return
                    if read is not None:
                        self._filled.append(read)

    def _read(self) -> _Placed | None:
        """Read the next batch; None after the last. To be called with ``_reading`` held."""
        if self._error is not None:
            raise self._error
        step = None if self._finished else next(self._steps, None)
        if step is None:
            self._finished = True
            return None
        position, rows = step
        images = self._ring.lend(len(rows))
        started = time.perf_counter()
        self._dataset.read_rows(rows, images)
        self._read_seconds = time.perf_counter() - started
        return position, self._dataset.batch_of(rows, images)


def _hand_over(position: int, batch: ParticleBatch, done: torch.cuda.Event) -> _Placed:
    """Make the consumer's stream wait for the batch, and the allocator wait for the consumer's stream."""
    consumer = torch.cuda.current_stream(batch.device)
    consumer.wait_event(done)

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(consumer)
        return tensor

    return position, batch.map(hold)
