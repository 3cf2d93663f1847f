"""The order of the training windows: a function of seed and epoch, computed where it is needed and kept nowhere.

Each source is a stream without end, pass after pass of its windows, each pass a permutation of its own. Epoch e takes
of a source of n windows and weight w the stretch from `floor(e * w * n)` to `floor((e + 1) * w * n)` of its stream; the
stretches of all sources are shuffled together. An epoch is planned in blocks, so that any place of it is found at once.
"""

from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

WINDOWS_PER_BLOCK = 16_384
ROUNDS = 8
SMALLEST_HALF = 3  # bits: with fewer, the few functions that a round can be show in the permutations of 4 or 5 windows


@dataclass(frozen=True)
class Cursor:
    """A place between two global batches: after `step` of them, `packs` packs of this block of this epoch are taken."""

    step: int = 0
    epoch: int = 0
    block: int = 0
    packs: int = 0


@dataclass(frozen=True)
class Order:
    """Sources of `sizes` windows, of which an epoch shows `passes` passes each. Sizes are positive."""

    sizes: tuple[int, ...]
    passes: tuple[float, ...]
    seed: int

    def blocks(self, epoch: int) -> int:
        """How many blocks the epoch has; none if the weights are so small that nothing falls into it."""
        size = int(np.diff(self._stretches(epoch)).sum())
        return max(size // WINDOWS_PER_BLOCK, min(size, 1))

    def block(self, epoch: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Source, pass (counted from the start of training) and window of each place of a block, each `[windows]`.

        Blocks are equal to within one window; there is none much smaller than `WINDOWS_PER_BLOCK` at the end.
        """
        begin, end = self._stretches(epoch).T
        ends = np.cumsum(end - begin)
        size, blocks = int(ends[-1]), self.blocks(epoch)
        places = np.arange(block * size // blocks, (block + 1) * size // blocks)
        place = permute(places, size, self._key(0, epoch))
        source = np.searchsorted(ends, place, side="right")
        in_stream = place - ends[source] + end[source]
        number, window = np.divmod(in_stream, np.array(self.sizes)[source])
        for index, size in enumerate(self.sizes):
            for pass_number in np.unique(number[source == index]).tolist():
                here = (source == index) & (number == pass_number)
                window[here] = permute(window[here], size, self._key(1 + index, pass_number))
        return source, number, window

    def _stretches(self, epoch: int) -> NDArray[np.int64]:
        """Where in its stream each source's share of the epoch begins and ends, `[sources, 2]`."""
        shares = zip(self.sizes, self.passes, strict=True)
        return np.array([[floor(e * weight * size) for e in (epoch, epoch + 1)] for size, weight in shares])

    def _key(self, stream: int, number: int) -> NDArray[np.uint64]:
        # uint64 from the start: numpy turns a list with an entry over 2**63 into floats.
        key, counter = np.array([self.seed, stream], np.uint64), np.array([0, 0, 1, number], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(ROUNDS)


def permute(index: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each index in `[0, size)` goes under the permutation that `key` `[rounds]` chooses: same shape, same range.

    A Feistel network over the next power of four, walked on until it comes back into the range: a keyed bijection
    evaluated index by index (Mitchell et al. 2021, "Bandwidth-Optimal Random Shuffling for GPUs", section 4), with the
    finaliser of splitmix64 (Steele et al. 2014) for its rounds.
    """
    bits = np.uint64(max(SMALLEST_HALF, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(bits)) - 1)
    place = index.astype(np.uint64)
    walking = np.arange(len(index))
    while len(walking):
        left, right = place[walking] >> bits, place[walking] & low
        for round_key in key:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        place[walking] = left << bits | right
        walking = walking[place[walking] >= np.uint64(size)]
    return place.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
