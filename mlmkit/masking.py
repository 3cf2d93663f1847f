"""mask-v1: which tokens are masked, and with what, as a pure function of the data.

A document's corruption depends only on its text, its token ids, the recipe, the seed and the epoch: not on the batch,
the window, the worker, the rank or the order. `docs/masking.md` is the specification, with test vectors for other
implementations.

Shapes: a batch of documents (or of spans of documents) is flat. `ids` is `[tokens]`, `lengths` and `keys` are
`[documents]`, and document d owns the next `lengths[d]` entries of `ids`.
"""

from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import floor

import numpy as np
from numpy.typing import NDArray

from mlmkit.errors import UserError

ALGORITHM = "mask-v1"
DIGEST_MODULUS = 1 << 128


@dataclass(frozen=True)
class MaskRecipe:
    """What share of tokens is selected, and what replaces them.

    Of the selected tokens a share of `replace_prob` becomes the mask token, `random_prob` a random ordinary token, and
    the rest stay unchanged. With `whole_word`, a token is selected if the first token of its word is.

    Raises `UserError` for a probability outside [0, 1], NaN, or treatments that sum to more than 1.
    """

    mask_prob: float = 0.15
    replace_prob: float = 0.8
    random_prob: float = 0.1
    whole_word: bool = False

    def __post_init__(self) -> None:
        for name in ("mask_prob", "replace_prob", "random_prob"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:  # also false for NaN
                raise UserError(f"{name} must be between 0 and 1, not {value}")
        total = self.replace_prob + self.random_prob
        if total > 1.0 + 1e-12:
            raise UserError(f"replace_prob + random_prob must not exceed 1, but they sum to {total:g}")

    def describe(self) -> dict[str, float | bool | str]:
        """Return the recipe as it is stored in `result.json` and the manifest."""
        return {"algorithm": ALGORITHM, **asdict(self)}


@dataclass(frozen=True)
class MaskVocabulary:
    """What mask-v1 needs to know about a tokenizer.

    `is_special` is `[max id + 1]` bool. `ordinary` `[ordinary]` int64 is every id that is not special, ascending.
    """

    mask_id: int
    is_special: NDArray[np.bool_]
    ordinary: NDArray[np.int64]

    @classmethod
    def build(cls, ids: NDArray[np.int64], special_ids: frozenset[int], mask_id: int) -> "MaskVocabulary":
        """Build it from all vocabulary ids, in any order, and the special ones among them."""
        is_special = np.zeros(int(ids.max()) + 1, dtype=np.bool_)
        is_special[sorted(special_ids)] = True
        ordinary = np.unique(ids)
        ordinary = ordinary[~is_special[ordinary]]
        return cls(mask_id, is_special, ordinary)


@dataclass(frozen=True)
class Corruption:
    """`input_ids` `[tokens]` is what the model sees; `selected` `[masked]`, ascending, indexes the flat tokens."""

    input_ids: NDArray[np.int64]
    selected: NDArray[np.int64]


def document_key(text: str) -> int:
    """Return the document's 64-bit key: blake2b of its UTF-8 bytes, read as a little-endian integer."""
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def random_words(
    keys: NDArray[np.uint64], lengths: NDArray[np.int64], starts: NDArray[np.int64], seed: int, epoch: int
) -> NDArray[np.uint64]:
    """Two raw Philox words per token, `[2 * tokens]`, for tokens `starts[d] : starts[d] + lengths[d]` per document.

    Word j of a document comes from Philox block j // 4, so a span in the middle of a long document starts its counter
    there instead of drawing everything before it. Raises `UserError` for a seed or epoch outside 64 bits.
    """
    if not (0 <= seed < 1 << 64 and 0 <= epoch < 1 << 64):
        raise UserError(f"seed and epoch must be between 0 and 2**64 - 1, not {seed} and {epoch}")
    words = np.empty(2 * int(lengths.sum()), dtype=np.uint64)
    # Resetting a generator's state takes 5 us, constructing one per document 15. The arrays are uint64 from the start:
    # numpy silently turns a list such as [0, 2**63] into float64, and the key would lose its low bits.
    generator = np.random.Philox(0)
    state = generator.state
    state["buffer_pos"] = 4  # the buffer of four words is used up
    counter, philox_key = state["state"]["counter"], state["state"]["key"]
    philox_key[0] = seed
    end = 0
    for key, length, start in zip(keys.tolist(), lengths.tolist(), starts.tolist(), strict=True):
        block, skipped = divmod(2 * start, 4)
        counter[:] = (block, 0, 0, epoch)
        philox_key[1] = key
        generator.state = state
        begin, end = end, end + 2 * length
        words[begin:end] = generator.random_raw(skipped + 2 * length)[skipped:]
    return words


def corrupt(
    ids: NDArray[np.integer],
    lengths: NDArray[np.int64],
    keys: NDArray[np.uint64],
    recipe: MaskRecipe,
    vocabulary: MaskVocabulary,
    *,
    seed: int,
    epoch: int = 0,
    starts: NDArray[np.int64] | None = None,
    words: NDArray[np.integer] | None = None,
    word_starts: NDArray[np.int64] | None = None,
) -> Corruption:
    """Select and replace tokens of a batch of documents, as mask-v1 defines.

    `ids` `[tokens]` are without added special tokens. `starts` `[documents]` is the offset in the document at which a
    span begins (default 0). `recipe.whole_word` needs `words` `[tokens]`, the word index of each token. For a span that
    begins inside a word it also needs `word_starts` `[documents]`, the offset of that word's first token.

    Raises `UserError` as `random_words` does, and `ValueError` if `words` is missing.
    """
    starts = np.zeros_like(lengths) if starts is None else starts
    drawn = random_words(keys, lengths, starts, seed, epoch).reshape(-1, 2)
    input_ids = ids.astype(np.int64)

    draws = drawn[:, 0]
    if recipe.whole_word and word_starts is not None and (cut := np.flatnonzero(word_starts < starts)).size:
        draws = draws.copy()  # the first token of such a span takes the draw of its word's first token
        draws[(np.cumsum(lengths) - lengths)[cut]] = random_words(
            keys[cut], np.ones_like(cut), word_starts[cut], seed, epoch
        )[::2]
    passes = draws >> np.uint64(11) < np.uint64(floor(recipe.mask_prob * 2**53))
    if recipe.whole_word:
        if words is None:
            raise ValueError("whole-word masking needs the word index of each token")
        passes = passes[first_token_of_word(words, lengths)]
    selected = np.flatnonzero(passes & ~vocabulary.is_special[input_ids])

    treatment = drawn[selected, 1]
    draw, pick = treatment >> np.uint64(32), treatment & np.uint64(0xFFFFFFFF)
    replaced_below = np.uint64(floor(recipe.replace_prob * 2**32))
    random_below = np.uint64(floor((recipe.replace_prob + recipe.random_prob) * 2**32))
    random_ids = vocabulary.ordinary[(pick * np.uint64(len(vocabulary.ordinary))) >> np.uint64(32)]
    input_ids[selected] = np.where(
        draw < replaced_below,
        vocabulary.mask_id,
        np.where(draw < random_below, random_ids, input_ids[selected]),
    )
    return Corruption(input_ids, selected)


def first_token_of_word(words: NDArray[np.integer], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each token the flat index of its word's first token. A token without a word (-1) is its own word."""
    begins = np.ones(len(words), dtype=np.bool_)
    begins[1:] = (words[1:] != words[:-1]) | (words[1:] < 0)
    firsts = (np.cumsum(lengths) - lengths)[lengths > 0]
    begins[firsts] = True
    return np.maximum.accumulate(np.where(begins, np.arange(len(words)), 0))


def mask_digest(corruption: Corruption, lengths: NDArray[np.int64], keys: NDArray[np.uint64]) -> int:
    """Sum the documents' digests modulo 2**128. Two runs that scored the same positions have the same sum.

    Digests of disjoint batches add up modulo `DIGEST_MODULUS`, so sharding does not matter.
    """
    ends = np.cumsum(lengths)
    first = np.searchsorted(corruption.selected, ends - lengths)
    last = np.searchsorted(corruption.selected, ends)
    document = np.repeat(np.arange(len(lengths)), last - first)
    pairs = np.empty((len(corruption.selected), 2), dtype="<u4")
    pairs[:, 0] = corruption.selected - (ends - lengths)[document]
    pairs[:, 1] = corruption.input_ids[corruption.selected]
    data, total = pairs.tobytes(), 0
    for key, begin, end in zip(keys.tolist(), (first * 8).tolist(), (last * 8).tolist(), strict=True):
        hashed = blake2b(key.to_bytes(8, "little") + data[begin:end], digest_size=16).digest()
        total += int.from_bytes(hashed, "little")
    return total % DIGEST_MODULUS


def format_digest(digest: int) -> str:
    """Write a digest as 32 hexadecimal digits."""
    return f"{digest:032x}"
