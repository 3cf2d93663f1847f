"""How fast mask-v1 is: masks and digest of a million tokens, by document length.

Compare with the tokens per second of training and evaluation: masking must be a small part of their time.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
from harness import Report, alternate, main, table, timed

from mlmkit.masking import MaskRecipe, MaskVocabulary, corrupt, mask_digest

LENGTHS = (20, 100, 500)
VOCABULARY = MaskVocabulary.build(np.arange(30_000), frozenset(range(5)), 4)


def masker(tokens: int, length: int, *, whole_word: bool) -> Callable[[], float]:
    """A function that masks documents of one length and returns the seconds that it took."""
    generator = np.random.default_rng(0)
    count = tokens // length
    ids = generator.integers(5, 30_000, count * length)
    keys = generator.integers(0, 2**63, count).astype(np.uint64)
    lengths = np.full(count, length)
    words = np.tile(np.arange(length) // 2, count)
    recipe = MaskRecipe(whole_word=whole_word)

    def mask() -> None:
        mask_digest(corrupt(ids, lengths, keys, recipe, VOCABULARY, seed=0, words=words), lengths, keys)

    return partial(timed, mask)


def measure(options: argparse.Namespace) -> Report:
    maskers = {
        f"{length} tokens{', whole words' * whole_word}": masker(options.tokens, length, whole_word=whole_word)
        for length in LENGTHS
        for whole_word in (False, True)
    }
    taken = alternate(maskers, options.rounds)
    seconds = {name: [time * 1e6 / options.tokens for time in times] for name, times in taken.items()}
    rows = [
        {"documents of": name, "seconds per million tokens": median(times), "tokens/s": 1e6 / median(times)}
        for name, times in seconds.items()
    ]
    return Report([table("", rows)], (), {"mask_seconds_a_million_tokens": median(seconds["100 tokens"])}, seconds)


if __name__ == "__main__":
    main(__doc__, measure, tokens=(1_000_000, 10_000), rounds=(5, 1))
