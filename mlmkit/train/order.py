"""The order of the training windows: a function of seed and epoch, computed where it is needed and never stored.

Each text is an endless stream: pass after pass over its windows, each pass with its own permutation. Epoch e takes from
a text of n windows and weight w the stretch `floor(e * w * n)` to `floor((e + 1) * w * n)` of its stream. An epoch is
computed in blocks: a block takes its part of each stretch and shuffles them together. So at the end of a block, the
windows seen of a text are the beginning of its stream; within a block, they are that beginning and a short list.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDER = 2  # changes when the order of the same data does, so that no run resumes with another order
WINDOWS_PER_BLOCK = 16_384
# Neighbouring windows are read together: of a large text, chunks of them are permuted, and a block mixes at least 256
# chunks. A text of fewer than 8,192 windows has chunks of one window.
CHUNKS, LARGEST_CHUNK = 4096, 64
ROUNDS = 8
SMALLEST_HALF = 3  # bits; with fewer a round has so few functions that permutations of 4 or 5 windows are not uniform


@dataclass(frozen=True)
class Cursor:
    """A point between two global batches.

    `step` steps of the run are done. The run is in phase `phase`, of which it has done `phase_steps` steps with
    `phase_tokens` real tokens. `packs` packs of this block of this epoch are used. In all phases together it has seen
    `tokens` real tokens, and about `words` words (`RowBuilder.words_per_token`), each as often as it was shown.
    """

    step: int = 0
    phase: int = 0
    phase_steps: int = 0
    phase_tokens: int = 0
    epoch: int = 0
    block: int = 0
    packs: int = 0
    tokens: int = 0
    words: float = 0.0


@dataclass(frozen=True)
class Stream:
    """The windows of a text with `size` windows of at most `capacity` tokens: pass after pass, without end.

    `text` is the fingerprint of the text. `begin` windows came earlier in the run, except those in `left`, which come
    first now.
    """

    text: str
    capacity: int
    size: int
    begin: int = 0
    left: tuple[int, ...] = ()

    @cached_property
    def key(self) -> int:
        """What, besides the seed, decides about the permutations."""
        digest = blake2b(f"{self.text} {self.capacity}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") | 1  # 0 is the key of the blocks

    @property
    def chunk(self) -> int:
        """How many neighbouring windows the permutations keep together."""
        return min(max(self.size // CHUNKS, 1), LARGEST_CHUNK)

    def at(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Entries of what is left of the stream, as positions in the whole stream; same shape."""
        waiting = len(self.left)
        position = self.begin + index - waiting
        position[index < waiting] = np.array(self.left, np.int64)[index[index < waiting]]
        return position

    def after(self, seen: Sequence["Stream"]) -> "Stream":
        """The stream after what earlier phases have seen of it.

        If they cut the text into other windows, it begins a new pass, with new masks.
        """
        for stream in seen:
            if (stream.text, stream.capacity) == (self.text, self.capacity):
                return stream
            if stream.text == self.text:
                return replace(self, begin=-(-stream.begin // stream.size) * self.size)
        return self


@dataclass(frozen=True)
class Position:
    """Where the data of a run stands, as a checkpoint keeps it.

    `cursor` counts in the order over `streams`, in packs as `identity` says (`RowBuilder.identity`). An order over
    other texts or in other packs continues with `remaining`.
    """

    cursor: Cursor = Cursor()
    identity: dict[str, Any] = field(default_factory=dict)
    streams: tuple[Stream, ...] = ()
    remaining: tuple[Stream, ...] = ()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Position":
        """The position that `dataclasses.asdict` and JSON have written."""
        streams = (
            tuple(Stream(**{**stream, "left": tuple(stream["left"])}) for stream in values[name])
            for name in ("streams", "remaining")
        )
        # Earlier versions counted the tokens of the phase only.
        cursor = Cursor(**{"tokens": values["cursor"]["phase_tokens"], **values["cursor"]})
        return cls(cursor, values["identity"], *streams)

    def next_phase(self, phase: int) -> "Position":
        """The same point of the data as the beginning of a phase."""
        return replace(self, cursor=replace(self.cursor, phase=phase, phase_steps=0, phase_tokens=0))


NOWHERE = Position()


@dataclass(frozen=True)
class Order:
    """Streams with at least one window each, of which an epoch shows `passes` passes."""

    streams: tuple[Stream, ...]
    passes: tuple[float, ...]
    seed: int

    def blocks(self, epoch: int) -> int:
        """The number of blocks in the epoch; 0 if the weights are so small that it has no window."""
        size = int(np.diff(self._stretches(epoch)).sum())
        return max(size // WINDOWS_PER_BLOCK, min(size, 1))

    def block(self, epoch: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The windows of a block in order: text, pass since the start of training, and window, each `[windows]`.

        The blocks of an epoch differ by one window per text at most, so the last is not small.
        """
        source, position = self._positions(epoch, block)
        number, window = np.divmod(position, np.array([stream.size for stream in self.streams])[source])
        for index, stream in enumerate(self.streams):
            for pass_number in np.unique(number[source == index]).tolist():
                here = (source == index) & (number == pass_number)
                window[here] = permute_chunks(window[here], stream, self._key(stream.key, [1, pass_number]))
        return source, number, window

    def remaining(self, epoch: int, block: int, unused: NDArray[np.int64]) -> tuple[Stream, ...]:
        """The streams after this block, of which the windows at the places `unused` are still to come."""
        source, position = self._positions(epoch, block)
        remaining = []
        for index, (stream, (_, end)) in enumerate(zip(self.streams, self._parts(epoch, block).tolist(), strict=True)):
            left = position[unused[source[unused] == index]].tolist()
            begin = stream.begin + max(end - len(stream.left), 0)
            remaining.append(replace(stream, begin=begin, left=(*left, *stream.left[end:])))
        return tuple(remaining)

    def _positions(self, epoch: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Text, and position in its stream, of the windows of a block in order."""
        begin, end = self._parts(epoch, block).T
        ends = np.cumsum(end - begin)
        size = int(ends[-1])
        shuffled = permute(np.arange(size), size, self._key(0, [0, epoch, block]))
        source = np.searchsorted(ends, shuffled, side="right")
        position = shuffled - ends[source] + end[source]
        for index, stream in enumerate(self.streams):
            here = source == index
            position[here] = stream.at(position[here])
        return source, position

    def _parts(self, epoch: int, block: int) -> NDArray[np.int64]:
        """Begin and end of the block's part of each stretch, `[texts, 2]`."""
        begin, end = self._stretches(epoch).T
        blocks = self.blocks(epoch)
        return np.stack([begin + number * (end - begin) // blocks for number in (block, block + 1)], axis=1)

    def _stretches(self, epoch: int) -> NDArray[np.int64]:
        """Begin and end of the epoch's stretch in what is left of each stream, `[texts, 2]`."""
        shares = zip(self.streams, self.passes, strict=True)
        return np.array([[floor(e * weight * stream.size) for e in (epoch, epoch + 1)] for stream, weight in shares])

    def _key(self, key: int, counter: list[int]) -> NDArray[np.uint64]:
        # uint64 from the start: NumPy turns a list with an entry above 2**63 into floats.
        keys, counters = np.array([self.seed, key], np.uint64), np.array([0, *counter, 0, 0][:4], np.uint64)
        return np.random.Philox(key=keys, counter=counters).random_raw(ROUNDS)


def permute_chunks(index: NDArray[np.int64], stream: Stream, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The images of `index` under a permutation of the windows that moves whole chunks; same shape.

    The last chunk may be short: an image in what it lacks is permuted again, until it is a window.
    """
    image, walking = index.copy(), np.arange(len(index))
    while len(walking):
        chunk, offset = np.divmod(image[walking], stream.chunk)
        image[walking] = permute(chunk, -(-stream.size // stream.chunk), key) * stream.chunk + offset
        walking = walking[image[walking] >= stream.size]
    return image


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
