"""Tokenise a text of any length in bounded memory, in windows that overlap.

Two neighbouring windows are joined in the middle of their overlap of 3,072 characters, beside white space or
punctuation, where both give the same tokens, spans and words for at least 1,000 characters on either side. Where they
do not, the first window doubles, if need be up to the whole text.

No character is lost or counted twice, and a text without such a border is encoded whole. That the tokens are those of
the whole text is checked by the agreement, not proved: an effect that reaches further than 1,000 characters and shows
nowhere between would go unnoticed. So would a shift of spans by the period of a text that repeats, as of a tokenizer
that drops characters. The usual normalizers, pre-tokenizers and models look no further than a word, a run of white
space or a few tokens. The tokenizers that `chunks.cuts_before_spaces` accepts are exact by construction; they come here
only with a text that has no space for 2^19 characters.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

WINDOW = 5 << 15  # characters; tokenizers takes up to 190 bytes of memory for each
OVERLAP = 3 << 10  # 1.9 % of a window
LONG_WINDOW = 1 << 20


@dataclass(frozen=True)
class Window:
    """A part of a text: `ids` and `word_begins` `[tokens]`, and the tokens' `spans` in it `[tokens, 2]`."""

    text: str
    ids: NDArray[np.int64]
    word_begins: NDArray[np.bool_]
    spans: NDArray[np.int64]

    def tokens_before(self, place: int) -> int:
        """Return how many tokens begin before the place."""
        return int(np.searchsorted(self.spans[:, 0], place))

    def part(self, begin: int, end: int | None = None) -> "Window":
        """Return the characters from `begin` to `end`, and the tokens that begin there."""
        first, last = self.tokens_before(begin), None if end is None else self.tokens_before(end)
        spans = self.spans[first:last] - begin
        return Window(self.text[begin:end], self.ids[first:last], self.word_begins[first:last], spans)

    def has_border(self, place: int) -> bool:
        """Return whether white space or punctuation begins or ends there, and no token straddles the place."""
        before, after = self.text[place - 1], self.text[place]
        is_change = before.isspace() != after.isspace() or before.isalnum() != after.isalnum()
        return is_change and self.spans[: self.tokens_before(place)][-8:, 1].max(initial=0) <= place


def regroup(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Yield consecutive parts of a text again, in parts of `size` characters; the last may be shorter."""
    held: list[str] = []
    room = size
    for piece in pieces:
        begin = 0
        while len(piece) - begin >= room:
            yield "".join([*held, piece[begin : begin + room]])
            begin, held, room = begin + room, [], size
        held.append(piece[begin:])
        room -= len(held[-1])
    if room < size:
        yield "".join(held)


def encode_windows(encode: Callable[[str], Window], texts: Iterator[str], overlap: int) -> Iterator[Window]:
    """Encode consecutive parts of a text, each but the last longer than `overlap`. Yield the tokens in order."""
    left, border = encode(next(texts, "")), 0
    for text in texts:
        right = encode(left.text[-overlap:] + text)
        if end := _agreed_border(left, right, overlap):
            yield left.part(border, end)
            left, border = right, end - (len(left.text) - overlap)
        else:
            longer = "".join([left.text, text, *islice(texts, len(left.text) // len(text))])  # twice as long
            if len(left.text) <= LONG_WINDOW < len(longer):
                log.warning(
                    "a text has %s characters without a place to cut it: tokenising takes up to 190 bytes of memory "
                    "per character: put spaces or line breaks in it, or cut it into documents",
                    f"{len(longer):,}",
                )
            left = encode(longer)
    yield left.part(border)


def _agreed_border(left: Window, right: Window, overlap: int) -> int | None:
    """Return the border in `left` that lies nearest to the middle of the overlap, or None if the two disagree there."""
    begin, unit = len(left.text) - overlap, overlap // 12
    ours, theirs = left.part(begin + unit, begin + 11 * unit), right.part(unit, 11 * unit)
    if not len(ours.ids):  # what a tokenizer drops shifts its later spans, and no token shows by how much
        return None
    for name in ("ids", "word_begins", "spans"):
        if not np.array_equal(getattr(ours, name), getattr(theirs, name)):
            return None
    middle = begin + overlap // 2
    near = sorted(range(middle - unit, middle + unit + 1), key=lambda place: abs(place - middle))
    return next((place for place in near if left.has_border(place)), None)
