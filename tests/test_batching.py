"""Packs and batches: every item once, no budget exceeded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmkit.batching import bucketed, length_batches, pack, pad

lengths_strategy = st.lists(st.integers(1, 50), max_size=80)


@given(lengths_strategy, st.integers(50, 120), st.integers(1, 30), st.none() | st.integers(1, 6))
def test_packs_hold_each_item_once_within_the_budget(lengths, budget, open_packs, max_members):
    packs = list(pack(lengths, budget, open_packs=open_packs, max_members=max_members))
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= budget for members in packs)
    assert all(members == sorted(members) for members in packs)
    assert max_members is None or all(len(members) <= max_members for members in packs)


@given(lengths_strategy, st.integers(50, 120))
def test_a_pack_opens_only_when_no_other_has_room(lengths, budget):
    """And an item goes to the fullest pack that has room."""
    packs = list(pack(lengths, budget, open_packs=len(lengths) + 1))
    place = {index: number for number, members in enumerate(packs) for index in members}
    rooms = [budget] * len(packs)
    for index, length in enumerate(lengths):
        opened = {place[earlier] for earlier in range(index)}
        fitting = [rooms[number] for number in opened if rooms[number] >= length]
        if fitting:
            assert place[index] in opened
            assert rooms[place[index]] == min(fitting)
        else:
            assert place[index] not in opened
        rooms[place[index]] -= length


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
def test_best_fit_fills_with_a_sample_of_all_lengths(budget):
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(4.5, 0.7, 16_384).astype(int) + 3, 512).tolist()
    packs = list(pack(lengths, budget))
    assert sum(lengths) / (len(packs) * budget) > 0.99
    counts = [len(members) for members in packs[:-1]]  # the last may be nearly empty
    assert max(counts) < 1.6 * np.mean(counts)


def test_a_bound_on_members_is_no_bound_on_what_is_packed():
    assert list(pack([1] * 7, 100, max_members=3)) == [[0, 1, 2], [3, 4, 5], [6]]


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
