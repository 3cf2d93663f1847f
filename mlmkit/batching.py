"""Group windows into batches: packs with a token budget for training, length-sorted batches for evaluation."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

BATCH_TOKENS = {"cpu": 1024, "cuda": 65536}  # on a CPU larger batches leave the cache: docs/decisions.md
# What a call of a model costs besides its tokens, in tokens. BERT-base takes 62 ms and 3.1 ms per token on a core; a
# GPU takes some milliseconds, in which it could read thousands of tokens (estimated).
CALL_TOKENS = {"cpu": 20, "cuda": 2048}
OPEN_PACKS = 32
LOOKAHEAD = 1024


def pack(
    lengths: Iterable[int], budget: int, *, max_members: int | None = None, open_packs: int = OPEN_PACKS
) -> Iterator[list[int]]:
    """Yield packs of item indices, each item once, with at most `max_members` and `budget` tokens per pack.

    Best fit (Johnson 1974), in order of arrival: an item goes to the fullest open pack with room for it. If none has
    room, a new pack opens, after the fullest of `open_packs` has been closed. So each pack is a sample of all lengths,
    and no item waits for long. The packs depend only on `lengths` and their order.

    Raises `ValueError` if an item is longer than the budget.
    """
    rooms: list[int] = []  # free tokens of each open pack, ascending
    packs: list[list[int]] = []
    for index, length in enumerate(lengths):
        fullest = bisect_left(rooms, length)
        if fullest < len(rooms):
            room, members = rooms.pop(fullest), packs.pop(fullest)
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
            rank = bisect_left(rooms, room)
            rooms.insert(rank, room)
            packs.insert(rank, members)
    yield from packs


def length_batches(
    lengths: NDArray[np.int64], budget: int, *, equal: bool = False, call_tokens: float = math.inf
) -> list[NDArray[np.int64]]:
    """Return batches of row indices of similar length, each row once: `rows * longest <= budget`, or a single row.

    A batch ends early where another batch, which costs `call_tokens`, saves more than that in padding. With `equal`,
    all rows of a batch have the same length, so there is no padding. The longest come first, so that memory peaks at
    the start and not at the end. The batches depend only on the arguments.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    batches, begin = [], 0
    while begin < len(order):
        longest = int(descending[begin])
        rows = descending[begin : begin + max(budget // max(longest, 1), 1)]
        if equal:
            rows = rows[rows == longest]
        # The padding that the rows from each one on would not have in a batch of their own.
        while (saved := (longest - rows) * np.arange(len(rows), 0, -1)).max() > call_tokens:
            rows = rows[: saved.argmax()]
        batches.append(order[begin : begin + len(rows)])
        begin += len(rows)
    return batches


def bucketed(lengths: Sequence[int], budget: int, lookahead: int = LOOKAHEAD) -> Iterator[list[int]]:
    """Yield padded batches where `pack` cannot be used: `length_batches` over successive runs of `lookahead` items."""
    for begin in range(0, len(lengths), lookahead):
        stretch = np.asarray(lengths[begin : begin + lookahead], dtype=np.int64)
        for batch in length_batches(stretch, budget):
            yield (begin + batch).tolist()


def pad(rows: Sequence[NDArray[np.int64]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad rows to `input_ids` and `attention_mask`, both `[rows, longest]` int64."""
    lengths = np.array([len(row) for row in rows])
    attention_mask = (np.arange(lengths.max(initial=0)) < lengths[:, None]).astype(np.int64)
    input_ids = np.full(attention_mask.shape, pad_id, dtype=np.int64)
    input_ids[attention_mask.astype(bool)] = np.concatenate(rows)
    return input_ids, attention_mask
