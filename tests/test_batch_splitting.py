"""Splitting to a profile: no position is lost, none is answered by another, and all parts fit."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmkit.artifact import Profile
from mlmkit.backends import Batch
from mlmkit.backends.tensorrt.batch_splitting import shape_of, split_batch

sizes = st.integers(1, 9)
batches = st.builds(
    lambda rows, seq, picks: Batch(
        np.arange(rows * seq).reshape(rows, seq),
        np.ones((rows, seq), dtype=np.int64),
        np.array([pick % (rows * seq) for pick in picks], dtype=np.int64),
        np.arange(len(picks)),
    ),
    sizes,
    sizes,
    st.lists(st.integers(0, 80), max_size=40),
)


def answer(batch: Batch) -> np.ndarray:
    """What identifies a position's row, place and target; a stand-in for its log-probability."""
    seq = batch.input_ids.shape[1]
    row, column = np.divmod(batch.positions, seq)
    return np.stack([batch.input_ids[row, 0], batch.input_ids[row, column], batch.attention_mask[row].sum(1)], 1)


@settings(max_examples=300, deadline=None)
@given(batches, st.integers(1, 6), st.integers(1, 12))
def test_parts_fit_and_answer_every_position_once(batch, max_batch, max_masked):
    profile = Profile("only", (1, 1, max_batch), (1, 1, 9), (1, 1, max_masked))
    found = np.full((len(batch.positions), 3), -1)
    targets = np.full(len(batch.positions), -1)
    times = np.zeros(len(batch.positions), dtype=int)
    for index, part in split_batch(batch, profile):
        shape = shape_of(part)
        assert 1 <= shape.batch <= max_batch and shape.masked == len(index) <= max_masked
        found[index], targets[index] = answer(part), part.targets
        times[index] += 1
    assert (times == 1).all()
    assert (found == answer(batch)).all() and (targets == batch.targets).all()
    counts = np.bincount(batch.positions // batch.input_ids.shape[1], minlength=1)
    if counts.max() <= max_masked:  # no row alone is too much, so none is computed twice
        parts = [part for _, part in split_batch(batch, profile)]
        if len(parts) > 1:
            assert sum(len(part.input_ids) for part in parts) == np.count_nonzero(counts)
