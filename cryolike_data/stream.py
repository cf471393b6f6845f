"""``stream``: the fast loader. A reader fills reused buffers ahead of the consumer; copies and transforms overlap with its work."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch

from .arguments import device_here, integer
from .batch import ParticleBatch
from .collate import Collate
from .ctf import CtfTerm
from .dataset import ParticleDataset
from .errors import ArgumentError, IterationError
from .on_device import UNITS_AHEAD, Copying, on_device
from .polar_batch import PolarCollate
from .reader import Placed, Reader
from .ring import BufferRing
from .sampler import ParticleSampler, Shuffle
from .transforms import Downsample, Normalize, PolarGrid
from .transforms.normalize import NormalizeMethod
from .unit_reader import UnitReader

#: What to do with a ``torch.utils.data.Subset``.
_SELECT = "dataset.select(subset.indices) is a data set of the particles of a Subset"


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
    polar: PolarGrid | None = None,
    unit_power: bool = False,
    ctf_terms: tuple[CtfTerm, ...] = (),
    prefetch: int = 3,
) -> ParticleStream:
    """Batches of a data set, read, copied and transformed while the consumer works on earlier ones.

    Parameters
    ----------
    dataset : the particles
    batch_size : particles per batch (default 256); with ``sampler`` it is the sampler's
    sampler : over this very data set: which particles come when; by default every one once, in order unless ``shuffle`` is given
    shuffle, seed : for the default sampler, see ``ParticleSampler``
    downsample, normalize : see ``Collate``
    device : where batches go; pixels travel in the dtype of the file
    dtype : floating dtype of the images; by default the file's where nothing is done to them, else float32
    polar : also transform the images onto this grid: batches are ``PolarBatch``
    unit_power, ctf_terms : for the transforms and the CTF, see ``PolarCollate``
    prefetch : batches that are read ahead of the consumer, at most; more are read when half of them are used up. To a GPU small batches
        go several at a time, in units of up to 32 MB, of which three at least are read ahead.

    Returns
    -------
    An iterable of ``ParticleBatch``, once over the epoch for each ``iter``; see ``ParticleStream``. Each batch is the consumer's for
    as long as any tensor of it is held: a buffer is used again only after the last of them is gone. On a GPU small batches share
    with their neighbours what came of a unit that was transformed together.

    Raises
    ------
    ArgumentError
        if arguments do not go together: a sampler over another data set, for one; or if there is no such device
    """
    if not isinstance(dataset, ParticleDataset):
        raise ArgumentError(f"stream reads a ParticleDataset, not a {type(dataset).__name__}; {_SELECT}")
    if sampler is None:
        sampler = ParticleSampler(dataset, 256 if batch_size is None else batch_size, shuffle=shuffle, seed=seed)
    elif not isinstance(sampler, ParticleSampler):
        raise ArgumentError(f"sampler is a ParticleSampler, not a {type(sampler).__name__}; a DataLoader takes any other batch_sampler")
    elif sampler.dataset is not dataset:
        raise ArgumentError(f"sampler is over another data set than the one to be read, whose rows are other particles; {_SELECT}")
    elif batch_size is not None or shuffle is not False or seed != 0:
        raise ArgumentError("batch_size, shuffle and seed are the sampler's; pass either them or sampler")
    prefetch = integer("prefetch", prefetch, least=1)
    if polar is None and (unit_power or ctf_terms):
        raise ArgumentError("unit_power and ctf_terms are for polar transforms; pass polar=PolarGrid.of_box(...) too")
    place = None if device is None else device_here(device)
    as_stored = dtype is None and downsample is None and normalize is None
    computed = torch.float32 if dtype is None else dtype
    collate: Collate | None
    if polar is None:
        collate = None if as_stored else Collate(downsample, normalize, None, computed)
    else:
        collate = PolarCollate(
            polar, downsample=downsample, normalize=normalize, dtype=computed, unit_power=unit_power, ctf_terms=ctf_terms
        )
    return ParticleStream(dataset, sampler, collate, place, prefetch)


class ParticleStream:
    """What ``stream`` returns: an epoch of batches for each ``iter``, from its beginning or from a state that was loaded.

    A stream has one iteration at a time. A new one ends the one before it, which raises an ``IterationError`` when it is asked for more;
    two loops at once are for two streams.
    """

    def __init__(
        self, dataset: ParticleDataset, sampler: ParticleSampler, collate: Collate | None, device: torch.device | None, prefetch: int
    ) -> None:
        self.dataset, self.sampler, self.collate, self.device, self.prefetch = dataset, sampler, collate, device, prefetch
        # Of what was handed out; each iteration has its own dict, so that one that was ended by another no longer moves the stream. None
        # where it is up to the sampler what comes next.
        self._state: dict[str, int] | None = None
        self._resume: dict[str, int] | None = None
        self._reader: Reader | UnitReader | None = None
        self._drawing: int | None = None  # the thread that is asking for the next batch, or ending the iteration
        # Kept from epoch to epoch, because fresh memory costs as much as the reading of a batch into it.
        self._ring: BufferRing | None = None
        self._copying = Copying()

    def __repr__(self) -> str:
        place = "" if self.device is None else f" to {self.device}"
        return f"ParticleStream({self.sampler!r}{place}, {self.prefetch} batches read ahead)"

    @property
    def batch_sampler(self) -> ParticleSampler:
        """The sampler, where trainers look for that of a ``DataLoader`` whose samples are batches."""
        return self.sampler

    def __len__(self) -> int:
        """Batches of the next iteration."""
        return len(self._resumed())

    def __iter__(self) -> Iterator[ParticleBatch]:
        # The reader runs ahead, so it draws from a sampler of its own: how far it has come must not decide which epoch is the next.
        sampler = copy.copy(self._resumed())
        self._resume = None
        state = self._state = sampler.next_state()
        self.sampler.set_epoch(state["epoch"])
        begun = self.sampler.next_state()
        left = len(sampler)
        copying = self._copying = Copying()  # its own: one that is ending may still wait for its copies when the next begins
        ring = self._ring = self._ring or self._new_ring()
        reader: Reader | UnitReader
        if self.device is not None and self._cuda:
            reader = UnitReader(self.dataset, sampler, self.prefetch, ring)
            batches = on_device(reader, self.device, self.collate, copying)
        else:
            reader = Reader(self.dataset, sampler, self.prefetch, ring)
            as_read = self.device is None and self.collate is None
            batches = iter(reader) if as_read else map(self._on_host, reader)
        self._take_over(reader)
        try:
            self._drawing = threading.get_ident()
            for position, batch in batches:
                if reader.closed:
                    break
                state["position"] = position
                left -= 1
                if not left:
                    self._move_on(state, begun)  # a loop that knows this batch to be the last asks for no more
                self._drawing = None
                yield batch
                self._drawing = threading.get_ident()
            if not reader.closed:
                self._move_on(state, begun)
                if self._state is state:
                    self._state = None
            elif self._reader not in (None, reader):
                raise IterationError("another iteration over this stream has begun, which ended this one; make a stream for each")
        finally:
            self._drawing = threading.get_ident()
            try:
                reader.close()
                for copied, _ in copying:
                    copied.synchronize()  # a buffer that is still being copied from must not be filled again
                copying.clear()
                if self._reader is reader:
                    ring.rest()
            finally:
                self._drawing = None

    def close(self) -> None:
        """End a started iteration, whose thread is gone when this returns, and let go of the buffers. From any thread.

        In a signal handler that interrupts a loop while it asks for the next batch, the iteration ends as soon as that goes on.
        """
        self._take_over(None)
        ring, self._ring = self._ring, None  # at once: another thread may be closing, too
        if ring is not None:
            ring.close()

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch and position after the last batch that was handed out; where the next iteration starts, if the last one has ended."""
        return self.sampler.next_state() if self._state is None else dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on from a state, whatever epoch the sampler is set to until then."""
        self.sampler.load_state_dict(state)
        self._resume = self._state = self.sampler.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a reader and buffers of its own: with these it would end the iteration of the stream that it was made of.
        return self.__dict__ | {"_reader": None, "_drawing": None, "_ring": None, "_copying": Copying(), "_state": copy.copy(self._state)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _take_over(self, reader: Reader | UnitReader | None) -> None:
        """Close the last reader, once another one, or none, has its place: its iteration looks who has ended it."""
        last, self._reader = self._reader, reader
        if last is not None and self._drawing == threading.get_ident():
            last.closed = True  # not now: what the interrupted call holds, the reader's thread may be waiting for
        elif last is not None:
            last.close()

    def _move_on(self, state: dict[str, int], begun: dict[str, int]) -> None:
        """Let the next epoch follow an iteration, unless another state, or from the sampler another epoch, was asked for meanwhile."""
        if self._state is state and self.sampler.next_state() == begun:
            self.sampler.set_epoch(begun["epoch"] + 1)

    def _resumed(self) -> ParticleSampler:
        """The sampler where the next iteration starts."""
        if self._resume is not None:
            self.sampler.load_state_dict(self._resume)
        return self.sampler

    def _new_ring(self) -> BufferRing:
        # What may be in use at once: read ahead, being read, held by the consumer, and being copied.
        keep = self.prefetch + 2 + UNITS_AHEAD
        box, dtype = self.dataset.box, self.dataset.dtype
        return BufferRing((box, box), dtype, pinned=self._cuda, keep=keep, seen_as=self.dataset.target)

    @property
    def _cuda(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

    def _on_host(self, read: Placed) -> Placed:
        position, batch = read
        if self.device is not None:
            batch = batch.to(self.device)
        return position, batch if self.collate is None else self.collate(batch)
