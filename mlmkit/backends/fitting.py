"""Making any batch fit the shapes that a plan was built for: what is too large is split."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlmkit.artifact import Profile
from mlmkit.backends import Batch


class Shape(NamedTuple):
    """The three sizes that vary."""

    batch: int
    seq: int
    masked: int


def shape_of(batch: Batch) -> Shape:
    """The sizes of a batch."""
    rows, seq = batch.input_ids.shape
    return Shape(rows, seq, len(batch.positions))


def split(batch: Batch, largest: Profile) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """Parts that `largest` holds, each with the indices into `masked` that it answers; every index comes once.

    A batch that fits comes back as it is. Otherwise rows without a position are left out, and a row is cut between
    positions only if it alone has more than the profile takes. The sequence cannot be split: its length must fit.
    """
    rows_at_most, masked_at_most = largest.batch[2], largest.masked[2]
    if len(batch.input_ids) <= rows_at_most and len(batch.positions) <= masked_at_most:
        yield np.arange(len(batch.positions)), batch
        return
    seq = batch.input_ids.shape[1]
    row = batch.positions // seq
    order = np.argsort(row, kind="stable")
    begin = 0
    while begin < len(order):
        part = order[begin : begin + masked_at_most]
        rows, place = np.unique(row[part], return_inverse=True)
        whole = len(part) == len(order) - begin or row[order[begin + len(part)]] != rows[-1]
        room = min(rows_at_most, len(rows) - (not whole and len(rows) > 1))
        part = part[place < room]
        rows, place = rows[:room], place[: len(part)]
        positions = place * seq + batch.positions[part] % seq
        yield part, Batch(batch.input_ids[rows], batch.attention_mask[rows], positions, batch.targets[part])
        begin += len(part)


def widest(profiles: Sequence[Profile], seq: int) -> Profile:
    """The profile to split to: of those that hold rows of this length, the one with the most rows."""
    return max((profile for profile in profiles if profile.seq[2] >= seq), key=lambda profile: profile.batch[2])


def choose(profiles: Sequence[Profile], shape: Shape) -> int:
    """The index of the first profile that holds the shape."""
    return next(
        index
        for index, profile in enumerate(profiles)
        if all(size <= getattr(profile, axis)[2] for axis, size in shape._asdict().items())
    )
