"""A corpus in parts of bounded work: the unit that is scored, written down, resumed and shared between ranks."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlmkit.corpus import Corpus, concatenate

# Tokens that the model reads for one part. BERT-base on 2 cores takes minutes for it, a GPU a second or less.
# Another number needs another RESULT_FORMAT, as unfinished evaluations hold parts of this one.
PART_TOKENS = 1 << 18


@dataclass(frozen=True)
class Part:
    """Documents `first_document` and following of a corpus, whose flat tokens begin at `first_token`."""

    index: int
    first_document: int
    first_token: int
    corpus: Corpus

    @property
    def end_document(self) -> int:
        """The first document after it."""
        return self.first_document + len(self.corpus)


def cut_parts(
    blocks: Iterable[Corpus], cost: Callable[[NDArray[np.int64]], NDArray[np.float64]], budget: float = PART_TOKENS
) -> Iterator[Part]:
    """Regroup stretches of a corpus into parts that end with the document that brings their cost to `budget`.

    `cost` maps lengths `[documents]` to tokens to be read. The parts depend on the lengths alone, not on the blocks.
    """
    index = first_document = first_token = 0
    waiting: list[Corpus] = []
    spent = 0.0
    for block in blocks:
        costs, begin = cost(block.lengths), 0
        while begin < len(block):
            # Added one by one as a sum over a part, so that blocks of any size give the same edges.
            running = np.cumsum(np.concatenate([[spent], costs[begin:]]))[1:]
            end = begin + int(np.searchsorted(running, budget)) + 1
            waiting.append(block.part(begin, min(end, len(block))))
            if end > len(block):
                spent = float(running[-1])
                break
            part = Part(index, first_document, first_token, concatenate(waiting))
            yield part
            index, first_document = index + 1, part.end_document
            first_token += len(part.corpus.ids)
            waiting, spent, begin = [], 0.0, end
    if waiting:
        yield Part(index, first_document, first_token, concatenate(waiting))
