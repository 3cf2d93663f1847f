"""Items as a corpus to be scored: one document per option, those of an item one after the other."""

import json
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlmkit.corpus import Corpus, tokenize
from mlmkit.eval.data import EvalData
from mlmkit.eval.items import Item, ItemColumns, Option
from mlmkit.tokenizer import Tokenizer
from mlmkit.windows import ranges

NUMBER = "number:"  # begins the names of the columns of documents.parquet that hold human numbers


class ItemData(EvalData):
    """The items of a set; `first[i]` up to `first[i + 1]` are the documents of item i, `[items + 1]`.

    Items with an option whose scored text is whitespace only are left out, and counted as `empty_texts`. `source` says
    where the items came from and how they are scored.
    """

    corpus: Corpus

    def __init__(
        self, given: Sequence[Item], tokenizer: Tokenizer, source: dict[str, Any], task: str, columns: ItemColumns
    ) -> None:
        self.items = [item for item in given if not columns.is_empty(item)]
        self.options = list(chain.from_iterable(item.options for item in self.items))
        self.first = np.cumsum([0, *(len(item.options) for item in self.items)])
        self._tokenizer = tokenizer
        texts = [option.text for option in self.options]
        corpus = tokenize(texts, tokenizer)
        scored = {"task": task, "scoring": columns.scoring, "normalisation": columns.normalisation}
        # All of this is part of what is measured: the same sentences with other labels are another corpus.
        labels = [(item.label, item.phenomenon, item.paradigm, item.id, str(item.numbers)) for item in self.items]
        spans = [(option.begin, option.end) for option in self.options]
        identity = json.dumps([corpus.fingerprint, self.first.tolist(), labels, spans, scored])
        fingerprint = blake2b(identity.encode(), digest_size=16).hexdigest()
        corpus = replace(corpus, fingerprint=fingerprint, empty_texts=len(given) - len(self.items))
        super().__init__(corpus, {**source, **scored, "sides": list(columns.sides)}, lambda: texts)

    def pseudo_targets(self) -> NDArray[np.int64] | None:
        """The flat indices of the tokens that are scored: those that overlap an option's span, None for all.

        With `shared` scoring, those that a pair's two sentences have in common: what `difflib.SequenceMatcher` matches
        between the token sequences with their special tokens, as in the script of Nangia et al. 2020.
        """
        if self.source["scoring"] == "shared":
            return self._shared_targets()
        if all(option.is_whole for option in self.options):
            return None
        spans = self._tokenizer.spans([option.text for option in self.options])
        scored = (_scored(each, option) for each, option in zip(spans, self.options, strict=True))
        return np.concatenate([first + tokens for first, tokens in zip(self.corpus.starts, scored, strict=False)])

    def _shared_targets(self) -> NDArray[np.int64]:
        corpus, spans, prefix = self.corpus, [], len(self._tokenizer.prefix)
        for pair in range(len(self.items)):
            starts, ends = corpus.starts[2 * pair : 2 * pair + 2], corpus.starts[2 * pair + 1 : 2 * pair + 3]
            framed = [self._tokenizer.frame(corpus.ids[a:b]).tolist() for a, b in zip(starts, ends, strict=True)]
            for match in SequenceMatcher(None, *framed).get_matching_blocks():
                for start, end, matched in zip(starts, ends, (match.a, match.b), strict=True):
                    begin = int(start) + matched - prefix
                    first = max(begin, int(start))
                    spans.append((first, min(begin + match.size, int(end)) - first))
        first, size = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        return np.sort(ranges(first, np.maximum(size, 0)))

    @cached_property
    def _item_of(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.items)), np.diff(self.first))

    def document_columns(self, begin: int, end: int) -> dict[str, pa.Array]:
        index = self._item_of[begin:end]
        items, options = [self.items[i] for i in index], self.options[begin:end]
        option = np.arange(begin, end) - self.first[index]
        label = np.array([item.label for item in items])
        right = (self.first[index] + label).tolist()
        same = [
            own != best and self._ids(own) == self._ids(best)
            for own, best in zip(range(begin, end), right, strict=True)
        ]
        columns: dict[str, Any] = {"item": index, "option": option, "is_right": option == label, "same_ids": same}
        columns["scored_characters"] = [len(each.scored.strip()) for each in options]
        columns |= {name: [getattr(item, name) for item in items] for name in ("phenomenon", "paradigm", "id")}
        for number in items[0].numbers if items else ():
            columns[NUMBER + number] = [item.numbers[number] for item in items]
        return {name: pa.array(values) for name, values in columns.items()}

    def _ids(self, document: int) -> bytes:
        starts = self.corpus.starts
        return self.corpus.ids[starts[document] : starts[document + 1]].tobytes()


def _scored(spans: NDArray[np.int64], option: Option) -> NDArray[np.int64]:
    """The indices of the tokens whose `spans`, `[tokens, 2]`, overlap what the option scores."""
    begin, end = spans.T
    return np.flatnonzero((end > option.begin) & (begin < option.end) | option.is_whole)
