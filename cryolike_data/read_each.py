"""Reading something of each of many files, several at a time, with every problem of all of them in one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import CryolikeDataError, StackError

#: Files that are read at the same time: what takes long is to wait for each.
_THREADS = 8

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def read_each(
    items: Sequence[ItemT], read: Callable[[ItemT], ResultT], what: str, *, amiss: Callable[[int, ResultT], str] = lambda number, result: ""
) -> list[ResultT]:
    """What ``read`` gives for each of many files, several at a time; ``what`` they are is for the error.

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

    # In a few portions, because handing a task to a thread takes as long as reading a header.
    portions = [items[k::_THREADS] for k in range(min(_THREADS, len(items)))]
    results: list[Any] = [None] * len(items)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for k, found in enumerate(pool.map(lambda portion: [result_or_error(item) for item in portion], portions)):
            results[k::_THREADS] = found
    if any(isinstance(result, Exception) for result in results):
        told = [str(result) if isinstance(result, Exception) else amiss(number, result) for number, result in enumerate(results)]
        errors = [text for text in told if text]
        raise StackError("\n".join([f"{len(errors)} of {len(items)} {what} cannot be read:", *(f"  {text}" for text in errors)]))
    return results
