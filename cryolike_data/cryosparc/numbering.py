"""Numbering the different values of a column of fixed-length strings, without a Python object for each row."""

from __future__ import annotations

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

    Each row is compared, as whole words, with the row before. Where most rows differ, those words that ever did lead to the number
    of a value that is known, and are compared with that value. Python sees each value when it is new, and rarely again.

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
        width = max(1, -(-size // 8))
        self._rows, self._words = words, words[:, start : start + width]
        self._mask = np.uint64((1 << 8 * (size - 8 * (width - 1))) - 1)
        self._of_string = np.isin(np.arange(words.shape[1]), np.arange(start, start + width)).view(np.uint64)
        self._start = start
        self._last: int | None = None
        self._varied: dict[int, np.ndarray] = {}  # words in which rows have differed, and what they are in each value
        self._at = np.empty(0, np.int32)  # the number that was last seen at a place, plus one
        self._keys = np.random.default_rng(_SEED).integers(1 << 63, size=width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def add(self, block: np.ndarray) -> np.ndarray:
        """The numbers (int32) of the strings of the next block, which lie in ``words`` from row 1 on."""
        n = len(block)
        self._words[1 : n + 1, -1] &= self._mask
        # All words, because NumPy is fast where there are no gaps, and of the differences those in the string.
        differ = (self._rows[1 : n + 1].ravel() != self._rows[:n].ravel()).view(np.uint64).reshape(n, -1)
        if self._last is None:
            differ[0] = 0
        changed, ever = np.zeros(n, bool), np.zeros_like(self._of_string)
        for k in np.flatnonzero(self._of_string).tolist():
            in_string = differ[:, k] & self._of_string[k]
            changed |= in_string.view(np.int64).astype(bool)
            ever[k] = np.bitwise_or.reduce(in_string)
        changed[0] |= self._last is None
        self._add_varied(ever)
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

    def _add_varied(self, differ: np.ndarray) -> None:
        new = [word for word in (np.flatnonzero(differ.view(bool)) - self._start).tolist() if word not in self._varied]
        if new:
            self._varied |= {word: np.empty(1, np.uint64) for word in new}
            self._at[:] = 0  # another word leads to other places

    def _look_up(self, block: np.ndarray) -> np.ndarray:
        words = self._words[1 : len(block) + 1]
        if not len(self._at):
            self._at = np.zeros(1 << _PLACE_BITS, np.int32)
        mixed = np.zeros(len(block), np.uint64)
        for word in self._varied:
            mixed += words[:, word] * self._keys[word]
        place = (mixed >> np.uint64(64 - _PLACE_BITS)).view(np.int64)
        numbers = self._at.take(place) - np.int32(1)
        unknown = np.flatnonzero(self._unlike(numbers, words))
        if len(unknown):
            # One of those that look alike first, so that Python sees few; then the others that looked like it in vain.
            _, first = np.unique(mixed[unknown], return_index=True)
            new = unknown[np.sort(first)]
            found = self._by_python(block[new])
            self._at[place[new]] = found + 1
            self._remember(found, words[new])
            numbers[unknown] = again = self._at.take(place[unknown]) - np.int32(1)
            left = unknown[self._unlike(again, words[unknown])]
            numbers[left] = self._by_python(block[left])
        return numbers

    def _unlike(self, numbers: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Whether rows are other than the values of these numbers, in a word that has ever varied (all other words are alike)."""
        unlike = numbers < 0
        for word, of_values in self._varied.items():
            unlike |= of_values.take(numbers, mode="clip") != words[:, word]
        return unlike

    def _remember(self, numbers: np.ndarray, words: np.ndarray) -> None:
        for word, of_values in self._varied.items():
            if len(of_values) < len(self.known):
                of_values = self._varied[word] = np.concatenate([of_values, np.empty(len(self.known), np.uint64)])
            of_values[numbers] = words[:, word]

    def _by_python(self, values: np.ndarray) -> np.ndarray:
        return np.array([self.known.setdefault(value, len(self.known)) for value in values.tolist()], np.int32)


def merge(parts: Sequence[tuple[dict[Any, int], np.ndarray]]) -> list[Any]:
    """The values of all parts of a column in order of appearance; the numbers of later parts are changed to mean them."""
    known, _ = parts[0]
    for values, numbers in parts[1:]:
        of_all = np.array([known.setdefault(value, len(known)) for value in values], np.int32)
        np.take(of_all, numbers, out=numbers, mode="clip")
    return list(known)
