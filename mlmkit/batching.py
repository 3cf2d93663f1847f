"""Which windows share a batch: packs of a fixed token budget for training, length-sorted batches for evaluation."""

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

LOOKAHEAD = 1024


def pack(lengths: Sequence[int], budget: int, lookahead: int = LOOKAHEAD) -> Iterator[list[int]]:
    """Indices of items, each once, in packs whose lengths sum to at most `budget`.

    Best fit over a buffer of `lookahead` items: a pack opens with the oldest item waiting, so that none starves, and
    takes the longest that still fits until none does. It depends on `lengths` and their order alone.

    Raises `ValueError` when an item is longer than the budget.
    """
    waiting: list[tuple[int, int]] = []  # (length, -index): of equal lengths the oldest is found first
    oldest: dict[int, int] = {}  # index -> length, in order of arrival
    items = iter(enumerate(lengths))
    while True:
        for index, length in items:
            if length > budget:
                raise ValueError(f"item {index} of {length} tokens exceeds the budget of {budget}")
            insort(waiting, (length, -index))
            oldest[index] = length
            if len(waiting) == lookahead:
                break
        if not waiting:
            return
        index, length = next(iter(oldest.items()))
        waiting.remove((length, -index))
        del oldest[index]
        members, room = [index], budget - length
        while place := bisect_right(waiting, (room, 0)):
            length, negative = waiting.pop(place - 1)
            members.append(-negative)
            del oldest[-negative]
            room -= length
        yield members


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
