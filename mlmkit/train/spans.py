"""The windows that training cuts from a stored corpus, found by their numbers without a table of all of them.

all documents' lengths ── index_windows ────────> the number of windows before every 64th document, in the cache
numbers of windows ────── CorpusWindows.locate ─> spans: documents, offsets, keys and where the tokens are
spans ─────────────────── CorpusWindows.ids ────> tokens
"""

import hashlib
import logging
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.files import atomic, cache_root, file_sha256, locked, recorded_sha256
from mlmkit.shards import GrowingArray
from mlmkit.stored import StoredCorpus
from mlmkit.token_cache import cache_errors

log = logging.getLogger(__name__)

# A window is tokens `start` to `start + length` of a document with this mask-v1 key, and these are the tokens from
# `token` on in a shard.
SPAN = np.dtype(
    [("document", "i8"), ("start", "i8"), ("length", "i8"), ("key", "u8"), ("shard", "i8"), ("token", "i8")]
)
GROUP = 64  # documents per entry of the index: 8 bytes for 768 bytes of documents
LOOKED_BACK = 512  # tokens read at first to find the beginning of a word


class CorpusWindows:
    """The `cut_windows` of a corpus, each document's in order.

    Raises `UserError` if the index cannot be written to the cache.
    """

    def __init__(self, corpus: StoredCorpus, capacity: int) -> None:
        self.corpus, self.capacity = corpus, capacity

    @cached_property
    def _before(self) -> NDArray[np.int64]:
        return index_windows(self.corpus, self.capacity)

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Without the index: pickling a memory map copies its content, so another process maps it itself."""
        return {"corpus": self.corpus, "capacity": self.capacity}

    def locate(self, numbers: NDArray[np.int64]) -> NDArray:
        """The spans of windows, `[windows]` of dtype `SPAN`, in the order of the numbers.

        Numbers close to each other are found with one read.
        """
        spans, order = np.empty(len(numbers), SPAN), np.argsort(numbers)
        numbers = numbers[order]
        group = np.searchsorted(self._before, numbers, side="right") - 1
        for run in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(group) > 1) + 1):
            if len(run):
                spans[order[run]] = self._locate_run(numbers[run], *group[run[[0, -1]]].tolist())
        return spans

    def _locate_run(self, numbers: NDArray[np.int64], first: int, last: int) -> NDArray:
        """The spans of ascending numbers, which lie in the groups `first` to `last`."""
        begin, end = first * GROUP, min((last + 1) * GROUP, len(self.corpus))
        parts = []
        for index, shard, one, other in self.corpus.stretches(begin, end):
            bounds, keys = shard.bounds(one, other), shard.documents.read(one, other)["key"]
            parts.append((np.diff(bounds), keys, np.full(len(keys), index), bounds[:-1]))
        lengths, keys, shards, tokens = map(np.concatenate, zip(*parts, strict=True))
        pieces = -(-lengths // self.capacity)
        before = self._before[first] + np.concatenate([[0], np.cumsum(pieces)])
        here = np.searchsorted(before, numbers, side="right") - 1
        piece, lengths, pieces = numbers - before[here], lengths[here], pieces[here]
        start = piece * lengths // pieces
        spans = np.empty(len(numbers), SPAN)
        length = (piece + 1) * lengths // pieces - start
        columns = (begin + here, start, length, keys[here], shards[here], tokens[here] + start)
        for name, column in zip(SPAN.names or (), columns, strict=True):
            spans[name] = column
        return spans

    def ids(self, spans: NDArray) -> NDArray[np.integer]:
        """The tokens of the spans, end to end."""
        shards = self.corpus.shards
        ends = np.cumsum(spans["length"]).tolist()
        ids = np.empty(ends[-1] if ends else 0, shards[0].ids.dtype)
        for shard, token, length, end in zip(
            *(spans[n].tolist() for n in ("shard", "token", "length")), ends, strict=True
        ):
            shards[shard].ids.read(token, token + length, into=ids[end - length : end])
        return ids

    def word_begins(self, spans: NDArray) -> NDArray[np.bool_]:
        """Whether the tokens of the spans begin words, end to end."""
        places = zip(*(spans[name].tolist() for name in ("shard", "token", "length")), strict=True)
        begins = [self.corpus.shards[shard].word_begins(token, token + length) for shard, token, length in places]
        return np.concatenate([*begins, np.empty(0, np.bool_)])

    def word_starts(self, spans: NDArray) -> NDArray[np.int64]:
        """For each span the offset in its document of the first token of the word in which it begins."""
        places = zip(*(spans[name].tolist() for name in ("shard", "token", "start")), strict=True)
        return np.array([self._word_start(*place) for place in places], np.int64)

    def _word_start(self, shard: int, token: int, start: int) -> int:
        count, end = LOOKED_BACK, token + 1
        while start:
            begin = max(end - count, token - start)
            if len(found := np.flatnonzero(self.corpus.shards[shard].word_begins(begin, end))):
                return start - (token - begin - int(found[-1]))
            count, end = 2 * count, begin
        return 0


def index_windows(corpus: StoredCorpus, capacity: int) -> NDArray[np.int64]:
    """How many windows come before documents 0, 64, 128, ... and after the last, mapped from the cache.

    Raises `UserError` if the cache cannot be written.
    """
    identity = f"{corpus.fingerprint} {corpus.record['tokenizer']} {capacity} {GROUP}"
    folder = cache_root() / "windows" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    index, sha256 = folder / "index.npy", folder / "sha256"
    with cache_errors(folder), locked(folder, wait=True):
        if not (index.exists() and sha256.exists() and recorded_sha256([index]) == [sha256.read_text()]):
            if folder.exists():
                log.warning("the token cache %s is damaged: rebuilding it", folder)
            with atomic(folder, folder=True) as partial:
                with GrowingArray(partial / index.name, "<i8", ()) as array:
                    before = documents = 0
                    for lengths in corpus.length_blocks():
                        sums = before + np.concatenate([[0], np.cumsum(-(-lengths // capacity))])
                        array.append(sums[:-1][-documents % GROUP :: GROUP])
                        before, documents = int(sums[-1]), documents + len(lengths)
                    array.append(np.array([before]))
                (partial / sha256.name).write_text(file_sha256(partial / index.name))
    return np.load(index, mmap_mode="r", allow_pickle=False)
