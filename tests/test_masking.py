"""mask-v1: test vectors, comparison with a literal implementation of the specification, invariances."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmkit.errors import UserError
from mlmkit.masking import (
    DIGEST_MODULUS,
    MaskRecipe,
    MaskVocabulary,
    corrupt,
    document_key,
    format_digest,
    mask_digest,
    random_words,
)

TEXT = "O rato roeu a roupa do rei de Roma."
IDS = np.arange(10, 30)
WORDS = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 7, 7, 8, 9, 9, 9, 9, 10])
VOCABULARY = MaskVocabulary.build(np.arange(100), frozenset(range(5)), 4)

# docs/masking.md: seed, epoch, recipe → selected, what differs from IDS, digest
VECTORS = [
    (0, 0, MaskRecipe(), [0, 3, 15], {0: 4, 3: 4, 15: 29}, "1c044900ad748e10e57622261079d324"),
    (1, 0, MaskRecipe(), [1], {1: 4}, "5ca817c3b77e4c34a5cafa0dc6eacfe8"),
    (0, 1, MaskRecipe(), [0, 3, 13, 15], {0: 4, 3: 4, 13: 6, 15: 4}, "ff2607baaa3c31ff40cb425041aa793a"),
    (
        2**64 - 1,
        3,
        MaskRecipe(0.5, 0.5, 0.5),
        [0, 2, 3, 7, 8, 9, 10, 13, 16, 18, 19],
        {0: 4, 2: 47, 3: 62, 7: 43, 8: 94, 9: 4, 10: 4, 13: 88, 16: 4, 18: 62, 19: 4},
        "8c4b6116d5e68e7dcf3fa5c014c19fdb",
    ),
    (7, 0, MaskRecipe(0.3, whole_word=True), [6, 11], {6: 4, 11: 4}, "db4a3767649ca7313285a046dc0849eb"),
]

documents_strategy = st.lists(
    st.tuples(st.text(max_size=8), st.lists(st.integers(0, 99), max_size=40)), min_size=1, max_size=8
)
recipes = st.builds(
    lambda mask, replace, share, whole: MaskRecipe(mask, replace, (1 - replace) * share, whole),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 0.999),
    st.booleans(),
)


def words_of(length: int) -> np.ndarray:
    """Words of one to three tokens."""
    return np.repeat(np.arange(length), np.arange(length) % 3 + 1)[:length]


def run(documents, recipe, seed=0, epoch=0):
    lengths = np.array([len(ids) for _, ids in documents], dtype=np.int64)
    keys = np.array([document_key(text) for text, _ in documents], dtype=np.uint64)
    ids = np.array([id for _, ids in documents for id in ids], dtype=np.int64)
    words = np.concatenate([words_of(n) for n in lengths])
    corruption = corrupt(ids, lengths, keys, recipe, VOCABULARY, seed=seed, epoch=epoch, words=words)
    return corruption, lengths, keys


def naive(text, ids, recipe, seed, epoch):
    """Implement docs/masking.md literally, one token at a time."""
    key = np.array([seed, document_key(text)], dtype=np.uint64)
    counter = np.array([0, 0, 0, epoch], dtype=np.uint64)
    w = [int(word) for word in np.random.Philox(counter=counter, key=key).random_raw(2 * len(ids))] if ids else []
    words, out, selected = words_of(len(ids)).tolist(), list(ids), []
    for i, id in enumerate(ids):
        first = words.index(words[i]) if recipe.whole_word else i
        if id < 5 or not w[2 * first] >> 11 < math.floor(recipe.mask_prob * 2**53):
            continue
        selected.append(i)
        t = w[2 * i + 1] >> 32
        if t < math.floor(recipe.replace_prob * 2**32):
            out[i] = 4
        elif t < math.floor((recipe.replace_prob + recipe.random_prob) * 2**32):
            out[i] = 5 + (((w[2 * i + 1] & 0xFFFFFFFF) * 95) >> 32)
    return selected, out


def test_document_key_and_first_words():
    key = document_key(TEXT)
    assert key == 0xF24F9D8D0AEF50DE
    words = random_words(np.array([key], dtype=np.uint64), np.array([1]), np.array([0]), 0, 0)
    assert words.tolist() == [2167471387915090303, 7971761222661504600]


@pytest.mark.parametrize(("seed", "epoch", "recipe", "selected", "changes", "digest"), VECTORS)
def test_vectors(seed, epoch, recipe, selected, changes, digest):
    lengths, keys = np.array([20]), np.array([document_key(TEXT)], dtype=np.uint64)
    found = corrupt(IDS, lengths, keys, recipe, VOCABULARY, seed=seed, epoch=epoch, words=WORDS)
    assert found.selected.tolist() == selected
    assert found.input_ids.tolist() == [changes.get(offset, 10 + offset) for offset in range(20)]
    assert format_digest(mask_digest(found, lengths, keys)) == digest


@given(documents_strategy, recipes, st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_agrees_with_a_naive_reading_of_the_specification(documents, recipe, seed, epoch):
    corruption, lengths, _ = run(documents, recipe, seed, epoch)
    begin = 0
    for (text, ids), length in zip(documents, lengths, strict=True):
        selected, out = naive(text, ids, recipe, seed, epoch)
        here = corruption.selected[(corruption.selected >= begin) & (corruption.selected < begin + length)]
        assert (here - begin).tolist() == selected
        assert corruption.input_ids[begin : begin + length].tolist() == out
        begin += length


@given(documents_strategy, recipes, st.randoms())
def test_order_and_sharding_change_neither_masks_nor_digest(documents, recipe, random):
    whole, lengths, keys = run(documents, recipe)
    digest = mask_digest(whole, lengths, keys)
    by_document = [part.tolist() for part in np.split(whole.input_ids, np.cumsum(lengths)[:-1])]
    order = list(range(len(documents)))
    random.shuffle(order)
    cut = random.randint(0, len(order))
    total = 0
    for shard in (order[:cut], order[cut:]):
        if shard:
            found, shard_lengths, shard_keys = run([documents[index] for index in shard], recipe)
            total += mask_digest(found, shard_lengths, shard_keys)
            split = np.split(found.input_ids, np.cumsum(shard_lengths)[:-1])
            assert [part.tolist() for part in split] == [by_document[index] for index in shard]
    assert total % DIGEST_MODULUS == digest


@given(st.lists(st.integers(0, 99), min_size=1, max_size=60), st.integers(1, 20), recipes, st.integers(0, 3))
def test_windows_of_any_length_get_the_masks_of_the_document(ids, window, recipe, epoch):
    recipe = MaskRecipe(recipe.mask_prob, recipe.replace_prob, recipe.random_prob)
    key = np.array([document_key(TEXT)], dtype=np.uint64)
    array = np.array(ids, dtype=np.int64)
    whole = corrupt(array, np.array([len(ids)]), key, recipe, VOCABULARY, seed=3, epoch=epoch)
    starts = np.arange(0, len(ids), window)
    lengths = np.minimum(window, len(ids) - starts)
    windowed = corrupt(
        array, lengths, np.repeat(key, len(starts)), recipe, VOCABULARY, seed=3, epoch=epoch, starts=starts
    )
    assert windowed.input_ids.tolist() == whole.input_ids.tolist()
    assert windowed.selected.tolist() == whole.selected.tolist()


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([0.05, 0.15, 0.3, 0.5]), st.sampled_from([0.0, 0.5, 0.8]), st.integers(0, 2**64 - 1))
def test_rates_converge_to_the_recipe(mask_prob, replace_prob, seed):
    recipe = MaskRecipe(mask_prob, replace_prob, 0.1)
    count, length = 400, 500
    keys = np.array([document_key(str(index)) for index in range(count)], dtype=np.uint64)
    ids = np.full(count * length, 7)
    found = corrupt(ids, np.full(count, length), keys, recipe, VOCABULARY, seed=seed)

    def near(share, expected, size):
        return abs(share - expected) <= 6 * math.sqrt(expected * (1 - expected) / size) + 1e-12  # six sigma

    total, put = len(found.selected), found.input_ids[found.selected]
    assert near(total / len(ids), mask_prob, len(ids))
    assert near((put == 4).mean(), replace_prob, total)
    assert near(((put != 4) & (put != 7)).mean(), 0.1 * 94 / 95, total)


def test_a_token_without_a_word_is_its_own():
    arguments = (IDS, np.array([20]), np.array([document_key(TEXT)], dtype=np.uint64))
    alone = corrupt(*arguments, MaskRecipe(0.4, whole_word=True), VOCABULARY, seed=1, words=np.full(20, -1))
    by_token = corrupt(*arguments, MaskRecipe(0.4), VOCABULARY, seed=1)
    assert alone.selected.tolist() == by_token.selected.tolist()


@pytest.mark.parametrize(
    "probabilities", [(-0.1,), (1.1,), (math.nan,), (0.15, math.inf), (0.15, 0.8, -1e-9), (0.15, 0.8, 0.3)]
)
def test_impossible_recipes_are_refused(probabilities):
    with pytest.raises(UserError, match="must"):
        MaskRecipe(*probabilities)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(UserError, match="between 0"):
        corrupt(IDS, np.array([20]), np.zeros(1, dtype=np.uint64), MaskRecipe(), VOCABULARY, seed=seed)
