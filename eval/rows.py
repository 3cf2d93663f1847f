"""What the model reads: settings → passes over the corpus → rows.

Each pass covers all documents once, part by part: one pass per mask seed, and one for pseudo-likelihood. A row is a
window of a document and the tokens that it scores. `mlmkit.eval.scoring` runs the rows of either kind of pass.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.corpus import Corpus
from mlmkit.errors import UserError
from mlmkit.eval.data import Part
from mlmkit.masking import Corruption, MaskRecipe, MaskVocabulary, corrupt
from mlmkit.tokenizer import Tokenizer
from mlmkit.windows import Windows, nearest_window, overlapping_windows

METRICS = ("masked", "pseudo")
VARIANTS = {  # of pseudo-likelihood, and how each masks the tokens that it scores
    "original": "each masked alone",
    "within-word": "each masked with the later tokens of its word",
    "together": "all masked at once",
    "left-to-right": "each masked with all later ones",
}
OTHER_SPELLINGS = {"within_word": "within-word", "within_word_l2r": "within-word"}  # the second is minicons'
TYPICAL_ROW = 512  # caps the estimated cost of a row, whatever the model's length, so that parts are always the same
WHOLE_WORD, FIRST_PIECE, LATER_PIECE = range(3)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    `metrics`: `masked`, `pseudo` or both. `recipe` and `mask_seeds` define the masks. The others apply to
    pseudo-likelihood: `variant` (see `VARIANTS`), `pseudo_sample`, the share of tokens to score, and `appended_masks`,
    with which `left-to-right` replaces everything after a token by that many masks.

    Raises `UserError` for values outside their range.
    """

    metrics: tuple[str, ...] = ("masked",)
    recipe: MaskRecipe = field(default_factory=MaskRecipe)
    mask_seeds: tuple[int, ...] = (0,)
    variant: str = "original"
    pseudo_sample: float = 1.0
    appended_masks: int = 0

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UserError(f"no metric is named: choose {' or '.join(METRICS)}")
        for metric in self.metrics:
            if metric not in METRICS:
                raise UserError(f"no metric {metric!r}: choose {' or '.join(METRICS)}")
        object.__setattr__(self, "variant", pll_variant(self.variant))
        if not 0.0 < self.pseudo_sample <= 1.0:
            raise UserError(f"the pseudo-likelihood sample must be above 0 and at most 1, not {self.pseudo_sample}")
        if not self.mask_seeds or len(set(self.mask_seeds)) < len(self.mask_seeds):
            raise UserError("give at least one mask seed, and none of them twice")
        for seed in self.mask_seeds:
            if not 0 <= seed < 1 << 64:
                raise UserError(f"a mask seed must be between 0 and 2**64 - 1, not {seed}")

    def describe(self) -> dict[str, Any]:
        """The settings as `result.json` holds them."""
        pseudo = {"variant": self.variant, "sample": self.pseudo_sample, "appended_masks": self.appended_masks}
        return {
            "metrics": sorted(set(self.metrics), key=METRICS.index),
            "masking": {**self.recipe.describe(), "seeds": list(self.mask_seeds), "epoch": 0},
            "pseudo": pseudo if "pseudo" in self.metrics else None,
        }

    def passes(self, pseudo_targets: NDArray[np.int64] | None = None) -> list["Pass"]:
        """One pass per mask seed and one for pseudo-likelihood, which scores the flat `pseudo_targets` if given."""
        passes: list[Pass] = []
        if "masked" in self.metrics:
            passes += [MaskedPass(self.recipe, seed) for seed in self.mask_seeds]
        if "pseudo" in self.metrics:
            pseudo = (self.variant, self.pseudo_sample, self.mask_seeds[0], pseudo_targets, self.appended_masks)
            passes.append(PseudoPass(*pseudo))
        return passes


