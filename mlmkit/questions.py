"""What `fill` is asked: a text with masks becomes a `Question`, tokenised, checked, and cut to a window if allowed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import ModelInfo
from mlmkit.errors import UserError
from mlmkit.tokenizer import LONGEST_TEXT, Tokenizer

LEAST_BEAM = 10  # of three adjacent masks it finds what a beam of 100 finds in 96 % of texts; a beam of 1 in 57 %


class NoMaskError(UserError):
    """The text has no mask."""


class TextTooLongError(UserError):
    """A text or target has more tokens than the model takes, or more characters than so many tokens can hold."""


class TargetError(UserError):
    """A target has no token in the vocabulary, or cannot be scored whole."""


@dataclass(frozen=True)
class Question:
    """A text to fill, which messages call `name`.

    `ids` `[seq]` includes special tokens, `masks` `[masks]` holds the positions of its masks; both are int64. `tokens`
    is the length of the whole text, of which `ids` may be a window. If there are `targets`, ids mapped to text, only
    these are ranked. Unless `whole_targets`, each has one id, and `stand_ins` maps the targets of several tokens to
    their first.
    """

    name: str
    ids: NDArray[np.int64]
    masks: NDArray[np.int64]
    tokens: int
    targets: dict[tuple[int, ...], str]
    stand_ins: dict[str, str]
    top_k: int
    whole_targets: bool
    joint: bool

    @property
    def is_truncated(self) -> bool:
        """Whether `ids` is a window of the text."""
        return self.tokens > len(self.ids)

    @property
    def beam(self) -> int:
        """How many fillings of the first masks are kept when all masks are filled jointly."""
        return max(self.top_k, LEAST_BEAM)

    @cached_property
    def contexts(self) -> dict[tuple[int, tuple[int, ...]], list[int]]:
        """The rows per mask that score the targets: number of pieces and known first ones -> indices of the targets."""
        contexts: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for index, pieces in enumerate(self.targets):
            for known in range(len(pieces)):
                contexts.setdefault((len(pieces), pieces[:known]), []).append(index)
        return contexts

    @property
    def candidates(self) -> int:
        """An upper bound on the candidates that are looked up for the answer."""
        return len(self.masks) * (self.beam if self.joint else max(self.top_k, len(self.targets)))

    @property
    def rows(self) -> int:
        """An upper bound on the rows that are scored at once."""
        longer = sum(size > 1 for size, _ in self.contexts)
        return self.beam if self.joint and len(self.masks) > 1 else 1 + longer * len(self.masks)

    @property
    def work(self) -> int:
        """An upper bound on the tokens that the model reads for the answer."""
        rounds, longest = len(self.masks) if self.joint else 1, max(map(len, self.targets), default=1)
        return rounds * self.rows * (len(self.ids) + longest - 1)


def ask_all(
    tokenizer: Tokenizer,
    info: ModelInfo,
    texts: Sequence[str],
    *,
    top_k: int = 5,
    targets: str | Sequence[str] = (),
    whole_targets: bool = False,
    joint: bool = False,
    truncation: bool = False,
    max_length: int | None = None,
    names: Sequence[str] = (),
) -> list[Question]:
    """The questions for several texts with the options of `fill`. `names` say in messages which text it is.

    Raises `NoMaskError` for a text without a mask, `TextTooLongError` for a text or target that the model cannot take,
    `TargetError` for a target that cannot be scored, and `UserError` for invalid UTF-8 and for options that are out of
    range or have no effect.
    """
    targets = [targets] if isinstance(targets, str) else targets  # as in transformers' pipeline
    if not all(_is_unicode(string) for string in (*texts, *targets)):
        raise UserError("a text or a target is not valid UTF-8")
    if not 1 <= top_k <= info.top_k:
        raise UserError(f"top_k must be between 1 and {info.top_k}, not {top_k}")
    if whole_targets and not targets:
        raise UserError("whole_targets scores targets, and none is named: name targets too")
    if joint and targets:
        raise UserError("joint fillings rank the whole vocabulary: leave out either joint or the targets")
    if max_length is not None and not truncation:
        raise UserError("a maximum length has no effect without truncation: ask for truncation too")
    least, most = tokenizer.added_tokens + 1, info.max_length if max_length is None else max_length
    if max_length is not None and not least <= most <= info.max_length:
        raise UserError(f"max_length must be between {least} and {info.max_length}, not {most}")
    ids, stand_ins = _target_ids(tokenizer, most if whole_targets else info.max_length, targets, whole_targets)
    extra = max(map(len, ids), default=1) - 1  # tokens that the longest target takes beside the mask's own
    questions = []
    for text, name in zip(texts, names or [""] * len(texts), strict=True):
        try:
            masked = _masked_ids(tokenizer, text, most, extra, truncation)
        except UserError as error:
            raise type(error)(f"{name}: {error}" if name else str(error)) from None
        questions.append(Question(name or "the text", *masked, ids, stand_ins, top_k, whole_targets, joint))
    return questions


def _masked_ids(
    tokenizer: Tokenizer, text: str, most: int, extra: int, truncation: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """The ids of a text with special tokens, at most `most` with `extra` more; its masks; the whole text's length."""
    # All of a text is tokenised before it is cut, because a part alone may have other tokens at its ends. 2^19
    # characters take up to 1 s and 200 MiB, 2 million up to 9 s and 500 MiB.
    characters = most * tokenizer.characters_per_token
    check_length(len(text), "characters", max(characters, LONGEST_TEXT) if truncation else characters)
    ids = np.array(tokenizer.encode_control(text).ids, dtype=np.int64)
    if not truncation:
        kind = "text with its longest target" if extra else "text"
        check_length(len(ids) + extra, "tokens", most, kind, "shorten it or allow truncation")
    masks = np.flatnonzero(ids == tokenizer.mask_id)
    if not len(masks):
        raise NoMaskError(f"the text has no {tokenizer.mask_token}: put it where a word is to be filled in")
    if len(ids) + extra <= most:
        return ids, masks, len(ids)
    before, inner = len(tokenizer.prefix), len(ids) - tokenizer.added_tokens
    begin, end = _window(masks - before, inner, most - tokenizer.added_tokens - extra)
    return tokenizer.frame(ids[before + begin : before + end]), masks - begin, len(ids)


