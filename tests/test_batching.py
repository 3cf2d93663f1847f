"""Packs, batches, and parts of batches that fit a TensorRT profile: every item once, no budget exceeded."""

import math
from collections.abc import Iterable, Sized

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmkit.artifact import Profile
from mlmkit.backends import Batch
from mlmkit.backends.tensorrt.batch_splitting import shape_of, split_batch
from mlmkit.batching import bucketed, length_batches, pack, pad

lengths_strategy = st.lists(st.integers(1, 50), max_size=80)


def is_partition(groups: Iterable[Iterable[int]], items: Sized) -> bool:
    """Whether each item's index is in one group, once."""
    return sorted(int(index) for group in groups for index in group) == list(range(len(items)))


@given(lengths_strategy, st.integers(50, 120), st.integers(1, 30), st.none() | st.integers(1, 6))
def test_packs_hold_each_item_once_within_the_budget(lengths, budget, open_packs, max_members):
    packs = list(pack(lengths, budget, open_packs=open_packs, max_members=max_members))
    assert is_partition(packs, lengths)
    assert all(0 < sum(lengths[index] for index in members) <= budget for members in packs)
    assert all(members == sorted(members) for members in packs)
    assert max_members is None or all(len(members) <= max_members for members in packs)


@given(lengths_strategy, st.integers(50, 120))
def test_a_pack_opens_only_when_no_other_has_room(lengths, budget):
    """And an item goes to the fullest pack that has room."""
    packs = list(pack(lengths, budget, open_packs=len(lengths) + 1))
    pack_of = {index: number for number, members in enumerate(packs) for index in members}
    rooms = [budget] * len(packs)
    for index, length in enumerate(lengths):
        opened = {pack_of[earlier] for earlier in range(index)}
        fitting = [rooms[number] for number in opened if rooms[number] >= length]
        assert (pack_of[index] in opened) == bool(fitting)
        assert not fitting or rooms[pack_of[index]] == min(fitting)
        rooms[pack_of[index]] -= length


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


@given(lengths_strategy, st.integers(1, 200), st.booleans(), st.sampled_from([0, 5, math.inf]))
def test_length_batches_hold_each_row_once_within_the_budget(lengths, budget, equal, call_tokens):
    """And rows of one length alone, with `equal` or calls that cost nothing."""
    batches = length_batches(np.array(lengths, dtype=np.int64), budget, equal=equal, call_tokens=call_tokens)
    assert is_partition(batches, lengths)
    for batch in batches:
        widths = {lengths[index] for index in batch}
        assert len(batch) == 1 or len(batch) * max(widths) <= budget
        assert len(widths) == 1 or not (equal or call_tokens == 0)


def test_few_rows_of_unlike_lengths_are_not_padded_to_one_another():
    """A call costs as much as 20 tokens; the least cost of these lengths, by trying all batches, is 320."""
    lengths = np.array([100, 20, 98, 18, 19, 3], dtype=np.int64)
    batches = length_batches(lengths, 1024, call_tokens=20)
    assert [batch.tolist() for batch in batches] == [[0, 2], [1, 4, 3, 5]]


@given(lengths_strategy, st.integers(50, 200), st.integers(1, 30))
def test_buckets_hold_each_item_once_within_the_budget(lengths, budget, lookahead):
    batches = list(bucketed(lengths, budget, lookahead))
    assert is_partition(batches, lengths)
    assert all(len(batch) * max(lengths[index] for index in batch) <= budget for batch in batches)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6))
def test_padding_keeps_each_row(rows):
    input_ids, attention_mask = pad([np.array(row) for row in rows], pad_id=0)
    assert input_ids.shape == attention_mask.shape == (len(rows), max(map(len, rows)))
    for row, ids, mask in zip(rows, input_ids, attention_mask, strict=True):
        assert ids[mask == 1].tolist() == row
        assert (ids[mask == 0] == 0).all()


@st.composite
def batches_strategy(draw: st.DrawFn) -> Batch:
    rows, seq = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    positions = draw(st.lists(st.integers(0, rows * seq - 1), max_size=40))
    ids = np.arange(rows * seq).reshape(rows, seq)
    return Batch(ids, np.ones_like(ids), np.array(positions, dtype=np.int64), np.arange(len(positions)))


def answer(batch: Batch) -> np.ndarray:
    """What identifies a position's row, column and target; a stand-in for its log-probability."""
    row, column = np.divmod(batch.positions, batch.input_ids.shape[1])
    ids = batch.input_ids
    return np.stack([ids[row, 0], ids[row, column], batch.attention_mask[row].sum(1), batch.targets], 1)


@settings(max_examples=300, deadline=None)
@given(batches_strategy(), st.integers(1, 6), st.integers(1, 12))
def test_parts_for_a_profile_fit_and_answer_every_position_once(batch, max_batch, max_masked):
    parts = list(split_batch(batch, Profile("only", (1, 1, max_batch), (1, 1, 9), (1, 1, max_masked))))
    assert is_partition([index for index, _ in parts], batch.positions)
    for index, part in parts:
        shape = shape_of(part)
        assert 1 <= shape.batch <= max_batch and shape.masked == len(index) <= max_masked
        assert (answer(part) == answer(batch)[index]).all()
    counts = np.bincount(batch.positions // batch.input_ids.shape[1], minlength=1)
    if counts.max() <= max_masked and len(parts) > 1:  # no row alone is too much, so none is computed twice
        assert sum(len(part.input_ids) for _, part in parts) == np.count_nonzero(counts)
