"""What is measured on: tokenised documents, as often as they are asked for, and what identifies them."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlmkit.corpus import Corpus, cache_folder, load_corpus, stream_corpus, tokenize
from mlmkit.documents import Source, checked_text
from mlmkit.tokenizer import Tokenizer


class Material(Protocol):
    """Text or pairs, tokenised by one tokenizer."""

    def blocks(self) -> Iterator[Corpus]:
        """The documents in stretches, in order."""
        ...

    def corpus(self) -> Corpus:
        """All of them, with the fingerprint."""
        ...

    def known_size(self) -> int | None:
        """Documents in it, if that is known before they are read."""
        ...

    def identity(self) -> str:
        """Equal for the same texts; known before they are read."""
        ...

    def describe(self) -> dict[str, Any]:
        """Where it came from, for `result.json`."""
        ...

    def chosen(self) -> NDArray[np.int64] | None:
        """The flat tokens that pseudo-likelihood scores, ascending, or None for all."""
        return None

    def columns(self, begin: int, end: int) -> dict[str, pa.Array]:
        """What `documents.parquet` says of documents `begin` up to `end`, beside their sizes."""
        return {}


@dataclass(frozen=True)
class TextMaterial(Material):
    """A file or a dataset, tokenised while it is measured, through the token cache. `name` is its set's, if any."""

    source: Source
    tokenizer: Tokenizer
    name: str | None = None

    @cached_property
    def _folder(self) -> Path:
        return cache_folder(self.source, self.tokenizer)

    @cached_property
    def _corpus(self) -> Corpus:
        return load_corpus(self.source, self.tokenizer, self._folder)

    def blocks(self) -> Iterator[Corpus]:
        if self._folder.exists():
            return self._corpus.blocks()
        return stream_corpus(self.source, self.tokenizer, self._folder)

    def corpus(self) -> Corpus:
        return self._corpus

    def known_size(self) -> int | None:
        return len(self._corpus) if self._folder.exists() else None

    def identity(self) -> str:
        return self._folder.name

    def describe(self) -> dict[str, Any]:
        return {"set": self.name, **asdict(self.source)}


class InMemory(Material):
    """What is common to materials whose corpus is small enough to be held."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def blocks(self) -> Iterator[Corpus]:
        return self._corpus.blocks()

    def corpus(self) -> Corpus:
        return self._corpus

    def known_size(self) -> int | None:
        return len(self._corpus)

    def identity(self) -> str:
        return self._corpus.fingerprint


class GivenTexts(InMemory):
    """Texts from Python. An empty one is a document without tokens, so that indices stay the caller's."""

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer) -> None:
        checked = (checked_text(text, f"text {number}") for number, text in enumerate(texts))
        super().__init__(tokenize(checked, tokenizer))

    def describe(self) -> dict[str, Any]:
        return {"set": None, "location": "texts given in Python"}
