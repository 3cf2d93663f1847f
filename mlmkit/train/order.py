"""The order of the training windows: a function of seed and epoch, computed where it is needed and never stored.

Each source is an endless stream: pass after pass over its windows, each pass with its own permutation. Epoch e takes
from a source of n windows and weight w the stretch `floor(e * w * n)` to `floor((e + 1) * w * n)` of its stream, and
shuffles the stretches of all sources together. An epoch is computed in blocks, so a run can resume at any of them.
"""

from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

WINDOWS_PER_BLOCK = 16_384
ROUNDS = 8
SMALLEST_HALF = 3  # bits; with fewer a round has so few functions that permutations of 4 or 5 windows are not uniform


@dataclass(frozen=True)
class Cursor:
    """A point between two global batches: `step` are done, and `packs` packs of this block of this epoch are used."""

    step: int = 0
    epoch: int = 0
    block: int = 0
    packs: int = 0


@dataclass(frozen=True)
class Order:
    """Sources with `sizes` windows each (positive), of which an epoch shows `passes` passes."""

    sizes: tuple[int, ...]
    passes: tuple[float, ...]
    seed: int

    def blocks(self, epoch: int) -> int:
        """The number of blocks in the epoch; 0 if the weights are so small that it has no window."""
        size = int(np.diff(self._stretches(epoch)).sum())
        return max(size // WINDOWS_PER_BLOCK, min(size, 1))

    def block(self, epoch: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The windows of a block in order: source, pass since the start of training, and window, each `[windows]`.

        The blocks of an epoch differ in size by one window at most, so the last is not small.
        """
        begin, end = self._stretches(epoch).T
        ends = np.cumsum(end - begin)
        size, blocks = int(ends[-1]), self.blocks(epoch)
        index = np.arange(block * size // blocks, (block + 1) * size // blocks)
        shuffled = permute(index, size, self._key(0, epoch))
        source = np.searchsorted(ends, shuffled, side="right")
        in_stream = shuffled - ends[source] + end[source]
        number, window = np.divmod(in_stream, np.array(self.sizes)[source])
        for stream, size in enumerate(self.sizes):
            for pass_number in np.unique(number[source == stream]).tolist():
                here = (source == stream) & (number == pass_number)
                window[here] = permute(window[here], size, self._key(1 + stream, pass_number))
        return source, number, window

    def _stretches(self, epoch: int) -> NDArray[np.int64]:
        """Begin and end of the epoch's stretch in the stream of each source, `[sources, 2]`."""
        shares = zip(self.sizes, self.passes, strict=True)
        return np.array([[floor(e * weight * size) for e in (epoch, epoch + 1)] for size, weight in shares])

    def _key(self, stream: int, number: int) -> NDArray[np.uint64]:
        # uint64 from the start: NumPy turns a list with an entry above 2**63 into floats.
        key, counter = np.array([self.seed, stream], np.uint64), np.array([0, 0, 1, number], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(ROUNDS)


def permute(index: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The images of `index`, in `[0, size)`, under the permutation that `key` `[rounds]` selects; same shape.

    A Feistel network over the next power of four, repeated until the result is below `size`: a keyed bijection that
    needs no table (Mitchell et al. 2021, "Bandwidth-Optimal Random Shuffling for GPUs", section 4). Its round function
    is the finaliser of splitmix64 (Steele et al. 2014).
    """
    bits = np.uint64(max(SMALLEST_HALF, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(bits)) - 1)
    image = index.astype(np.uint64)
    walking = np.arange(len(index))
    while len(walking):
        left, right = image[walking] >> bits, image[walking] & low
        for round_key in key:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        image[walking] = left << bits | right
        walking = walking[image[walking] >= np.uint64(size)]
    return image.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
