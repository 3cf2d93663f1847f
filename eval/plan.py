"""What is to be scored: rows, each a window of a document, and the tokens that each row scores.

Masked cross-entropy and pseudo-likelihood differ in their plan alone; `mlmkit.eval.scoring` runs either.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mlmkit.corpus import Corpus, Windows, nearest_window, overlapping_windows
from mlmkit.errors import UserError
from mlmkit.masking import DIGEST_MODULUS, Corruption, MaskRecipe, corrupt, mask_digest
from mlmkit.tokenizer import Tokenizer

VARIANTS = ("original", "within-word")
TOKENS_PER_CHUNK = 1 << 20


@dataclass(frozen=True)
class Plan:
    """Row r shows the model window r of `rows`, and scores the tokens `first[r]` to `first[r + 1]`.

    `document` and `offset` `[scored]` place the scored tokens, in corpus order. `input_ids` `[tokens of the corpus]` is
    what the rows show, except that row r has the mask at offsets `hide_from[r]` up to `hide_to[r]`, both `[rows]`.
    """

    metric: str
    rows: Windows
    first: NDArray[np.int64]
    document: NDArray[np.int64]
    offset: NDArray[np.int64]
    input_ids: NDArray[np.integer]
    hide_from: NDArray[np.int64]
    hide_to: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


def corrupt_corpus(corpus: Corpus, tokenizer: Tokenizer, recipe: MaskRecipe, seed: int) -> tuple[Corruption, int]:
    """mask-v1 over a whole corpus at epoch 0, and its digest; `selected` indexes the corpus's flat tokens."""
    input_ids = np.empty(len(corpus.ids), dtype=np.int64)
    selected, digest = [np.zeros(0, dtype=np.int64)], 0
    for begin, end in _document_chunks(corpus):
        tokens = slice(int(corpus.starts[begin]), int(corpus.starts[end]))
        lengths, keys = corpus.lengths[begin:end], corpus.keys[begin:end]
        part = corrupt(
            corpus.ids[tokens], lengths, keys, recipe, tokenizer.masking, seed=seed, words=corpus.words[tokens]
        )
        digest += mask_digest(part, lengths, keys)
        input_ids[tokens] = part.input_ids
        selected.append(part.selected + tokens.start)
    return Corruption(input_ids, np.concatenate(selected)), digest % DIGEST_MODULUS


def masked_plan(corpus: Corpus, corruption: Corruption, capacity: int) -> Plan:
    """One row a window of at most `capacity` tokens, scoring the selected tokens that lie nearest its centre."""
    document, offset = _place(corpus, corruption.selected)
    windows = overlapping_windows(corpus.lengths, capacity)
    row_of_token = nearest_window(windows, document, offset)
    counts = np.bincount(row_of_token, minlength=len(windows))
    scoring = np.flatnonzero(counts)
    rows = _take(windows, scoring)
    nothing = np.zeros(len(rows), dtype=np.int64)
    return Plan("masked", rows, _starts(counts[scoring]), document, offset, corruption.input_ids, nothing, nothing)


def pseudo_plan(
    corpus: Corpus,
    tokenizer: Tokenizer,
    capacity: int,
    variant: str = "original",
    sample: NDArray[np.int64] | None = None,
) -> Plan:
    """One row a token, that token masked alone; special tokens that the text yielded are context.

    With `variant="within-word"` the later tokens of the same word are masked too (Kauf and Ivanova 2023). `sample`
    restricts the plan to these flat tokens, ascending.
    """
    if variant not in VARIANTS:
        raise UserError(f"no pseudo-likelihood variant {variant!r}: choose {' or '.join(VARIANTS)}")
    tokens = np.arange(len(corpus.ids)) if sample is None else sample
    tokens = tokens[~tokenizer.masking.is_special[corpus.ids[tokens]]]
    document, offset = _place(corpus, tokens)
    windows = overlapping_windows(corpus.lengths, capacity)
    rows = _take(windows, nearest_window(windows, document, offset))
    hide_to = offset + 1
    if variant == "within-word":
        hide_to = np.minimum(_word_ends(corpus)[tokens] - corpus.starts[document], rows.start + rows.length)
    return Plan("pseudo", rows, np.arange(len(tokens) + 1), document, offset, corpus.ids, offset, hide_to)


def _document_chunks(corpus: Corpus) -> list[tuple[int, int]]:
    """Stretches of documents of about a million tokens, so that the random words stay small."""
    edges = np.searchsorted(corpus.starts, np.arange(0, int(corpus.starts[-1]), TOKENS_PER_CHUNK))
    bounds = np.unique(np.concatenate([[0], edges, [len(corpus)]])).tolist()
    return list(pairwise(bounds))


def _place(corpus: Corpus, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Document and offset of flat tokens."""
    document = np.searchsorted(corpus.starts, tokens, side="right") - 1
    return document, tokens - corpus.starts[document]


def _word_ends(corpus: Corpus) -> NDArray[np.int64]:
    """For each flat token the flat index just after its word. A token without a word is a word of its own."""
    words = np.asarray(corpus.words)
    ends = np.ones(len(words), dtype=bool)  # whether the token is its word's last
    ends[:-1] = (words[1:] != words[:-1]) | (words[:-1] < 0)
    inner_starts = corpus.starts[1:-1]
    ends[inner_starts[inner_starts > 0] - 1] = True
    places = np.flatnonzero(ends) + 1
    return places[np.searchsorted(places, np.arange(len(words)), side="right")]


def _take(windows: Windows, index: NDArray[np.int64]) -> Windows:
    return Windows(windows.document[index], windows.start[index], windows.length[index])


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)])
