"""What is to be scored: rows, each a window of a document, and the tokens that each row scores.

Masked cross-entropy and pseudo-likelihood differ in their plan alone; `mlmkit.eval.scoring` runs either.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mlmkit.corpus import Corpus
from mlmkit.errors import UserError
from mlmkit.masking import Corruption, MaskVocabulary
from mlmkit.tokenizer import Tokenizer
from mlmkit.windows import Windows, nearest_window, overlapping_windows

VARIANTS = ("original", "within-word")
WHOLE_WORD, FIRST_PIECE, LATER_PIECE = range(3)


@dataclass(frozen=True)
class Plan:
    """Row r shows the model window r of `rows`, and scores the tokens `first[r]` to `first[r + 1]`.

    `document` and `offset` `[scored]` place the scored tokens, in corpus order. `input_ids` `[tokens of the corpus]` is
    what the rows show, except that row r has the mask at offsets `hide_from[r]` up to `hide_to[r]`, both `[rows]`.
    """

    rows: Windows
    first: NDArray[np.int64]
    document: NDArray[np.int64]
    offset: NDArray[np.int64]
    input_ids: NDArray[np.integer]
    hide_from: NDArray[np.int64]
    hide_to: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


def masked_plan(corpus: Corpus, corruption: Corruption, capacity: int) -> Plan:
    """One row a window of at most `capacity` tokens, scoring the selected tokens that lie nearest its centre."""
    document, offset = _place(corpus, corruption.selected)
    windows = overlapping_windows(corpus.lengths, capacity)
    row_of_token = nearest_window(windows, document, offset)
    counts = np.bincount(row_of_token, minlength=len(windows))
    scoring = np.flatnonzero(counts)
    rows = _take(windows, scoring)
    nothing = np.zeros(len(rows), dtype=np.int64)
    return Plan(rows, _starts(counts[scoring]), document, offset, corruption.input_ids, nothing, nothing)


def pseudo_plan(
    corpus: Corpus,
    tokenizer: Tokenizer,
    capacity: int,
    variant: str = "original",
    sample: NDArray[np.int64] | None = None,
) -> Plan:
    """One row per token that `scorable` names, that token masked alone.

    With `variant="within-word"` the later tokens of the same word are masked too (Kauf and Ivanova 2023). `sample`
    restricts the plan to these flat tokens, ascending.
    """
    if variant not in VARIANTS:
        raise UserError(f"no pseudo-likelihood variant {variant!r}: choose {' or '.join(VARIANTS)}")
    tokens = np.arange(len(corpus.ids)) if sample is None else sample
    tokens = tokens[~scorable(tokenizer).is_special[corpus.ids[tokens]]]
    document, offset = _place(corpus, tokens)
    windows = overlapping_windows(corpus.lengths, capacity)
    rows = _take(windows, nearest_window(windows, document, offset))
    hide_to = offset + 1
    if variant == "within-word":
        hide_to = np.minimum(word_ends(corpus)[tokens] - corpus.starts[document], rows.start + rows.length)
    return Plan(rows, np.arange(len(tokens) + 1), document, offset, corpus.ids, offset, hide_to)


def scorable(tokenizer: Tokenizer) -> MaskVocabulary:
    """The tokenizer's vocabulary as pseudo-likelihood sees it: the unknown token is a target like any other.

    mask-v1 treats it as special. The other special tokens are context for both.
    """
    is_special = tokenizer.masking.is_special.copy()
    if tokenizer.unk_id is not None:
        is_special[tokenizer.unk_id] = False
    return replace(tokenizer.masking, is_special=is_special)


def _place(corpus: Corpus, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Document and offset of flat tokens."""
    document = np.searchsorted(corpus.starts, tokens, side="right") - 1
    return document, tokens - corpus.starts[document]


def word_ends(corpus: Corpus) -> NDArray[np.int64]:
    """For each flat token the flat index just after its word. A token without a word is a word of its own."""
    words = np.asarray(corpus.words)
    ends = np.ones(len(words), dtype=bool)  # whether the token is its word's last
    ends[:-1] = (words[1:] != words[:-1]) | (words[:-1] < 0)
    inner_starts = corpus.starts[1:-1]
    ends[inner_starts[inner_starts > 0] - 1] = True
    places = np.flatnonzero(ends) + 1
    return places[np.searchsorted(places, np.arange(len(words)), side="right")]


def shown_ids(plan: Plan, corpus: Corpus, mask_id: int) -> NDArray[np.int64]:
    """What stands at each scored token when it is scored, `[scored]`."""
    row = np.repeat(np.arange(len(plan)), np.diff(plan.first))
    is_hidden = (plan.hide_from[row] <= plan.offset) & (plan.offset < plan.hide_to[row])
    return np.where(is_hidden, mask_id, plan.input_ids[corpus.starts[plan.document] + plan.offset])


def pieces(corpus: Corpus, tokens: NDArray[np.int64]) -> NDArray[np.int8]:
    """Whether each flat token is a whole word, or the first or a later piece of one."""
    ends = word_ends(corpus)
    is_first = (tokens == 0) | (ends[tokens - 1] == tokens)
    is_last = ends[tokens] == tokens + 1
    return np.select([is_first & is_last, is_first], [WHOLE_WORD, FIRST_PIECE], LATER_PIECE).astype(np.int8)


def _take(windows: Windows, index: NDArray[np.int64]) -> Windows:
    return Windows(windows.document[index], windows.start[index], windows.length[index])


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)])
