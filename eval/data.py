"""Evaluation data: tokenised documents that can be iterated repeatedly, with their identity.

    file, hub dataset, texts or pairs → blocks of documents → parts of bounded work → `rows`

A part is the unit that is scored, stored, resumed and shared among ranks.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlmkit.corpus import Corpus, concatenate, tokenize
from mlmkit.documents import checked_text, read_documents
from mlmkit.locations import EVERY_KEY, Source, is_tokens
from mlmkit.stored import StoredCorpus
from mlmkit.token_cache import load_corpus
from mlmkit.tokenizer import Tokenizer

# Tokens that the model reads per part: minutes of work for BERT-base on 2 cores, a second or less on a GPU.
# Changing it requires a new RESULT_FORMAT, because unfinished evaluations hold parts of this size.
PART_TOKENS = 1 << 18


class EvalData:
    """A tokenised corpus. `source` says where it came from, for `result.json`.

    `texts` reads the documents themselves, in the order of the corpus; it gives none if only their tokens are there.
    """

    def __init__(
        self, corpus: Corpus | StoredCorpus, source: dict[str, Any], texts: Callable[[], Iterable[str]] = tuple
    ) -> None:
        self.corpus, self.source, self.texts = corpus, source, texts

    def pseudo_targets(self) -> NDArray[np.int64] | None:
        """Flat indices of the tokens that pseudo-likelihood scores, ascending; None for all."""
        return None

    def document_columns(self, begin: int, end: int) -> dict[str, pa.Array]:
        """Extra columns of `documents.parquet` for the documents from `begin` up to `end`."""
        return {}


def texts_data(texts: Iterable[str], tokenizer: Tokenizer) -> EvalData:
    """Texts from Python. An empty text is a document without tokens, so that indices match those of the caller.

    Raises `UserError` for no texts, and for one that is not valid Unicode text.
    """
    checked = [checked_text(text, f"text {number}") for number, text in enumerate(texts)]
    return EvalData(tokenize(checked, tokenizer), {"set": None, "location": "texts given in Python"}, lambda: checked)


def file_data(source: Source, tokenizer: Tokenizer, set_name: str | None = None) -> EvalData:
    """Text or tokens from outside, through the token cache. Raises `UserError` as `load_corpus` does."""
    described = {"set": set_name, **asdict(source), "location": source.name, "locations": source.locations}
    described = json.loads(json.dumps(described))  # tuples as they are read back
    # A share of a training text is not worth reading all of it again.
    is_readable = source.keys == EVERY_KEY and not is_tokens(source.location)
    texts = partial(read_documents, source) if is_readable else tuple
    return EvalData(load_corpus(source, tokenizer), described, texts)


@dataclass(frozen=True)
class Part:
    """Consecutive documents of a corpus. `first_token` is the flat index of its first token in the whole corpus."""

    index: int
    first_document: int
    first_token: int
    corpus: Corpus

    @property
    def end_document(self) -> int:
        """The index of the first document after it."""
        return self.first_document + len(self.corpus)


def cut_parts(
    blocks: Iterable[Corpus], cost: Callable[[NDArray[np.int64]], NDArray[np.float64]], budget: float = PART_TOKENS
) -> Iterator[Part]:
    """Regroup blocks into parts. A part ends with the document that brings its cost to `budget`.

    `cost` maps document lengths `[documents]` to the tokens that the model reads for each. The parts depend on the
    lengths alone, not on the blocks.
    """
    first_document = first_token = 0
    for index, stretches in enumerate(_stretches_of_parts(blocks, cost, budget)):
        corpus = concatenate(stretches)
        yield Part(index, first_document, first_token, corpus)
        first_document, first_token = first_document + len(corpus), first_token + len(corpus.ids)


def _stretches_of_parts(
    blocks: Iterable[Corpus], cost: Callable[[NDArray[np.int64]], NDArray[np.float64]], budget: float
) -> Iterator[list[Corpus]]:
    stretches: list[Corpus] = []
    spent = 0.0
    for block in blocks:
        begin = 0
        for end, document_cost in enumerate(cost(block.lengths).tolist(), start=1):
            spent += document_cost
            if spent >= budget:
                yield [*stretches, block.part(begin, end)]
                stretches, spent, begin = [], 0.0, end
        if begin < len(block):
            stretches.append(block.part(begin, len(block)))
    if stretches:
        yield stretches
