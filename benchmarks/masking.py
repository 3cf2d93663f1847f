"""How fast mask-v1 is: seconds for a million tokens, masks and digest, by length of document."""

import time
from statistics import median

import numpy as np

from mlmkit.masking import MaskRecipe, MaskVocabulary, corrupt, mask_digest

TOKENS = 1_000_000
REPEATS = 5
VOCABULARY = MaskVocabulary.build(np.arange(30_000), frozenset(range(5)), 4)


def seconds(length: int, *, whole_word: bool) -> float:
    """Median over the repeats."""
    generator = np.random.default_rng(0)
    count = TOKENS // length
    ids = generator.integers(5, 30_000, TOKENS)
    keys = generator.integers(0, 2**63, count).astype(np.uint64)
    lengths = np.full(count, length)
    words = np.tile(np.arange(length) // 2, count)
    recipe = MaskRecipe(whole_word=whole_word)
    taken = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        mask_digest(corrupt(ids, lengths, keys, recipe, VOCABULARY, seed=0, words=words), lengths, keys)
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


if __name__ == "__main__":
    print("tokens a document   seconds a million tokens   with whole words")  # noqa: T201
    for length in (20, 100, 500):
        by_token, by_word = seconds(length, whole_word=False), seconds(length, whole_word=True)
        print(f"{length:17}   {by_token:24.2f}   {by_word:16.2f}")  # noqa: T201
