"""Packs and batches: every item once, no budget exceeded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmkit.batching import bucketed, length_batches, pack, pad

lengths_strategy = st.lists(st.integers(1, 50), max_size=80)


@given(lengths_strategy, st.integers(50, 120), st.integers(1, 30))
def test_packs_hold_each_item_once_within_the_budget(lengths, budget, lookahead):
    packs = list(pack(lengths, budget, lookahead))
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= budget for members in packs)


@given(lengths_strategy, st.integers(50, 120), st.integers(1, 30))
def test_a_pack_opens_with_the_oldest_item_left(lengths, budget, lookahead):
    left = set(range(len(lengths)))
    for members in pack(lengths, budget, lookahead):
        assert members[0] == min(left)
        left -= set(members)


@given(lengths_strategy, st.integers(50, 120))
def test_nothing_that_would_fit_is_left_waiting(lengths, budget):
    left = dict(enumerate(lengths))
    for members in pack(lengths, budget, lookahead=len(lengths) + 1):
        room = budget - sum(left.pop(index) for index in members)
        assert all(length > room for length in left.values())


def test_best_fit_fills():
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(4.5, 0.7, 4000).astype(int) + 3, 512).tolist()
    packs = list(pack(lengths, 8192))
    assert sum(lengths) / (len(packs) * 8192) > 0.98


def test_an_item_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="exceeds the budget"):
        list(pack([3, 11], 10))


@given(lengths_strategy, st.integers(1, 200))
def test_length_batches_hold_each_row_once_within_the_budget(lengths, budget):
    batches = length_batches(np.array(lengths, dtype=np.int64), budget)
    assert sorted(int(index) for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget


@given(lengths_strategy, st.integers(1, 200))
def test_equal_batches_hold_rows_of_one_length(lengths, budget):
    batches = length_batches(np.array(lengths, dtype=np.int64), budget, equal=True)
    assert sorted(int(index) for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len({lengths[index] for index in batch}) == 1 for batch in batches)
    assert all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= budget for batch in batches)


@given(lengths_strategy, st.integers(50, 200), st.integers(1, 30))
def test_buckets_hold_each_item_once_within_the_budget(lengths, budget, lookahead):
    batches = list(bucketed(lengths, budget, lookahead))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[index] for index in batch) <= budget for batch in batches)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6))
def test_padding_keeps_each_row(rows):
    input_ids, attention_mask = pad([np.array(row) for row in rows], pad_id=0)
    assert input_ids.shape == attention_mask.shape == (len(rows), max(map(len, rows)))
    for row, ids, mask in zip(rows, input_ids, attention_mask, strict=True):
        assert ids[mask == 1].tolist() == row
        assert (ids[mask == 0] == 0).all()
