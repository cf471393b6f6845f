"""Permutations as arithmetic: bijective for every length, the same element by element, and even."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from cryolike_data.order import mix, permute

KEYS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 3000), key=KEYS)
@example(n=1, key=0)
@example(n=2, key=0)
@example(n=3, key=2**64 - 1)
@example(n=4, key=1)
@example(n=5, key=1)
@example(n=1024, key=7)
@example(n=1025, key=7)
def test_every_number_comes_exactly_once(n: int, key: int) -> None:
    np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 2**62), key=KEYS, fractions=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
def test_an_element_does_not_depend_on_the_others_asked_for(n: int, key: int, fractions: list[float]) -> None:
    index = np.array([min(n - 1, int(f * n)) for f in fractions], np.int64)
    together = permute(index, n, key)
    assert together.tolist() == [int(permute(np.array([i]), n, key)[0]) for i in index.tolist()]
    assert ((together >= 0) & (together < n)).all()


def test_the_shape_of_the_index_is_kept_and_the_index_unchanged() -> None:
    index = np.arange(12, dtype=np.int32).reshape(3, 4)
    out = permute(index, 12, 5)
    assert (out.shape, out.dtype) == ((3, 4), np.int64)
    np.testing.assert_array_equal(index.ravel(), np.arange(12))
    assert permute(np.array(3), 12, 5) == out[0, 3]


def test_no_element_of_nothing() -> None:
    assert permute(np.arange(0), 0, 1).tolist() == []


@pytest.mark.parametrize("n", [10**8, 2**40, 2**40 + 1])
def test_the_first_elements_of_a_long_permutation_take_no_memory(n: int) -> None:
    tracemalloc.start()
    try:
        first = permute(np.arange(256), n, 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(np.unique(first)) == 256
    assert first.max() < n
    assert first.max() > n // 2
    assert peak < 1 << 20


def test_permutations_of_many_keys_take_no_more_memory_than_those_of_a_few() -> None:
    tracemalloc.start()
    try:
        for key in range(100):
            permute(np.arange(2), 10**8, key)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_keys_that_differ_in_one_bit_give_other_permutations() -> None:
    orders = {tuple(permute(np.arange(50), 50, 1 << bit).tolist()) for bit in range(64)}
    assert len(orders) == 64


def test_all_permutations_of_four_are_about_as_frequent() -> None:
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for seed in range(4800):
        counts[tuple(permute(np.arange(4), 4, mix(seed, 0)).tolist())] += 1
    assert chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("position", [0, 1, 999])
def test_every_row_is_about_as_often_at_a_given_position(position: int) -> None:
    drawn = [int(permute(np.array([position]), 1000, mix(seed, 0))[0]) for seed in range(6000)]
    assert chisquare(np.bincount(np.array(drawn) // 20, minlength=50)).pvalue > 1e-3


def test_neighbours_do_not_stay_together() -> None:
    steps = np.diff(permute(np.arange(10_000), 10_000, 9))
    assert (np.abs(steps) == 1).sum() < 20
    # The mean distance of two random places is a third of the length.
    assert abs(np.abs(steps).mean() - 10_000 / 3) < 200


def test_epochs_of_one_seed_are_not_alike() -> None:
    first, second = (permute(np.arange(10_000), 10_000, mix(0, epoch)) for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_a_key_is_what_others_get_from_the_same_generator() -> None:
    assert mix(0) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from the seed 0, wherever it is published


@pytest.mark.parametrize(
    ("n", "key", "first"),
    [
        (10, 1, [2, 8, 3, 6, 5, 4, 9, 7, 0, 1]),
        (10**8, 3, [32790780, 53809715, 91235125]),
        (2**40 + 1, 7, [396363391687, 856064080711, 576193408974]),
    ],
)
def test_a_job_that_was_stopped_finds_its_order_again_in_later_versions(n: int, key: int, first: list[int]) -> None:
    # Worked out number by number with Python's integers. Another order would repeat some particles of the epoch and lose others.
    assert permute(np.arange(len(first)), n, key).tolist() == first


def test_a_key_mixes_all_its_numbers_in_order() -> None:
    keys = [mix(0), mix(0, 0), mix(0, 1), mix(1, 0), mix(1, 1), mix(-1, 0), mix(2**63, 0), mix(1, 0, 1)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
