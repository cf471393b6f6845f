"""Order as arithmetic: seeded permutations of 0 ... n - 1 whose any element is known without drawing the others."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of 0 ... n - 1 sends each index.

    A Feistel network on the smallest power of two that holds n, walked until the value lies below n (Black and Rogaway,
    "Ciphers with arbitrary finite domains", CT-RSA 2002). Every n, also beyond 2**32, costs no memory and no set-up.

    Parameters
    ----------
    index : integers from 0 to n - 1, any shape
    n : length of the permutation
    key : which permutation, a number of up to 64 bits

    Returns
    -------
    int64 array of the same shape
    """
    bits = max(2, int(n - 1).bit_length())
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << int(low)) - 1), np.uint64((1 << (bits - int(low))) - 1)
    value = np.array(index, np.uint64).ravel()
    out = value.copy()
    walking = np.arange(len(value))
    while len(walking):
        value = _encrypt(value, low, low_mask, high_mask, key)
        inside = value < n
        out[walking[inside]] = value[inside]
        walking, value = walking[~inside], value[~inside]
    return out.astype(np.int64).reshape(np.shape(index))


def mix(*numbers: int) -> int:
    """One 64-bit key from several numbers (SplitMix64, Steele et al., OOPSLA 2014)."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _hash(state ^ np.uint64(number % (1 << 64)))
    return int(state[0])


def _encrypt(value: np.ndarray, low: np.uint64, low_mask: np.uint64, high_mask: np.uint64, key: int) -> np.ndarray:
    left, right = value >> low, value & low_mask
    for turn in range(0, _ROUNDS, 2):
        left = left ^ (_hash(right ^ np.uint64(_round_key(key, turn))) & high_mask)
        right = right ^ (_hash(left ^ np.uint64(_round_key(key, turn + 1))) & low_mask)
    return (left << low) | right


def _round_key(key: int, turn: int) -> int:
    return (key + (turn + 1) * int(_GOLDEN)) % (1 << 64)


def _hash(value: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64: every bit of the result depends on every bit of the value."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed
