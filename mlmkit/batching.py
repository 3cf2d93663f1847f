"""Which windows share a batch: packs of a fixed token budget for training, length-sorted batches for evaluation."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

OPEN_PACKS = 32
LOOKAHEAD = 1024


def pack(
    lengths: Iterable[int], budget: int, *, max_members: int | None = None, open_packs: int = OPEN_PACKS
) -> Iterator[list[int]]:
    """Indices of items, each once, in packs of at most `max_members` whose lengths sum to at most `budget`.

    Best fit (Johnson 1974), in order of arrival: an item goes to the fullest open pack that has room for it. Where none
    has, another opens, and the fullest of `open_packs` closes before. So each pack is a sample of all lengths, and
    nothing waits for long. It depends on `lengths` and their order alone.

    Raises `ValueError` when an item is longer than the budget.
    """
    rooms: list[int] = []  # ascending: the fullest first
    packs: list[list[int]] = []
    for index, length in enumerate(lengths):
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room, members = rooms.pop(place), packs.pop(place)
        elif length > budget:
            raise ValueError(f"item {index} of {length} tokens exceeds the budget of {budget}")
        else:
            room, members = budget, []
            if len(rooms) == open_packs:
                del rooms[0]
                yield packs.pop(0)
        members.append(index)
        room -= length
        if not room or len(members) == max_members:
            yield members
        else:
            place = bisect_left(rooms, room)
            rooms.insert(place, room)
            packs.insert(place, members)
    yield from packs


def length_batches(lengths: NDArray[np.int64], budget: int, *, equal: bool = False) -> list[NDArray[np.int64]]:
    """Indices of rows, each once, in batches of similar length: `rows * longest <= budget`, or a single row.

    With `equal`, the rows of a batch have one length, so there is no padding. Longest first, so that memory peaks at
    once and not at the end. It depends on `lengths` alone.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    batches, begin = [], 0
    while begin < len(order):
        longest = int(descending[begin])
        end = begin + max(budget // max(longest, 1), 1)
        if equal:
            end = min(end, int(np.searchsorted(-descending, -longest, side="right")))
        batches.append(order[begin:end])
        begin = end
    return batches


def bucketed(lengths: Sequence[int], budget: int, lookahead: int = LOOKAHEAD) -> Iterator[list[int]]:
    """The padded counterpart of `pack`: `length_batches` over successive stretches of `lookahead` items."""
    for begin in range(0, len(lengths), lookahead):
        stretch = np.asarray(lengths[begin : begin + lookahead], dtype=np.int64)
        for batch in length_batches(stretch, budget):
            yield (begin + batch).tolist()


def pad(rows: Sequence[NDArray[np.int64]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`input_ids` and `attention_mask`, both `[rows, longest]` int64, from rows of any lengths."""
    lengths = np.array([len(row) for row in rows])
    attention_mask = (np.arange(lengths.max(initial=0)) < lengths[:, None]).astype(np.int64)
    input_ids = np.full(attention_mask.shape, pad_id, dtype=np.int64)
    input_ids[attention_mask.astype(bool)] = np.concatenate(rows)
    return input_ids, attention_mask
