"""Reading many files: in order and with every problem of all, in one thread where they come at once and in several where not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from cryolike_data.errors import StackError
from cryolike_data.read_each import read_each


def reading(threads: set[int], is_slow: Callable[[int], bool]) -> Callable[[int], int]:
    def read(number: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.002 if is_slow(number) else 0)
        if number % 1000 == 999:
            raise OSError(f"file {number} is broken")
        return 2 * number

    return read


@pytest.mark.parametrize("count", [0, 1, 8, 9, 40, 998])
@pytest.mark.parametrize("is_slow", [lambda number: False, lambda number: number < 20, lambda number: number > 30])
def test_results_come_in_order(count: int, is_slow: Callable[[int], bool]) -> None:
    assert read_each(range(count), reading(set(), is_slow), "files") == list(range(0, 2 * count, 2))


def test_files_that_come_slowly_are_read_several_at_a_time() -> None:
    threads: set[int] = set()
    seen: list[int] = []
    read = reading(threads, lambda number: True)
    read_each(range(100), lambda number: (seen.append(number), read(number)), "files")
    assert len(threads) > 2
    assert sorted(seen) == list(range(100))


@pytest.mark.parametrize("slow", [0, 20])
def test_files_in_memory_are_read_by_one_thread_after_slow_ones_too(slow: int) -> None:
    last: set[int] = set()

    def read(number: int) -> None:
        if number < slow:
            time.sleep(0.002)
        if number >= 2000:
            last.add(threading.get_ident())

    for _ in range(20):  # a busy machine may make others look slow
        last.clear()
        read_each(range(2990), read, "files")
        if len(last) == 1:
            break
    assert last == {threading.get_ident()}


@pytest.mark.parametrize("is_slow", [lambda number: False, lambda number: True])
def test_every_problem_is_told(is_slow: Callable[[int], bool]) -> None:
    with pytest.raises(StackError) as caught:
        read_each([999, 0, 1999, *range(30)], reading(set(), is_slow), "files", amiss=lambda number, _: "another" * (number == 1))
    assert str(caught.value).splitlines() == [
        "3 of 33 files cannot be read:",
        "  file 999 is broken",
        "  another",
        "  file 1999 is broken",
    ]
