"""``ParticleSampler``: which particles make up which batch, as a pure function of (seed, epoch, position), for any number of ranks.

The order of an epoch is one sequence for the whole job. Each step takes ``batch_size`` particles per rank from it, so that the
same particles come in the same order whatever the number of ranks or workers, and a position is all there is to resume from.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import closing
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from .arguments import integer
from .errors import ArgumentError
from .lookahead import LookAhead, Step, nowhere
from .order import mix, permute

#: Rows that are drawn at a time, and batches, at most: a single batch by itself would cost several times as much.
_DRAWN_ROWS, _DRAWN_BATCHES = 1 << 14, 1 << 8
#: With shuffle="blocks": neighbouring rows read together, and how many such blocks are mixed with each other.
BLOCK_ROWS = 64
WINDOW_BLOCKS = 64

Shuffle = Literal["blocks"] | bool


class ParticleSampler(Sampler[list[int]]):
    """A ``batch_sampler`` for any ``DataLoader``, and for ``stream``.

    Parameters
    ----------
    dataset : what is sampled; a ``ParticleDataset`` also has the pages of the next batches asked for ahead of time
    batch_size : particles per rank and step
    shuffle : True for a random order; "blocks" for disks that seek and network file systems: runs of neighbouring rows in random
        order, mixed over a window of runs; False for the order of the table
    seed : of the order; every epoch has its own
    drop_last : leave out the particles that do not make a full batch for every rank, so that all ranks take as many steps
    rank, world_size : this process among those that share the epoch; by default as ``torch.distributed`` says
    lookahead : batches whose pages are asked for ahead of the one that is handed out; 0 for none

    Every particle comes exactly once over all ranks. Nothing is repeated to fill up: without ``drop_last`` the last step is
    shared out evenly, so that a rank may get a smaller batch, or none, in it.

    After the last batch of an epoch the sampler moves on to the next epoch by itself; ``set_epoch`` overrides. What
    counts is what was drawn: workers of a ``DataLoader`` draw ahead, so that the loop after one that was broken off near its end may be
    over the next epoch. Call ``set_epoch`` before each loop where that matters.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        shuffle: Shuffle = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        lookahead: int = 4,
    ) -> None:
        if isinstance(dataset, Sampler):
            raise ArgumentError(f"dataset is what is sampled, not a {type(dataset).__name__}; for some rows pass dataset.select(rows)")
        batch_size, seed = integer("batch_size", batch_size, least=1), integer("seed", seed)
        if not (isinstance(shuffle, bool) or shuffle == "blocks"):
            raise ArgumentError(f'shuffle is True, False or "blocks", not {shuffle!r}')
        self.rank, self.world_size = place_among_ranks(rank, world_size)
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        # Lightning makes a sampler that shows a batch_size and a drop_last anew, with these alone: other particles, in another order.
        self._drop_last = drop_last
        self.lookahead = integer("lookahead", lookahead, least=0)
        self.epoch = 0
        self._start = self._position = 0
        self._begun = (0, 0)  # epoch and first position of the iteration that began last

    def __len__(self) -> int:
        """Batches that this rank still gets in the epoch that starts with the next iteration."""
        return self.left_after(self._start)

    def __repr__(self) -> str:
        order = "in blocks" if self.shuffle == "blocks" else "shuffled" if self.shuffle else "in order"
        rank = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        start = f" from position {self._start}" if self._start else ""
        return f"ParticleSampler({self._n:,} particles {order}, {self.batch_size} a batch{rank}; next is epoch {self.epoch}{start})"

    def __iter__(self) -> Iterator[list[int]]:
        begun = self._begun = self._next()
        self.epoch, self._position = begun
        self._start = 0
        with closing(self._steps(*begun, nowhere)) as runs:
            for position, rows, _ in chain.from_iterable(runs):
                if self._begun is begun:
                    self._position = position
                yield rows.tolist()
        if self._begun is begun:  # and no other iteration has begun, nor was another epoch or state asked for
            self.epoch += 1
            self._position = 0

    def steps(self, places: Callable[[np.ndarray], Iterable[Tensor | None]] = nowhere) -> Generator[list[Step], None, None]:
        """The batches of the next iteration as arrays, several at a time; the sampler stays where it is.

        Parameters
        ----------
        places : says of some batches of rows, (batches, size), where the images of each lie
        """
        return self._steps(*self._next(), places)

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration with the given epoch, from its beginning."""
        self.epoch, self._start, self._position = integer("epoch", epoch), 0, 0
        self._begun = (self.epoch, 0)

    def state_dict(self, *, step: int | None = None) -> dict[str, int]:
        """Where the job stands: ``seed``, ``epoch`` and ``position`` (particles that all ranks together have taken of the epoch).

        A state that is taken after the last batch, in a loop that has not asked for more, has nothing left of its epoch: a loop that
        resumes there is empty, and the one after it is over the next epoch.

        Parameters
        ----------
        step : batches of this epoch that were used, for a loader that draws ahead of what it hands out; default: all drawn
        """
        if step is None:
            return {"seed": self.seed, "epoch": self.epoch, "position": self._position}
        epoch, start = self._begun
        return {"seed": self.seed, "epoch": epoch, "position": min(self._n, start + integer("step", step, least=0) * self._stride)}

    def next_state(self) -> dict[str, int]:
        """The state in which the next iteration starts: that of ``load_state_dict``, or the beginning of an epoch."""
        epoch, position = self._next()
        return {"seed": self.seed, "epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state, at any number of ranks and any batch size."""
        missing = [name for name in ("seed", "epoch", "position") if name not in state]
        if missing:
            raise ArgumentError(f"a state has a seed, an epoch and a position, and there is no {' and no '.join(missing)} in {state!r}")
        seed, epoch, position = (integer(name, state[name]) for name in ("seed", "epoch", "position"))
        if not 0 <= position <= self._n:
            raise ArgumentError(f"position {position} is not one of a data set of {self._n} particles; is the state of another data set?")
        self.seed, self.epoch = seed, epoch
        self._start = self._position = position
        self._begun = (epoch, position)

    def rows(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """The rows at given positions (from 0) of the order of an epoch, int64."""
        key = mix(self.seed, epoch)
        if self.shuffle is False:
            return positions.astype(np.int64)
        return permute(positions, self._n, key) if self.shuffle is True else _block_order(positions, self._n, key)

    def left_after(self, position: int) -> int:
        """Batches that this rank still gets in an epoch after a position in it."""
        left = 0 if self._drop_last else (self._n - position) % self._stride
        own = left * (self.rank + 1) // self.world_size - left * self.rank // self.world_size
        return (self._n - position) // self._stride + (own > 0)

    def _next(self) -> tuple[int, int]:
        """Epoch and position at which the next iteration starts."""
        # The last batch may have gone to a loop that knew it was the last and asked for no more.
        ended = self._start == 0 < self._position and not self.left_after(self._position)
        return (self.epoch + 1, 0) if ended else (self.epoch, self._start)

    @property
    def _n(self) -> int:
        return len(self.dataset)

    @property
    def _stride(self) -> int:
        return self.batch_size * self.world_size

    def _steps(self, epoch: int, start: int, places: Callable[[np.ndarray], Iterable[Tensor | None]]) -> Generator[list[Step], None, None]:
        drawn = (list(zip(positions, rows, places(rows), strict=True)) for positions, rows in self._draw(epoch, start))
        with LookAhead.over(self.dataset, self.lookahead) as ahead:
            yield from ahead.pass_on(drawn)

    def _draw(self, epoch: int, start: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """The batches of an epoch from a position on, many at a time: the position after each, and (batches, size) rows."""
        n, stride = self._n, self._stride
        own = self.rank * self.batch_size + np.arange(min(self.batch_size, n))  # a larger batch is never full
        per_draw = max(1, min(_DRAWN_ROWS // self.batch_size, _DRAWN_BATCHES))
        left = (n - start) % stride
        for first in range(start, n - left, per_draw * stride):
            steps = np.arange(first, min(first + per_draw * stride, n - left), stride)
            yield (steps + stride).tolist(), self.rows(steps[:, None] + own, epoch)
        first, last = (n - left + left * r // self.world_size for r in (self.rank, self.rank + 1))
        if last > first and not self._drop_last:
            yield [n], self.rows(np.arange(first, last)[None], epoch)


def place_among_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks, by default as ``torch.distributed`` says."""
    distributed: Any = torch.distributed
    if rank is None and world_size is None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank()), int(distributed.get_world_size())
    if (rank is None) != (world_size is None):
        raise ArgumentError(f"rank={rank} and world_size={world_size}: pass both, or neither to take them from torch.distributed")
    rank, world_size = integer("rank", 0 if rank is None else rank), integer("world_size", 1 if world_size is None else world_size)
    if not 0 <= rank < world_size:
        raise ArgumentError(f"rank {rank} is not one of {world_size} ranks (0 to {world_size - 1})")
    return rank, world_size


def _block_order(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Rows in an order in which whole blocks of neighbours are permuted, and single rows only within a window of blocks."""
    n_blocks = n // BLOCK_ROWS
    whole = n_blocks * BLOCK_ROWS
    rows = positions.astype(np.int64)
    window = rows // (BLOCK_ROWS * WINDOW_BLOCKS)
    for number in np.unique(window).tolist():
        inside = window == number
        first = number * BLOCK_ROWS * WINDOW_BLOCKS
        length = min(BLOCK_ROWS * WINDOW_BLOCKS, n - first)
        rows[inside] = first + permute(rows[inside] - first, length, mix(key, number, 1))
    blocked = rows < whole
    block = permute(rows[blocked] // BLOCK_ROWS, n_blocks, mix(key, 2))
    rows[blocked] = block * BLOCK_ROWS + rows[blocked] % BLOCK_ROWS
    return rows
