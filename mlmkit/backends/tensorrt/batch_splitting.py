"""Splits batches that are larger than any profile of a TensorRT plan."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlmkit.artifact import Profile
from mlmkit.backends.protocol import Batch


class Shape(NamedTuple):
    """The sizes of a batch: rows, tokens per row, masked positions."""

    batch: int
    seq: int
    masked: int


def shape_of(batch: Batch) -> Shape:
    """The sizes of a batch."""
    rows, seq = batch.input_ids.shape
    return Shape(rows, seq, len(batch.positions))


def split_batch(batch: Batch, profile: Profile) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """Parts that fit the profile, each with the indices into `masked` that it scores; every index comes once.

    A batch that fits is returned unchanged. Otherwise rows without a position are left out, and the positions of one
    row are split only if it has more than the profile takes. Rows cannot be shortened: `seq` must fit.
    """
    max_rows, max_masked = profile.batch[2], profile.masked[2]
    if len(batch.input_ids) <= max_rows and len(batch.positions) <= max_masked:
        yield np.arange(len(batch.positions)), batch
        return
    seq = batch.input_ids.shape[1]
    row_of = batch.positions // seq
    order = np.argsort(row_of, kind="stable")
    begin = 0
    while begin < len(order):
        part = order[begin : begin + max_masked]
        rows, row_in_part = np.unique(row_of[part], return_inverse=True)
        ends_with_row = len(part) == len(order) - begin or row_of[order[begin + len(part)]] != rows[-1]
        count = min(max_rows, len(rows) - (not ends_with_row and len(rows) > 1))
        part = part[row_in_part < count]
        rows, row_in_part = rows[:count], row_in_part[: len(part)]
        positions = row_in_part * seq + batch.positions[part] % seq
        yield part, Batch(batch.input_ids[rows], batch.attention_mask[rows], positions, batch.targets[part])
        begin += len(part)


def largest_profile(profiles: Sequence[Profile], seq: int) -> Profile:
    """The profile to split to: of those that take rows of `seq` tokens, the one with the most rows."""
    return max((profile for profile in profiles if profile.seq[2] >= seq), key=lambda profile: profile.batch[2])


def first_profile(profiles: Sequence[Profile], shape: Shape) -> int:
    """The index of the first profile that takes the shape."""
    return next(
        index
        for index, profile in enumerate(profiles)
        if all(size <= getattr(profile, axis)[2] for axis, size in shape._asdict().items())
    )