@dataclass(frozen=True)
class MaskedPass:
    """Scores every token that mask-v1 selects at epoch 0; one row scores all selected tokens of its window."""

    recipe: MaskRecipe
    mask_seed: int
    metric = "masked"

    @property
    def name(self) -> str:
        """Unique within an evaluation; also the beginning of the names of its part files."""
        return f"masked-{self.mask_seed}"

    @property
    def title(self) -> str:
        """What people call it."""
        return f"masked, seed {self.mask_seed}"

    def cost(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens that the model reads for documents of these lengths, roughly: each once."""
        return lengths.astype(np.float64)

    def rows(self, part: Part, tokenizer: Tokenizer, capacity: int) -> "Rows":
        """The part's rows, of at most `capacity` tokens each."""
        corpus = part.corpus
        text = (corpus.ids, corpus.lengths, corpus.keys)
        corruption = corrupt(*text, self.recipe, tokenizer.masking, seed=self.mask_seed, words=corpus.words)
        return masked_rows(corpus, corruption, capacity)


@dataclass(frozen=True)
class PseudoPass:
    """Scores every scorable token, masked alone; or the share `sample` of them; or only the flat `targets`.

    mask-v1's draws choose the sample. Unlike mask-v1, the sample includes unknown tokens: all scorable tokens must be
    equally likely to be drawn, or the estimate would be biased.
    """

    variant: str
    sample: float
    seed: int
    targets: NDArray[np.int64] | None = None
    appended_masks: int = 0
    metric = "pseudo"
    mask_seed = None
    name = "pseudo"
    title = "pseudo-log-likelihood"

    def cost(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens that the model reads for documents of these lengths, roughly: a row for each scored token."""
        return self.sample * lengths * np.minimum(lengths, TYPICAL_ROW)

    def rows(self, part: Part, tokenizer: Tokenizer, capacity: int) -> "Rows":
        """The part's rows, of at most `capacity` tokens each."""
        corpus, tokens = part.corpus, None
        if self.targets is not None:
            begin, end = np.searchsorted(self.targets, [part.first_token, part.first_token + len(corpus.ids)])
            tokens = self.targets[begin:end] - part.first_token
        elif self.sample < 1.0:
            recipe, vocabulary = MaskRecipe(mask_prob=self.sample), scorable(tokenizer)
            tokens = corrupt(corpus.ids, corpus.lengths, corpus.keys, recipe, vocabulary, seed=self.seed).selected
        return pseudo_rows(corpus, tokenizer, capacity, self.variant, tokens, self.appended_masks)


Pass = MaskedPass | PseudoPass


@dataclass(frozen=True)
class Rows:
    """Row r shows the model `windows` r, and scores the tokens `first[r]` up to `first[r + 1]`.

    `document` and `offset` `[scored]` locate the scored tokens, in corpus order. A row shows `input_ids`
    `[tokens of the corpus]`, with the mask at offsets `hide_from[r]` up to `hide_to[r]`; both are `[rows]`. Behind its
    window, a row has `appended_masks` masks.
    """

    windows: Windows
    first: NDArray[np.int64]
    document: NDArray[np.int64]
    offset: NDArray[np.int64]
    input_ids: NDArray[np.integer]
    hide_from: NDArray[np.int64]
    hide_to: NDArray[np.int64]
    appended_masks: int = 0

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each row without special tokens, `[rows]`."""
        return self.windows.length + self.appended_masks


def masked_rows(corpus: Corpus, corruption: Corruption, capacity: int) -> Rows:
    """One row per window of at most `capacity` tokens; each selected token is scored in the window nearest to it."""
    document, offset = _locate(corpus, corruption.selected)
    windows = overlapping_windows(corpus.lengths, capacity)
    counts = np.bincount(nearest_window(windows, document, offset), minlength=len(windows))
    scoring = np.flatnonzero(counts)
    first = np.concatenate([[0], np.cumsum(counts[scoring])])
    nothing = np.zeros(len(scoring), dtype=np.int64)
    return Rows(_take(windows, scoring), first, document, offset, corruption.input_ids, nothing, nothing)


def pseudo_rows(
    corpus: Corpus,
    tokenizer: Tokenizer,
    capacity: int,
    variant: str = "original",
    tokens: NDArray[np.int64] | None = None,
    appended_masks: int = 0,
) -> Rows:
    """One row per `scorable` token, with that token masked alone.

    `tokens` (flat, ascending) restricts which tokens are scored. With `variant="within-word"` the later tokens of the
    same word are masked too (Kauf and Ivanova 2023); with `left-to-right` all later scored tokens of the document; with
    `together` all its scored tokens. With `appended_masks`, that many masks replace all later tokens. Raises
    `UserError` for an unknown variant.
    """
    variant = pll_variant(variant)
    tokens = np.arange(len(corpus.ids)) if tokens is None else tokens
    tokens = tokens[~scorable(tokenizer).is_special[corpus.ids[tokens]]]
    document, offset = _locate(corpus, tokens)
    if appended_masks >= capacity:
        raise UserError(f"appended_masks = {appended_masks} leaves no room for text: the model takes {capacity} tokens")
    if appended_masks:
        length = np.minimum(offset, capacity - appended_masks)
        windows = Windows(document, offset - length, length)
    else:
        windows = overlapping_windows(corpus.lengths, capacity)
        windows = _take(windows, nearest_window(windows, document, offset))
    hide_from, hide_to = offset, offset + 1
    if variant == "within-word":
        hide_to = word_ends(corpus)[tokens] - corpus.starts[document]
    elif variant in ("together", "left-to-right") and not appended_masks:
        hide_to = offset[np.searchsorted(document, document, side="right") - 1] + 1
    if variant == "together":
        hide_from = np.maximum(offset[np.searchsorted(document, document)], windows.start)
    hide_to = np.minimum(hide_to, windows.start + windows.length + appended_masks)
    first = np.arange(len(tokens) + 1)
    return Rows(windows, first, document, offset, corpus.ids, hide_from, hide_to, appended_masks)


def how_masked(variant: str, appended_masks: int) -> str:
    """How the scored tokens are masked, in words."""
    if appended_masks:
        return f"each the first of {appended_masks} masks behind the text before it"
    return VARIANTS[variant]


def pll_variant(name: str) -> str:
    """The variant in mlmkit's spelling. Raises `UserError` if there is none."""
    variant = OTHER_SPELLINGS.get(name, name)
    if variant not in VARIANTS:
        raise UserError(f"no pseudo-likelihood variant {name!r}: choose {', '.join(VARIANTS)}")
    return variant


def scorable(tokenizer: Tokenizer) -> MaskVocabulary:
    """The vocabulary for pseudo-likelihood, in which the unknown token is a target like any other.

    mask-v1 treats the unknown token as special. The other special tokens are context for both.
    """
    is_special = tokenizer.masking.is_special.copy()
    if tokenizer.unk_id is not None:
        is_special[tokenizer.unk_id] = False
    return replace(tokenizer.masking, is_special=is_special)


def shown_ids(rows: Rows, corpus: Corpus, mask_id: int) -> NDArray[np.int64]:
    """The id that the model sees at each scored token while scoring it, `[scored]`."""
    row = np.repeat(np.arange(len(rows)), np.diff(rows.first))
    is_hidden = (rows.hide_from[row] <= rows.offset) & (rows.offset < rows.hide_to[row])
    return np.where(is_hidden, mask_id, rows.input_ids[corpus.starts[rows.document] + rows.offset])


def word_ends(corpus: Corpus) -> NDArray[np.int64]:
    """For each flat token the flat index just after its word."""
    words = np.asarray(corpus.words)
    is_last = np.ones(len(words), dtype=bool)
    is_last[:-1] = words[1:] != words[:-1]
    inner_starts = corpus.starts[1:-1]
    is_last[inner_starts[inner_starts > 0] - 1] = True
    ends = np.flatnonzero(is_last) + 1
    return ends[np.searchsorted(ends, np.arange(len(words)), side="right")]


def pieces(corpus: Corpus, tokens: NDArray[np.int64]) -> NDArray[np.int8]:
    """Whether each flat token is a whole word, or the first or a later piece of one."""
    ends = word_ends(corpus)
    is_first = (tokens == 0) | (ends[tokens - 1] == tokens)
    is_last = ends[tokens] == tokens + 1
    return np.select([is_first & is_last, is_first], [WHOLE_WORD, FIRST_PIECE], LATER_PIECE).astype(np.int8)


def _locate(corpus: Corpus, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Document and offset of flat tokens."""
    document = np.searchsorted(corpus.starts, tokens, side="right") - 1
    return document, tokens - corpus.starts[document]


def _take(windows: Windows, index: NDArray[np.int64]) -> Windows:
    return Windows(windows.document[index], windows.start[index], windows.length[index])
