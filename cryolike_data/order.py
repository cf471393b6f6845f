"""Order as arithmetic: seeded permutations of 0 ... n - 1 whose any element is known without drawing the others."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

#: Each round changes both halves of a number.
_ROUNDS = 3
#: Random numbers are looked up by this many bits at a time, so that a table stays in the innermost cache.
_TABLE_BITS = 12
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of 0 ... n - 1 sends each index.

    A generalized Feistel network on Z_a x Z_b with a b >= n, walked until the value lies below n (Black and Rogaway, "Ciphers
    with arbitrary finite domains", CT-RSA 2002); its round functions are tables of random numbers. Every n, also beyond 2**32,
    costs little memory and set-up.

    Parameters
    ----------
    index : integers from 0 to n - 1, any shape
    n : length of the permutation
    key : which permutation, a number of up to 64 bits

    Returns
    -------
    int64 array of the same shape
    """
    a = math.isqrt(max(0, n - 1)) + 1
    b = max(1, -(-n // a))
    rounds = _round_tables(key, a, b)
    value = _encrypt(np.array(index, np.uint64).ravel(), a, b, rounds)
    while len(beyond := np.flatnonzero(value >= n)):  # less than a of the a b values
        value[beyond] = _encrypt(value[beyond], a, b, rounds)
    return value.view(np.int64).reshape(np.shape(index))


def mix(*numbers: int) -> int:
    """One 64-bit key from several numbers (SplitMix64, Steele et al., OOPSLA 2014)."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _hash(state ^ np.uint64(number % (1 << 64)))
    return int(state[0])


_Tables = tuple[np.ndarray, ...]


def _encrypt(value: np.ndarray, a: int, b: int, rounds: tuple[tuple[_Tables, _Tables], ...]) -> np.ndarray:
    left = value // np.uint64(b)
    right = value - left * np.uint64(b)
    for of_right, of_left in rounds:
        _add(left, right, of_right, a)
        _add(right, left, of_left, b)
    left *= np.uint64(b)
    left += right
    return left


def _add(target: np.ndarray, source: np.ndarray, tables: _Tables, modulus: int) -> None:
    """Add a random function of ``source`` to ``target``, modulo ``modulus``, in place."""
    for number, table in enumerate(tables):
        digit = source if len(tables) == 1 else (source >> np.uint64(number * _TABLE_BITS)) & np.uint64((1 << _TABLE_BITS) - 1)
        target += table.take(digit.view(np.int64))
        # Below zero an unsigned number is a huge one, so that the smaller of the two is the remainder.
        np.minimum(target, target - np.uint64(modulus), out=target)


@lru_cache(maxsize=16)
def _round_tables(key: int, a: int, b: int) -> tuple[tuple[_Tables, _Tables], ...]:
    return tuple((_tables(mix(key, 2 * turn), b, a), _tables(mix(key, 2 * turn + 1), a, b)) for turn in range(_ROUNDS))


def _tables(key: int, size: int, modulus: int) -> _Tables:
    """A random function from 0 ... size - 1 to 0 ... modulus - 1: a table for each ``_TABLE_BITS`` bits, to be added up."""
    bits = max(1, (size - 1).bit_length())
    made = []
    for number, low in enumerate(range(0, bits, _TABLE_BITS)):
        entries = np.arange(1 << min(_TABLE_BITS, bits - low), dtype=np.uint64)
        made.append(_hash(entries ^ np.uint64(mix(key, number))) % np.uint64(modulus))
    return tuple(made)


def _hash(value: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64: every bit of the result depends on every bit of the value."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed
