"""Windows: the spans of documents that a model sees at once. Training cuts documents, evaluation overlaps the spans.

A token is identified by its document (index in corpus order) and its offset in the document, whatever the window.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
