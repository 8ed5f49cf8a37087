"""Randomness without state: numbers and permutations that are functions of a key alone.

Both rest on the mixing function of SplitMix64 (Steele, Lea and Flood, 2014), in whole arrays at a time.
"""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / φ: SplitMix64's step from one state to the next
WORD = 2**64 - 1
ROUNDS = 6
SHUFFLE, MASK, COIN, AUGMENTATION = (
    1,
    2,
    3,
    4,
)  # the first number of a key, its purpose: keys of two purposes are never equal


def derive_key(*numbers: int) -> int:
    """Return one key of 64 bits for several integers of 64 bits, whose order matters."""
    state = 0
    for number in numbers:
        state = int(_mix(np.array([(state + GOLDEN + number) & WORD], dtype=np.uint64))[0])
    return state


def derive_keys(base: int, numbers: np.ndarray) -> np.ndarray:
    """Return a key for each of the integers int64 [n], uint64 [n]."""
    return _mix(_mix(numbers.astype(np.uint64) + np.uint64(GOLDEN)) ^ np.uint64(base))


def random_uint64(keys: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Return the entries begin … end - 1 of the stream of each key uint64 [n], uint64 [n, end - begin]."""
    steps = np.arange(begin + 1, end + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return _mix(keys[:, None] + steps)


class Permutation:
    """A shuffle of range(size) that costs no memory.

    A Feistel network over the next power of four, repeated until the value is inside the range (Black and Rogaway,
    2002).
    """

    def __init__(self, size: int, key: int) -> None:
        assert size >= 1
        self._size = size
        self._half = max(1, (size - 1).bit_length() + 1 >> 1)
        self._keys = random_uint64(np.array([key], dtype=np.uint64), 0, ROUNDS)[0]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the values at these positions of the shuffled range, int64 [n]."""
        values = self._encipher(positions.astype(np.uint64))
        while (outside := values >= self._size).any():
            values[outside] = self._encipher(values[outside])
        return values.astype(np.int64)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        half, shift = np.uint64(self._half), np.uint64(64 - self._half)
        left, right = values >> half, values & np.uint64((1 << self._half) - 1)
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) >> shift)
        return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the output of a bijection of 64 bits in which each bit of the input changes half of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
