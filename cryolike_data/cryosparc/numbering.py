"""Numbering the different values of a column of fixed-length strings, without a Python object for each row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

#: Where fewer words than one for so many rows are other than in the row before, Python looks up the rows that differ.
_COMMON = 4
#: Values whose number is found without Python have a place of so many bits. Those that find it taken have another one among as many,
#: which hardly any of them find taken, too. More places would not stay in the cache.
_PLACE_BITS = 17
#: Of the keys that choose a place; how well they spread the values decides the speed and nothing else.
_SEED = 20261124


class Numbering:
    """The different rows of a few columns, numbered in order of appearance, while blocks of rows come one after the other.

    Each row is compared, as whole words, with the row before. Where most rows differ, those words that ever did lead to the number
    of a row that is known, and are compared with that one. Python sees each row when it is new, and rarely again.

    Parameters
    ----------
    row : dtype of a row
    names : of the columns
    block_rows : rows of the largest block

    Attributes
    ----------
    known : the different rows, byte for byte (see ``records``), with their numbers
    """

    def __init__(self, row: np.dtype[Any], names: Collection[str], block_rows: int) -> None:
        self.known: dict[bytes, int] = {}
        size = _packed(row, names).itemsize
        width = -(-size // 8)
        # Row 0 is the last one of the block before; the last word of each row is filled up with zeros.
        self._words = np.zeros((1 + -(-block_rows // 8) * 8, width), np.uint64)
        self._records = np.ndarray(len(self._words), f"S{size}", self._words, strides=(8 * width,))
        self._source, self._copied = _runs(row, names, 8 * width)
        self._differ = np.zeros((len(self._words) - 1, width), bool)
        self._last: int | None = None
        self._varied: dict[int, np.ndarray] = {}  # words in which rows have differed, and what they are in each row that is known
        self._make_places(_PLACE_BITS)
        self._keys = np.random.default_rng(_SEED).integers(1 << 63, size=3, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def add(self, block: np.ndarray) -> np.ndarray:
        """The numbers (int32) of the next rows."""
        n, words = len(block), self._words
        source, copy = block.view(self._source), words[1 : n + 1].reshape(-1).view(self._copied)
        for run in self._source.names or ():
            copy[run] = source[run]
        if self._last is None:
            words[0] = words[1]
        differ = self._differ[:n]
        np.not_equal(words[1 : n + 1], words[:n], out=differ)
        few = _COMMON * np.count_nonzero(differ) < n
        numbers = self._by_runs(n, np.flatnonzero(differ)) if few else self._look_up(n)
        self._last = int(numbers[-1])
        words[0] = words[n]
        return numbers

    def _by_runs(self, n: int, changes: np.ndarray) -> np.ndarray:
        """The numbers of n rows, of whose words few (these, among all) are other than in the row before."""
        rows, words = np.divmod(changes, self._words.shape[1])
        self._add_varied(np.bincount(words))
        heads = rows[np.append(True, rows[1:] != rows[:-1])] if len(rows) else rows
        # Rows before the first that differs go with the last row of the block before.
        first = self._by_python(np.zeros(1, np.int64)) if self._last is None else np.array([self._last], np.int32)
        return np.repeat(np.append(first, self._by_python(heads)), np.diff(heads, prepend=0, append=n))

    def _look_up(self, n: int) -> np.ndarray:
        words = self._words[1 : n + 1]
        # Eight rows at a time, as NumPy is slow along short rows; behind the block there is what lay there before.
        ever = np.bitwise_or.reduce(self._differ.reshape(-1).view(np.uint64).reshape(-1, words.shape[1]), axis=0)
        self._add_varied(ever.view(bool).reshape(8, -1).any(axis=0))
        if len(self.known) > len(self._met):
            self._make_places(self._bits + 3)
        values = [words[:, word].copy() for word in self._varied]
        mixed = self._mixed(values)
        numbers, unknown = self._find(mixed, values)
        if len(unknown):
            mixed, values = mixed[unknown], [value[unknown] for value in values]
            new = self._first_of_each(mixed, values)
            self._remember(self._by_python(unknown[new]), mixed[new], [value[new] for value in values])
            again, left = self._find(mixed, values)
            again[left] = self._by_python(unknown[left])
            numbers[unknown] = again
        return numbers

    def _make_places(self, bits: int) -> None:
        self._bits = bits
        self._at = np.zeros((2, 1 << bits), np.int32)  # the number that has a place, plus one
        self._met = np.empty(1 << bits, np.int32)  # the row that was last seen at a place

    def _add_varied(self, often: np.ndarray) -> None:
        """Note which words have varied, from how often each did."""
        new = [word for word in np.flatnonzero(often).tolist() if word not in self._varied]
        if new:
            self._varied |= {word: np.empty(1, np.uint64) for word in new}
            self._at[:] = 0  # another word leads to other places

    def _mixed(self, values: list[np.ndarray]) -> np.ndarray:
        """One number (uint64) from the words of each row that have ever varied."""
        mixed, *others = values
        for value in others:
            mixed = mixed * self._keys[0]
            mixed ^= mixed >> np.uint64(32)  # differences in the first bits alone would stay there, and meet
            mixed ^= value
        return mixed

    def _first_of_each(self, mixed: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
        """The first row of each value, and some others, in order."""
        places, rows = self._places(0, mixed), np.arange(len(mixed), dtype=np.int32)
        self._met[places[::-1]] = rows[::-1]  # of several, the last one stays
        first = self._met[places]
        new = first == rows
        for value in values:
            new |= value != value[first]  # which shares its place
        return np.flatnonzero(new)

    def _find(self, mixed: np.ndarray, values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of rows whose words have these values, and which of them are not found."""
        numbers = self._at[0].take(self._places(0, mixed)) - np.int32(1)
        left = np.flatnonzero(self._unlike(numbers, values))
        for turn in range(1, len(self._at)):
            found = self._at[turn].take(self._places(turn, mixed[left])) - np.int32(1)
            numbers[left] = found
            left = left[self._unlike(found, [value[left] for value in values])]
        return numbers, left

    def _places(self, turn: int, mixed: np.ndarray) -> np.ndarray:
        # The product's first bits depend on all others (Dietzfelbinger et al., J. Algorithms 25, 1997).
        places: np.ndarray = mixed * self._keys[1 + turn] >> np.uint64(64 - self._bits)
        return places.view(np.int64)

    def _unlike(self, numbers: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
        """Whether rows are other than the known ones of these numbers, in a word that has ever varied (all other words are alike)."""
        unlike = numbers < 0
        for value, of_known in zip(values, self._varied.values(), strict=True):
            unlike |= of_known.take(numbers, mode="clip") != value
        return unlike

    def _remember(self, numbers: np.ndarray, mixed: np.ndarray, values: list[np.ndarray]) -> None:
        """Let rows be found, but for those that find no place."""
        for word, value in zip(self._varied, values, strict=True):
            if len(self._varied[word]) < len(self.known):
                self._varied[word] = np.concatenate([self._varied[word], np.empty(len(self.known), np.uint64)])
            self._varied[word][numbers] = value
        for turn, at in enumerate(self._at):
            places = self._places(turn, mixed)
            free = at[places] == 0
            at[places[free]] = numbers[free] + 1
            without = at[places] != numbers + 1
            numbers, mixed = numbers[without], mixed[without]

    def _by_python(self, rows: np.ndarray) -> np.ndarray:
        return np.array([self.known.setdefault(record, len(self.known)) for record in self._records[1 + rows].tolist()], np.int32)


def merge(parts: Sequence[tuple[dict[bytes, int], np.ndarray]]) -> list[bytes]:
    """The known rows of all parts of a table in order of appearance; the numbers of later parts are changed to mean them."""
    known, _ = parts[0]
    for of_part, numbers in parts[1:]:
        of_all = np.array([known.setdefault(record, len(known)) for record in of_part], np.int32)
        if (np.diff(of_all) == 1).all():
            numbers += of_all[:1]
        else:
            np.take(of_all, numbers, out=numbers, mode="clip")
    return list(known)


def records(known: Sequence[bytes], row: np.dtype[Any], names: Collection[str]) -> np.ndarray:
    """The structured array of these columns whose rows are known as bytes."""
    dtype = _packed(row, names)
    return np.array(known, np.dtype(("S", dtype.itemsize))).view(dtype)


def _packed(row: np.dtype[Any], names: Collection[str]) -> np.dtype[Any]:
    """Of the columns by themselves, in the order in which they lie in a row and without gaps."""
    inside = sorted(names, key=lambda name: _start(row, name))
    sizes = [row[name].itemsize for name in inside]
    offsets = np.cumsum([0, *sizes])[:-1].tolist()
    layout: Any = {"names": inside, "formats": [row[name] for name in inside], "offsets": offsets, "itemsize": max(1, sum(sizes))}
    packed: np.dtype[Any] = np.dtype(layout)
    return packed


def _runs(row: np.dtype[Any], names: Collection[str], size: int) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Of a row, and of the columns by themselves in so many bytes, with columns that lie side by side in both taken as one."""
    packed = _packed(row, names)
    runs: list[list[int]] = []  # where each starts in a row and by itself, and its bytes
    for name in packed.names or ():
        start, start_packed, bytes_ = _start(row, name), _start(packed, name), packed[name].itemsize
        if runs and sum(runs[-1][::2]) == start:
            runs[-1][2] += bytes_
        else:
            runs.append([start, start_packed, bytes_])
    both = [([start for start, _, _ in runs], row.itemsize), ([start for _, start, _ in runs], size)]
    shared = {"names": [f"run {k}" for k in range(len(runs))], "formats": [f"V{run[2]}" for run in runs]}
    layouts: list[Any] = [shared | {"offsets": offsets, "itemsize": itemsize} for offsets, itemsize in both]
    return np.dtype(layouts[0]), np.dtype(layouts[1])


def _start(row: np.dtype[Any], name: str) -> int:
    assert row.fields is not None
    return int(row.fields[name][1])
