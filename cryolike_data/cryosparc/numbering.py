"""Numbering the different values of a column of fixed-length strings, without a Python object for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Where fewer rows than one in so many differ from the row before, Python looks each of these up.
_RARE = 8
#: Values whose number is found without Python have a place of so many bits; two that fall on one place take turns there.
_PLACE_BITS = 20
#: Of the keys that choose a place; how well they spread the values decides the speed and nothing else.
_SEED = 20261124


class Numbering:
    """The different values of a column, numbered in order of appearance, while blocks of the column come one after the other.

    Rows are compared as whole words with the row before, and where they differ with the values that are known. Python sees
    each value when it is new, and rarely again.

    Parameters
    ----------
    size : bytes of a string
    words : (1 + rows of the largest block, a multiple of 8) contiguous uint64; row 0 belongs to the numbering
    start : the word of each row at which its string starts; the rest of the string's last word is cleared

    Attributes
    ----------
    known : the values, with their numbers
    """

    def __init__(self, size: int, words: np.ndarray, start: int) -> None:
        self.known: dict[Any, int] = {}
        # At least one byte of zeros behind the value, by which nothing that is no value looks like one.
        width = size // 8 + 1
        self._rows, self._words = words, words[:, start : start + width]
        self._mask = np.uint64((1 << size % 8 * 8) - 1)
        of_string = np.zeros(words.shape[1], bool)
        of_string[start : start + width] = True
        self._of_string = of_string.view(np.uint64)
        self._last: int | None = None
        self._known_words = np.full((1, width), -1, np.int64).view(np.uint64)  # of each number, from row 1 on
        self._at = np.empty(0, np.int32)  # the number that was last seen at a place, plus one
        self._keys = np.random.default_rng(_SEED).integers(1 << 63, size=width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def add(self, block: np.ndarray) -> np.ndarray:
        """The numbers (int32) of the strings of the next block, which lie in ``words`` from row 1 on."""
        n = len(block)
        self._words[1 : n + 1, -1] &= self._mask
        # All words, because NumPy is fast where there are no gaps, and of the differences those in the string.
        differ = (self._rows[1 : n + 1].ravel() != self._rows[:n].ravel()).view(np.uint64).reshape(n, -1)
        changed = np.zeros(n, bool)
        for words, of_string in zip(differ.T, self._of_string, strict=True):
            if of_string:
                changed |= (words & of_string).view(np.int64).astype(bool)
        changed[0] |= self._last is None
        heads = np.flatnonzero(changed)
        if len(heads) * _RARE < n:
            # Rows before the first that differs go with the last block's last row.
            found = np.append(np.array([self._last or 0], np.int32), self._by_python(block[heads]))
            numbers = np.repeat(found, np.diff(np.append(heads, n), prepend=0))
        else:
            numbers = self._look_up(block)
        self._last = int(numbers[-1])
        self._rows[0] = self._rows[n]
        return numbers

    def _look_up(self, block: np.ndarray) -> np.ndarray:
        words = self._words[1 : len(block) + 1]
        if not len(self._at):
            self._at = np.zeros(1 << _PLACE_BITS, np.int32)
        mixed = words @ self._keys
        place = (mixed >> np.uint64(64 - _PLACE_BITS)).view(np.int64)
        numbers: np.ndarray = self._at.take(place)
        unknown = np.flatnonzero(_differ(self._known_words.take(numbers, axis=0), words))
        numbers -= 1
        if len(unknown):
            # One of those that look alike first, so that Python sees few; then the others that looked like it in vain.
            _, first = np.unique(mixed[unknown], return_index=True)
            new = unknown[np.sort(first)]
            found = self._by_python(block[new])
            self._at[place[new]] = found + 1
            if len(self.known) >= len(self._known_words):
                more = np.empty((len(self.known), words.shape[1]), np.uint64)
                self._known_words = np.concatenate([self._known_words, more])
            self._known_words[found + 1] = words[new]
            again = self._at.take(place[unknown])
            numbers[unknown] = again - 1
            left = unknown[_differ(self._known_words.take(again, axis=0), words[unknown])]
            numbers[left] = self._by_python(block[left])
        return numbers

    def _by_python(self, values: np.ndarray) -> np.ndarray:
        return np.array([self.known.setdefault(value, len(self.known)) for value in values.tolist()], np.int32)


def merge(parts: Sequence[tuple[dict[Any, int], np.ndarray]]) -> list[Any]:
    """The values of all parts of a column in order of appearance; the numbers of later parts are changed to mean them."""
    known, _ = parts[0]
    for values, numbers in parts[1:]:
        of_all = np.array([known.setdefault(value, len(known)) for value in values], np.int32)
        np.take(of_all, numbers, out=numbers, mode="clip")
    return list(known)


def _differ(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N,) whether two (N, words) arrays differ in a row."""
    differ = left != right
    # As few and long words as fit.
    columns = differ.view(f"u{math.gcd(differ.shape[1], 8)}")
    together = columns[:, 0].copy()
    for column in columns.T[1:]:
        together |= column
    different: np.ndarray = together != 0
    return different