def _window(masks: NDArray[np.int64], length: int, size: int) -> tuple[int, int]:
    """The begin and end of `size` of `length` tokens with the masks in their middle, as far as there is text around."""
    first, span = int(masks[0]), int(masks[-1] - masks[0]) + 1
    if span > size:
        message = f"the masks are too far apart for truncation: from the first to the last are {span} tokens"
        raise TextTooLongError(f"{message}, and {size} fit")
    begin = min(max(first - (size - span) // 2, 0), length - size)
    return begin, begin + size


def check_length(count: int, unit: str, most: int, kind: str = "text", advice: str = "shorten it") -> None:
    """Raise `TextTooLongError` if a text has more than `most` characters or tokens."""
    if count > most:
        raise TextTooLongError(f"a {kind} has {count} {unit}, and at most {most} are taken: {advice}")


def _is_unicode(text: str) -> bool:
    """False for the surrogates that Python puts in place of command-line bytes that are not UTF-8."""
    return text.encode("utf-8", "ignore").decode() == text


def _target_ids(
    tokenizer: Tokenizer, most: int, targets: Sequence[str], whole: bool
) -> tuple[dict[tuple[int, ...], str], dict[str, str]]:
    """Distinct targets in the given order by their ids; without `whole` the first ids, as in transformers' pipeline.

    Then the stand-ins of targets with several tokens.
    """
    ids: dict[tuple[int, ...], str] = {}
    stand_ins: dict[str, str] = {}
    for target in targets:
        pieces = _pieces(tokenizer, most, target)
        if not pieces or pieces[0] == tokenizer.unk_id:
            raise TargetError(f"the target {target!r} has no token in this vocabulary")
        special = tokenizer.special_ids if len(pieces) > 1 else {tokenizer.mask_id, tokenizer.unk_id}
        if whole and special & {*pieces}:
            raise TargetError(f"the target {target!r} cannot be scored whole: it has a special or unknown token")
        if not whole and len(pieces) > 1:
            stand_ins[target] = tokenizer.token(pieces[0])
        ids.setdefault(tuple(pieces if whole else pieces[:1]), target)
    return ids, stand_ins


def _pieces(tokenizer: Tokenizer, most: int, target: str) -> list[int]:
    """The id of a target that is spelled as in the vocabulary; otherwise its tokens, without `prefix` and `suffix`."""
    if (id := tokenizer.token_id(target)) is not None:
        return [id]
    check_length(len(target), "characters", most * tokenizer.characters_per_token, "target")
    framed = tokenizer.encode_control(target).ids
    check_length(len(framed), "tokens", most, "target")
    return framed[len(tokenizer.prefix) : len(framed) - len(tokenizer.suffix)]
