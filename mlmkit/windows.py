"""Windows: the spans of documents that a model sees at once. Training cuts documents, evaluation overlaps the spans.

A token is identified by its document (index in corpus order) and its offset in the document, whatever the window.
"""

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlmkit.corpus import DOCUMENTS_PER_BLOCK, Corpus, cache_errors, copy_slice
from mlmkit.files import atomic, file_sha256, locked
from mlmkit.masking import first_token_of_word

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Windows:
    """Spans of documents: window w is tokens `start[w] : start[w] + length[w]` of `document[w]`; each `[windows]`."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)


def ranges(begin: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate the ranges `begin[i], begin[i] + 1, ...` of `length[i]` entries, `[sum of lengths]` int64."""
    return np.arange(int(length.sum())) + np.repeat(begin - (np.cumsum(length) - length), length)


def cut_windows(lengths: NDArray[np.int64], capacity: int) -> Windows:
    """Windows for training: the fewest pieces of at most `capacity` tokens per document, equal to within one token.

    A document without tokens has no window.
    """
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    piece = ranges(np.zeros_like(pieces), pieces)
    begin = piece * lengths[document] // pieces[document]
    end = (piece + 1) * lengths[document] // pieces[document]
    return Windows(document, begin, end - begin)


def overlapping_windows(lengths: NDArray[np.int64], capacity: int) -> Windows:
    """Windows for evaluation. A document that fits is one window.

    A longer document gets windows of `capacity` tokens, the fewest whose steps are at most half a window, spread
    evenly from its first token to its last: window k of m starts at `k * (n - capacity) // (m - 1)`.
    """
    excess = np.maximum(lengths - capacity, 0)
    step = max(capacity // 2, 1)
    count = np.where(lengths == 0, 0, 1 + -(-excess // step))
    document = np.repeat(np.arange(len(lengths)), count)
    index = ranges(np.zeros_like(count), count)
    start = index * excess[document] // np.maximum(count[document] - 1, 1)
    return Windows(document, start, np.minimum(lengths[document], capacity))


def nearest_window(windows: Windows, document: NDArray[np.int64], offset: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each token the window that scores it, `[tokens]`: the one with the nearest centre, the first on a tie.

    `document` and `offset` `[tokens]` identify the tokens. Each document's windows must be in order and cover it.
    """
    # Window k of a document serves offsets up to the midpoint between its centre and the next one's. Twice the centre
    # is 2 * start + length - 1, an integer, so the comparison is exact.
    doubled = 2 * windows.start + windows.length - 1
    same_document = windows.document[1:] == windows.document[:-1]
    stride = int(offset.max(initial=0)) + 1
    to_the_end = stride - 1
    last_offset = np.append(np.where(same_document, (doubled[1:] + doubled[:-1]) // 4, to_the_end), to_the_end)
    served_up_to = windows.document * stride + np.minimum(last_offset[: len(windows)], to_the_end)
    return np.searchsorted(served_up_to, document * stride + offset)


def window_table(corpus: Corpus, capacity: int) -> NDArray[np.int64]:
    """The `cut_windows` of a corpus, `[windows, 4]` int64: document, start, length, and start of the word.

    The last column is the offset in the document of the first token of the word in which the window begins. The table
    of a cached corpus is made once, block by block, and mapped from the cache.

    Raises `UserError` if the cache cannot be written.
    """
    if corpus.folder is None:
        return _window_rows(corpus, 0, len(corpus), capacity)
    folder = corpus.folder / f"windows-{capacity}"
    rows, sha256 = folder / "rows", folder / "sha256"
    with cache_errors(corpus.folder), locked(folder, wait=True):
        if not (rows.exists() and sha256.exists() and file_sha256(rows).encode() == sha256.read_bytes()):
            if folder.exists():
                log.warning("the token cache %s is damaged: rebuilding it", folder)
            with atomic(folder, folder=True) as partial:
                with (partial / "rows").open("wb") as file:
                    for begin in range(0, len(corpus), DOCUMENTS_PER_BLOCK):
                        end = min(begin + DOCUMENTS_PER_BLOCK, len(corpus))
                        file.write(_window_rows(corpus, begin, end, capacity).astype("<i8").tobytes())
                (partial / "sha256").write_text(file_sha256(partial / "rows"))
    if not rows.stat().st_size:  # an empty file cannot be mapped
        return np.empty((0, 4), np.int64)
    return np.memmap(rows, "<i8", "r").reshape(-1, 4)


def _window_rows(corpus: Corpus, begin: int, end: int, capacity: int) -> NDArray[np.int64]:
    """The table's rows for documents `begin` to `end`, in memory. Only documents that are cut have their words read."""
    starts = copy_slice(corpus.starts, begin, end + 1)
    windows = cut_windows(np.diff(starts), capacity)
    word_start = windows.start.copy()
    for document in np.unique(windows.document[windows.start > 0]).tolist():
        words = copy_slice(corpus.words, *starts[document : document + 2].tolist())
        own = slice(*np.searchsorted(windows.document, [document, document + 1]))
        word_start[own] = first_token_of_word(words, np.array([len(words)]))[windows.start[own]]
    return np.stack([windows.document + begin, windows.start, windows.length, word_start], axis=1)
