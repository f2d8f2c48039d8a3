r"""Standard normal numbers at any place of a table that is never stored: a function of a key and a counter.

Philox 4x32-10 encrypts a counter of four 32-bit words under a key of two; the four words that come out are uniform and
independent for all that statistical tests can tell. Box and Muller's transform makes four normal numbers of them.
Unlike a generator with a state, it gives every row the numbers of a place of its own, for all rows at once.

References: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011; Box and Muller 1958.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Four words below 2^32 for every counter and key, whose words are below 2^32 too; shapes broadcast."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (second >> _HALF) ^ b ^ k, second & _LOW, (first >> _HALF) ^ d ^ m, first & _LOW
        k, m = (k + _KEY_STEPS[0]) & _LOW, (m + _KEY_STEPS[1]) & _LOW
    return a, b, c, d


def keyed_words(key: Words, place: NDArray[np.integer[Any]], table: int, count: int) -> Words:
    """`count` words below 2^32 for every row, `(rows, count)`: those of its key at its place in a table.

    Args:
        key, place: one for every row, of 64 bits.
        table: a number below 2^32; tables are independent.
        count: how many.
    """
    calls, at, key = np.arange(-(-count // 4), dtype=np.uint64), place.astype(np.uint64)[:, None], key[:, None]
    counter = calls[None], at & _LOW, at >> _HALF, np.full_like(at, table)
    words = np.stack(philox(counter, (key & _LOW, key >> _HALF)), axis=-1)
    return words.reshape(len(key), -1)[:, :count]


def keyed_normals(key: Words, place: NDArray[np.integer[Any]], table: int, count: int) -> NDArray[np.float64]:
    """`count` standard normal numbers for every row, likewise, `(rows, count)`."""
    words = keyed_words(key, place, table, count + count % 2).reshape(len(key), -1, 2)
    u, v = ((words[..., i].astype(np.float64) + 0.5) * 2.0**-32 for i in range(2))
    radius = np.sqrt(-2 * np.log(u))
    numbers = np.stack([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=-1)
    return numbers.reshape(len(key), -1)[:, :count]


def keyed_signs(key: Words, place: NDArray[np.integer[Any]], table: int, count: int) -> NDArray[np.float64]:
    """`count` independent signs -1 and 1 for every row, likewise, `(rows, count)`; 32 of every word."""
    bits = keyed_words(key, place, table, -(-count // 32))[..., None] >> np.arange(32, dtype=np.uint64)
    return 1 - 2 * (bits & np.uint64(1)).reshape(len(key), -1)[:, :count].astype(np.float64)
