"""Reading something of each of many files, several at a time where they come slowly, with every problem of all in one error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import CryolikeDataError, StackError

#: Files that are read at the same time where it takes long to wait for each: so many seconds, at least. Where files are in memory,
#: threads are slower than one, as they hand the interpreter lock to each other twice a file.
_THREADS, _SLOW = 8, 2e-4
#: Files that are read one after the other, to see how long they take, and that threads then share out.
_ALONE, _SHARED = 8, 1024

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def read_each(
    items: Sequence[ItemT], read: Callable[[ItemT], ResultT], what: str, *, amiss: Callable[[int, ResultT], str] = lambda number, result: ""
) -> list[ResultT]:
    """What ``read`` gives for each of many files, in order; ``what`` they are is for the error.

    ``amiss`` says what is wrong with the result of file ``number``, if anything is. It is asked only if another file cannot be read:
    the caller looks at the results too, but would come to that only after the others have been mended.

    Raises
    ------
    StackError
        listing every file for which ``read`` raises
    """

    def result_or_error(item: ItemT) -> ResultT | CryolikeDataError | OSError:
        try:
            return read(item)
        except (CryolikeDataError, OSError) as error:
            return error

    results: list[Any] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        while len(results) < len(items):
            start = time.perf_counter()
            results += map(result_or_error, items[len(results) : len(results) + _ALONE])
            if time.perf_counter() - start > _ALONE * _SLOW:
                several = items[len(results) : len(results) + _SHARED]
                # In a few portions, because handing a task to a thread takes as long as reading a header.
                portions = [several[k::_THREADS] for k in range(_THREADS)]
                shared: list[Any] = [None] * len(several)
                for k, found in enumerate(pool.map(lambda portion: list(map(result_or_error, portion)), portions)):
                    shared[k::_THREADS] = found
                results += shared
    if any(isinstance(result, Exception) for result in results):
        told = [str(result) if isinstance(result, Exception) else amiss(number, result) for number, result in enumerate(results)]
        errors = [text for text in told if text]
        raise StackError("\n".join([f"{len(errors)} of {len(items)} {what} cannot be read:", *(f"  {text}" for text in errors)]))
    return results
