"""``ParticleSampler``: the order as a function of seed, epoch and position, shared out over ranks and taken up again anywhere."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Sized
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run_python, same_batch, write_particles
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler

from cryolike_data import IndexedDataset
from cryolike_data.errors import ArgumentError, CryolikeDataError
from cryolike_data.sampler import BLOCK_ROWS, WINDOW_BLOCKS, ParticleSampler

SHUFFLES: list[Any] = [True, False, "blocks"]
WORLDS = st.sampled_from([1, 2, 3, 8])


class Rows(Sized):
    """A data set that is nothing but its length."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n


def ranks(n: int, batch_size: int, world_size: int, **options: Any) -> list[ParticleSampler]:
    return [ParticleSampler(Rows(n), batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def step_by_step(samplers: list[ParticleSampler]) -> list[int]:
    """All rows of an epoch: those of rank 0's first batch, of rank 1's first batch, ..., of rank 0's second batch, ..."""
    taken = [list(sampler) for sampler in samplers]
    steps = max(map(len, taken), default=0)
    return [row for step in range(steps) for batches in taken if step < len(batches) for row in batches[step]]


JOBS = {
    "n": st.integers(0, 700),
    "batch_size": st.integers(1, 90),
    "world_size": WORLDS,
    "shuffle": st.sampled_from(SHUFFLES),
    "seed": st.integers(0, 2**40),
}


@settings(deadline=None, max_examples=80)
@given(**JOBS)
def test_every_particle_comes_exactly_once_over_all_ranks(n: int, batch_size: int, world_size: int, shuffle: Any, seed: int) -> None:
    samplers = ranks(n, batch_size, world_size, shuffle=shuffle, seed=seed)
    assert sorted(row for sampler in samplers for batch in sampler for row in batch) == list(range(n))


@settings(deadline=None, max_examples=80)
@given(**JOBS)
def test_drop_last_evens_the_ranks_and_leaves_out_less_than_a_step(
    n: int, batch_size: int, world_size: int, shuffle: Any, seed: int
) -> None:
    taken = [list(sampler) for sampler in ranks(n, batch_size, world_size, shuffle=shuffle, seed=seed, drop_last=True)]
    assert {len(batch) for batches in taken for batch in batches} <= {batch_size}
    assert len({len(batches) for batches in taken}) == 1
    rows = [row for batches in taken for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)
    assert 0 <= n - len(rows) < batch_size * world_size


@settings(deadline=None, max_examples=80)
@given(**JOBS, epoch=st.integers(0, 5))
def test_the_global_order_is_that_of_the_positions_whatever_the_world(
    n: int, batch_size: int, world_size: int, shuffle: Any, seed: int, epoch: int
) -> None:
    samplers = ranks(n, batch_size, world_size, shuffle=shuffle, seed=seed)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    assert step_by_step(samplers) == samplers[0].rows(np.arange(n), epoch).tolist()


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_as_many_particles_per_step_are_the_same_particles_in_every_world(shuffle: Any) -> None:
    orders = [step_by_step(ranks(1000, 24 // world, world, shuffle=shuffle, seed=3)) for world in (1, 2, 3, 8)]
    assert all(order == orders[0] for order in orders)


@settings(deadline=None, max_examples=80)
@given(**JOBS, drop_last=st.booleans(), start=st.floats(0, 1))
def test_the_length_is_the_number_of_batches_of_each_rank(
    n: int, batch_size: int, world_size: int, shuffle: Any, seed: int, drop_last: bool, start: float
) -> None:
    for sampler in ranks(n, batch_size, world_size, shuffle=shuffle, seed=seed, drop_last=drop_last):
        assert len(sampler) == len(list(sampler))
        sampler.load_state_dict({"seed": seed, "epoch": 0, "position": int(start * n)})
        assert len(sampler) == len(list(sampler))


@settings(deadline=None, max_examples=80)
@given(**JOBS, other_batch=st.integers(1, 90), other_world=WORLDS, stop=st.integers(0, 60), epoch=st.integers(0, 3))
def test_a_job_that_was_stopped_goes_on_at_any_other_size_with_what_was_left(
    n: int, batch_size: int, world_size: int, shuffle: Any, seed: int, other_batch: int, other_world: int, stop: int, epoch: int
) -> None:
    before = ranks(n, batch_size, world_size, shuffle=shuffle, seed=seed)
    taken, states = [], []
    for sampler in before:
        sampler.set_epoch(epoch)
        # Every rank stops after the same number of whole steps.
        steps = min(stop, n // (batch_size * world_size))
        drawn = iter(sampler)
        taken += [row for _ in range(steps) for row in next(drawn)]
        states.append(sampler.state_dict())
    assert all(state == states[0] for state in states)
    after = ranks(n, other_batch, other_world, shuffle=shuffle, seed=seed + 1)
    for sampler in after:
        sampler.load_state_dict(states[0])
    rest = step_by_step(after)
    assert rest == before[0].rows(np.arange(len(taken), n), epoch).tolist()
    assert sorted(taken + rest) == list(range(n))


def test_the_state_is_three_integers() -> None:
    sampler = ParticleSampler(Rows(20), 4, seed=5)
    next(iter(sampler))
    state = sampler.state_dict()
    assert state == {"seed": 5, "epoch": 0, "position": 4}
    assert {type(value) for value in state.values()} == {int}


def test_resuming_works_out_nothing_of_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ParticleSampler(Rows(10**9), 256)
    asked: list[np.ndarray] = []
    rows = sampler.rows
    monkeypatch.setattr(sampler, "rows", lambda positions, epoch: asked.append(positions) or rows(positions, epoch))
    sampler.load_state_dict({"seed": 0, "epoch": 2, "position": 999_000_000})
    next(iter(sampler))
    assert asked[0].min() == 999_000_000
    assert sum(positions.size for positions in asked) < 1 << 15


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 256), (64, 256), (256, 64), (1 << 15, 1)])
def test_no_more_is_drawn_at_a_time_than_is_soon_used(monkeypatch: pytest.MonkeyPatch, batch_size: int, batches: int) -> None:
    sampler = ParticleSampler(Rows(10**9), batch_size)
    asked: list[tuple[int, ...]] = []
    rows = sampler.rows
    monkeypatch.setattr(sampler, "rows", lambda positions, epoch: asked.append(positions.shape) or rows(positions, epoch))
    next(iter(sampler))
    assert asked == [(batches, batch_size)]


def test_the_state_after_the_last_batch_leaves_nothing_and_then_the_next_epoch() -> None:
    sampler = ParticleSampler(Rows(10), 4)
    states = [sampler.state_dict() for _ in sampler]
    other = ParticleSampler(Rows(10), 3)
    other.load_state_dict(states[-1])
    assert (len(other), list(other), other.epoch) == (0, [], 1)


@pytest.mark.parametrize("shuffle", [True, "blocks"])
def test_epochs_differ_and_can_be_drawn_again(shuffle: Any) -> None:
    sampler = ParticleSampler(Rows(300), 7, shuffle=shuffle)
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.set_epoch(1)
    assert list(sampler) == second
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_the_epoch_moves_on_after_the_last_batch() -> None:
    sampler = ParticleSampler(Rows(30), 7)
    list(sampler)
    assert sampler.state_dict() == {"seed": 0, "epoch": 1, "position": 0}


def test_ranks_that_get_no_batch_move_on_with_the_others() -> None:
    samplers = ranks(1, 4, 3)
    assert [list(sampler) for sampler in samplers for _ in range(2)] == [[], [], [], [], [[0]], [[0]]]
    assert [sampler.state_dict() for sampler in samplers] == 3 * [{"seed": 0, "epoch": 2, "position": 0}]


def test_a_loop_that_fails_before_its_first_batch_is_where_it_was_resumed() -> None:
    class Fails(ParticleSampler):
        def rows(self, positions: np.ndarray, epoch: int) -> np.ndarray:
            raise MemoryError

    sampler = Fails(Rows(30), 7)
    sampler.load_state_dict({"seed": 0, "epoch": 4, "position": 21})
    with pytest.raises(MemoryError):
        list(sampler)
    assert sampler.state_dict() == {"seed": 0, "epoch": 4, "position": 21}


def test_the_epoch_after_one_that_was_resumed_is_whole() -> None:
    sampler = ParticleSampler(Rows(30), 7)
    sampler.load_state_dict({"seed": 0, "epoch": 4, "position": 21})
    assert sum(map(len, sampler)) == 9
    assert sampler.state_dict() == {"seed": 0, "epoch": 5, "position": 0}
    assert sorted(row for batch in sampler for row in batch) == list(range(30))


def test_an_iteration_that_was_broken_off_starts_the_same_epoch_again() -> None:
    sampler = ParticleSampler(Rows(30), 7)
    whole = list(copy.copy(sampler))
    for _ in sampler:
        break
    assert list(sampler) == whole


def test_an_iteration_that_another_one_over_the_same_epoch_followed_moves_nothing() -> None:
    sampler = ParticleSampler(Rows(30), 7)
    kept = iter(sampler)
    next(kept)
    second = iter(sampler)
    next(second)
    next(kept)
    next(kept)
    assert sampler.state_dict()["position"] == 7
    list(second)
    list(kept)
    assert sampler.state_dict() == {"seed": 0, "epoch": 1, "position": 0}


def test_set_epoch_in_the_loop_is_for_the_next_loop() -> None:
    sampler = ParticleSampler(Rows(30), 7)
    for _ in sampler:
        sampler.set_epoch(5)
    assert [row for rows in sampler for row in rows] == sampler.rows(np.arange(30), 5).tolist()


def test_a_state_that_is_loaded_in_the_loop_is_for_the_next_loop() -> None:
    sampler = ParticleSampler(Rows(30), 7)
    for k, _ in enumerate(sampler):
        if k == 1:
            sampler.load_state_dict({"seed": 0, "epoch": 5, "position": 21})
    assert sampler.state_dict() == {"seed": 0, "epoch": 5, "position": 21}
    assert [row for rows in sampler for row in rows] == sampler.rows(np.arange(21, 30), 5).tolist()


def test_a_state_after_the_epoch_was_set_is_the_beginning_of_that_epoch() -> None:
    sampler = ParticleSampler(Rows(30), 7)
    for _ in sampler:
        break
    sampler.set_epoch(3)
    assert sampler.state_dict() == sampler.state_dict(step=0) == {"seed": 0, "epoch": 3, "position": 0}


@pytest.mark.parametrize("kind", [np.int64, np.uint32])
def test_integers_of_numpy_give_the_same_order_and_state(kind: Any) -> None:
    sampler = ParticleSampler(Rows(30), kind(7), seed=kind(3))
    states = [sampler.state_dict() for _ in sampler]
    assert {type(value) for state in states for value in state.values()} == {int}
    sampler.set_epoch(kind(0))
    assert list(sampler) == list(ParticleSampler(Rows(30), 7, seed=3))


@pytest.mark.parametrize("name", ["batch_size", "seed"])
def test_what_is_no_whole_number_is_named(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"{name} is a whole number, not 2\.5"):
        ParticleSampler(Rows(30), **{"batch_size": 7, name: 2.5})


def test_seeds_and_epochs_give_other_orders() -> None:
    first = np.arange(8)
    samplers = [ParticleSampler(Rows(500), 8, seed=seed) for seed in range(50)]
    assert len({tuple(sampler.rows(first, epoch).tolist()) for sampler in samplers for epoch in range(4)}) == 200


def test_without_shuffle_the_order_is_that_of_the_table() -> None:
    assert list(ParticleSampler(Rows(5), 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("shuffle", [1, 0, np.True_, np.False_])
def test_shuffle_means_the_same_for_anything_that_equals_true_or_false(shuffle: Any) -> None:
    try:
        sampler = ParticleSampler(Rows(50), 8, shuffle=shuffle)
    except ArgumentError:
        return
    assert list(sampler) == list(ParticleSampler(Rows(50), 8, shuffle=bool(shuffle)))


@pytest.mark.parametrize("n", [1, 63, 64, 65, BLOCK_ROWS * WINDOW_BLOCKS + 1, 20_000])
def test_blocks_are_a_permutation_in_every_epoch(n: int) -> None:
    sampler = ParticleSampler(Rows(n), 50, shuffle="blocks")
    orders = [np.concatenate(list(sampler)) for _ in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    assert n == 1 or not np.array_equal(orders[0], orders[1])


def test_rows_that_come_close_together_lie_in_few_blocks() -> None:
    window = BLOCK_ROWS * WINDOW_BLOCKS
    order = np.concatenate(list(ParticleSampler(Rows(20 * window), 256, shuffle="blocks")))
    for part in np.split(order, 20):
        assert len(np.unique(part // BLOCK_ROWS)) == WINDOW_BLOCKS
    assert len(np.unique(order[:256])) == 256
    # Blocks of a window come from everywhere, and rows within it in no order.
    assert np.ptp(order[:window]) > 10 * window
    assert (np.diff(order[:window]) == 1).sum() < 10
    assert len({tuple(part % BLOCK_ROWS) for part in np.split(order, 20)}) == 20  # nor in that of another window


def test_the_first_batch_of_a_hundred_million_particles_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        for shuffle in SHUFFLES:
            assert len(next(iter(ParticleSampler(Rows(10**8), 256, shuffle=shuffle)))) == 256
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_batch_size_far_beyond_the_data_set_takes_little_memory() -> None:
    sampler = ParticleSampler(Rows(30), 10**8)
    tracemalloc.start()
    try:
        (rows,) = sampler
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(rows) == list(range(30))
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": -3},
        {"lookahead": -1},
        {"lookahead": "4"},
        {"shuffle": "random"},
        {"shuffle": None},
        {"rank": 2, "world_size": 2},
        {"rank": -1, "world_size": 2},
        {"rank": 0, "world_size": 0},
        {"rank": "0", "world_size": "2"},
        {"rank": 1},
        {"rank": 0},
        {"world_size": 4},
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        ParticleSampler(Rows(10), **({"batch_size": 2} | options))


@pytest.mark.parametrize("sampler", [SubsetRandomSampler([7, 9]), DistributedSampler(Rows(30), num_replicas=2, rank=1)])
def test_another_sampler_in_the_place_of_the_data_set_is_an_error(sampler: Any) -> None:
    with pytest.raises(ArgumentError, match=type(sampler).__name__):
        ParticleSampler(sampler, 4)


def test_trainers_do_not_take_it_for_a_sampler_that_they_can_make_anew(dataset: IndexedDataset) -> None:
    # Lightning's test of it, before it predicts and where ranks share an epoch.
    sampler = DataLoader(dataset, batch_sampler=ParticleSampler(dataset, 4, shuffle=False)).batch_sampler
    assert not (hasattr(sampler, "batch_size") and hasattr(sampler, "drop_last"))


@pytest.mark.parametrize("position", [-1, 21])
def test_a_position_outside_the_data_set_is_an_error(position: int) -> None:
    sampler = ParticleSampler(Rows(20), 4)
    with pytest.raises(CryolikeDataError):
        sampler.load_state_dict({"seed": 0, "epoch": 0, "position": position})


def test_half_an_epoch_and_steps_before_the_first_are_errors() -> None:
    sampler = ParticleSampler(Rows(20), 4)
    with pytest.raises(ArgumentError, match=r"epoch is a whole number, not 1\.5"):
        sampler.set_epoch(1.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="step is at least 0, not -1"):
        sampler.state_dict(step=-1)
    state = {"seed": 1, "epoch": 2, "position": 4}
    for name in state:
        with pytest.raises(ArgumentError, match=rf"{name} is a whole number, not 2\.9"):
            sampler.load_state_dict(state | {name: 2.9})  # type: ignore[dict-item]
    assert sampler.state_dict() == {"seed": 0, "epoch": 0, "position": 0}


@pytest.mark.parametrize("state", [{}, {"seed": 1, "epoch": 2}, {"position": 4}], ids=str)
def test_a_state_that_lacks_something_is_an_error_that_names_it_and_changes_nothing(state: dict[str, int]) -> None:
    sampler = ParticleSampler(Rows(20), 4)
    with pytest.raises(ArgumentError) as caught:
        sampler.load_state_dict(state)
    assert all((f"no {name}" in str(caught.value)) == (name not in state) for name in ("seed", "epoch", "position"))
    assert sampler.state_dict() == {"seed": 0, "epoch": 0, "position": 0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    return IndexedDataset(write_particles(tmp_path_factory.mktemp("data"), 40, stacks=3)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_order_of_the_sampler_with_any_number_of_workers(dataset: IndexedDataset, workers: int) -> None:
    sampler = ParticleSampler(dataset, 6, rank=1, world_size=2, seed=4)
    expected = list(copy.copy(sampler))
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    assert len(loader) == len(expected)
    for batch, rows in zip(loader, expected, strict=True):
        same_batch(batch, dataset.batch(rows))


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"rank": 0, "world_size": 3}, {"rank": 2, "world_size": 3}], ids=str)
def test_a_loop_that_asks_for_no_more_than_the_last_batch_is_followed_by_the_next_epoch(dataset: IndexedDataset, options: Any) -> None:
    expected, sampler = (ParticleSampler(dataset, 6, **options) for _ in range(2))
    loader = DataLoader(dataset, batch_sampler=sampler)
    kept = []  # as trainers keep the iterator of an epoch into the next one
    for _ in range(3):
        kept.append(iter(loader))
        batches = [next(kept[-1]) for _ in range(len(loader))]  # Lightning's loop, for one, stops at the length
        assert [batch.index.tolist() for batch in batches] == list(expected)
    assert list(kept[0]) == []
    assert list(sampler) == list(expected)


def test_a_loader_that_draws_ahead_tells_its_steps_for_the_state(dataset: IndexedDataset) -> None:
    sampler = ParticleSampler(dataset, 6)
    drawn = iter(sampler)
    for _ in range(4):
        next(drawn)
    assert sampler.state_dict(step=2) == {"seed": 0, "epoch": 0, "position": 12}


def test_the_state_at_a_step_is_of_the_epoch_of_the_step_when_a_loader_has_drawn_all_of_it(dataset: IndexedDataset) -> None:
    sampler = ParticleSampler(dataset, 10)
    # A loader with 2 workers draws all 4 batches of the epoch before it hands out the first.
    assert len(list(sampler)) == 4
    assert sampler.state_dict(step=1) == {"seed": 0, "epoch": 0, "position": 10}


def test_steps_after_a_resume_count_from_where_it_resumed(dataset: IndexedDataset) -> None:
    sampler = ParticleSampler(dataset, 6)
    sampler.load_state_dict({"seed": 0, "epoch": 0, "position": 10})
    drawn = iter(sampler)
    for _ in range(3):
        next(drawn)
    assert sampler.state_dict(step=1)["position"] == 16


def test_a_step_takes_a_batch_for_each_rank_and_the_last_one_what_is_left(dataset: IndexedDataset) -> None:
    sampler = ParticleSampler(dataset, 6, rank=1, world_size=2)
    sampler.load_state_dict({"seed": 0, "epoch": 2, "position": 10})
    states = [sampler.state_dict(step=step) for step in range(4)]
    assert states == [{"seed": 0, "epoch": 2, "position": position} for position in (10, 22, 34, len(dataset))]


DISTRIBUTED = """
    import sys
    import torch.distributed as dist
    from cryolike_data.sampler import ParticleSampler
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        sampler = ParticleSampler(range(20), 3, seed=1)
        print(sampler.rank, sampler.world_size, list(sampler))
        print(list(ParticleSampler(range(20), 3, seed=1, rank=2, world_size=3)))
    finally:
        dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_the_ranks_are_those_of_torch_distributed_unless_others_are_passed(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda rank: run_python(DISTRIBUTED, rank, tmp_path / "store"), range(2)))
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    given = list(ranks(20, 3, 3, seed=1)[2])
    expected = [f"{s.rank} {s.world_size} {list(s)}\n{given}" for s in ranks(20, 3, 2, seed=1)]
    assert [run.stdout.strip() for run in runs] == expected
