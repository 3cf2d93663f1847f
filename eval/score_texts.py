"""Pseudo-log-likelihood of single texts: `mlmkit.pseudo_log_likelihood`, `mlmkit score` and the server's `/score`."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, capacity, load
from mlmkit.corpus import Corpus, tokenize
from mlmkit.documents import checked_text
from mlmkit.eval.rows import PseudoPass, Rows, pseudo_rows
from mlmkit.eval.scoring import refuse_batch_coupling, score_rows
from mlmkit.progress import progress
from mlmkit.tokenizer import Tokenizer
from mlmkit.windows import ranges

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Word:
    """The word `text`, from `begin` to `end` (exclusive, in code points), and the indices of its `tokens`.

    `log_prob` is the sum of its tokens' log-probabilities in nats, so its surprisal is `-log_prob`; None without a
    scored token.
    """

    text: str
    begin: int
    end: int
    tokens: list[int]
    log_prob: float | None


@dataclass(frozen=True)
class TextScore:
    """A text's pseudo-log-likelihood in nats (summed in float64), and the log-probabilities that it sums.

    `token_ids` and `offset` (int64) and `log_prob` (float32) are `[scored]`. A token's offset counts the tokens before
    it. `spans` `[scored, 2]` (int64) is where each token begins and ends in the text, in code points. Without a scored
    token the pseudo-log-likelihood is None, because 0 would mean certainty.
    """

    text: str
    pseudo_log_likelihood: float | None
    token_ids: NDArray[np.int64]
    offset: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    spans: NDArray[np.int64]

    @property
    def words(self) -> list[Word]:
        """The words between white space, in order. Each scored token belongs to exactly one.

        A token belongs to the word of its characters. A token that is only white space belongs to the next word, or to
        the last if none follows. Words that share a token are one `Word`, with the white space between them. A text of
        white space is one word.
        """
        bounds = [match.span() for match in re.finditer(r"\S+", self.text)] or [(0, len(self.text))]
        begins, ends = np.array(bounds).T
        first = np.minimum(np.searchsorted(ends, self.spans[:, 0], side="right"), len(ends) - 1)
        last = np.maximum(np.searchsorted(begins, self.spans[:, 1]) - 1, first)
        begins_word, ends_word = np.ones((2, len(ends)), dtype=bool)  # False inside words that share a token
        begins_word[ranges(first + 1, last - first)] = ends_word[ranges(first, last - first)] = False
        tokens: list[list[int]] = [[] for _ in range(begins_word.sum())]
        for token, word in enumerate((np.cumsum(begins_word) - 1)[first].tolist()):
            tokens[word].append(token)
        sums = [float(self.log_prob[own].sum(dtype=np.float64)) if own else None for own in tokens]
        words = zip(begins[begins_word].tolist(), ends[ends_word].tolist(), tokens, sums, strict=True)
        return [Word(self.text[begin:end], begin, end, own, total) for begin, end, own, total in words]


def pseudo_log_likelihood(
    model: str | PathLike[str] | Backend,
    texts: Iterable[str],
    *,
    variant: str = "original",
    batch_tokens: int = 0,
    allow_batch_coupling: bool = False,
    backend: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> list[TextScore]:
    """Pseudo-log-likelihood of each text, in nats: every token masked alone (Salazar et al. 2020).

    ```python
    good, bad = mlmkit.pseudo_log_likelihood("artifact", ["The keys are here.", "The keys is here."])
    good.pseudo_log_likelihood > bad.pseudo_log_likelihood
    [(word.text, word.log_prob) for word in good.words]
    ```

    An unknown token is scored like any other; other special tokens are context. With `variant="within-word"` the later
    tokens of the same word are masked too (Kauf and Ivanova 2023). `model` is as in `evaluate`. Raises
    `mlmkit.UserError` for texts or options that cannot be used, and `mlmkit.CheckError` when a score is not finite.
    """
    is_path = isinstance(model, str | PathLike)
    loaded = load(model, backend, device, trust_remote_code) if is_path else model
    refuse_batch_coupling(loaded, allow_batch_coupling)
    texts = [texts] if isinstance(texts, str) else texts
    texts = [checked_text(text, f"text {number}") for number, text in enumerate(texts)]
    if not texts:
        return []
    corpus = tokenize(texts, loaded.tokenizer)
    rows = pseudo_rows(corpus, loaded.tokenizer, capacity(loaded), variant)
    with progress(PseudoPass.title, len(corpus), "texts") as bar:
        scores = score_rows(loaded, corpus, rows, batch_tokens, bar.advance)
    if unknown := int(corpus.text_sizes[:, 3].sum()):
        log.warning("%d characters are unknown to the tokenizer: scored as its unknown token, or not at all", unknown)
    return text_scores(texts, corpus, rows, scores.log_prob, loaded.tokenizer)


def text_scores(
    texts: Sequence[str], corpus: Corpus, rows: Rows, log_prob: NDArray[np.float32], tokenizer: Tokenizer
) -> list[TextScore]:
    """The scores `[scored]` of `pseudo_rows`, divided among the texts."""
    ids = corpus.ids[corpus.starts[rows.document] + rows.offset].astype(np.int64)
    ends = np.searchsorted(rows.document, np.arange(len(corpus) + 1))
    scores = []
    for text, span, begin, end in zip(texts, tokenizer.spans(texts), ends, ends[1:], strict=False):
        own = log_prob[begin:end]
        total = float(own.sum(dtype=np.float64)) if len(own) else None
        offset = rows.offset[begin:end]
        scores.append(TextScore(text, total, ids[begin:end], offset, own, span[offset]))
    return scores
