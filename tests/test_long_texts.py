"""A text in pieces, in windows or in chunks has the tokens of the whole text."""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import paragraphs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import DATA, HOSTILE, KINDS, ODD
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from mlmkit.chunks import cuts_before_spaces, last_cut, split_chunks
from mlmkit.long_texts import regroup
from mlmkit.tokenizer import Tokenizer

IN_CHUNKS = {"wordpiece cased", "wordpiece uncased", "byte-level", "byte-level, prefix"}
IN_CHUNKS |= {"real bert cased", "real bert uncased", "real byte-level", "words"}
WINDOW, OVERLAP = 600, 240


def _words() -> RustTokenizer:
    """Whole words, most of them unknown."""
    vocabulary = {word: id for id, word in enumerate(["<unk>", "<mask>", "a", "the", "statement", "."])}
    rust = RustTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rust.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.StripAccents()])
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    return rust


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Tokenizer]:
    @cache
    def make(kind: str) -> Tokenizer:
        if kind == "words":
            return Tokenizer(_words(), {"mask_token": "<mask>"})
        if kind.startswith("real") and not DATA.exists():
            pytest.skip("needs MLMKIT_DATA with tokenizers")
        folder = tmp_path_factory.mktemp("kind")
        KINDS[kind]().save_pretrained(folder)
        return Tokenizer.from_folder(folder)

    return make


@pytest.fixture(params=[*KINDS, "words"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(kind, made, monkeypatch) -> Iterator[Tokenizer]:
    """Of every kind, with small windows."""
    tokenizer = made(kind)
    monkeypatch.setattr(tokenizer, "_window", WINDOW)
    monkeypatch.setattr(tokenizer, "_overlap", OVERLAP)
    yield tokenizer


def whole(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[bool], int]:
    """The tokens that the library gives for the text, without windows and chunks."""
    chunks, tokenizer._chunks = tokenizer._chunks, None
    try:
        tokens = tokenizer._encode([text], True)
        assert tokens.word_begins is not None
    finally:
        tokenizer._chunks = chunks
    return tokens.ids.tolist(), tokens.word_begins.tolist(), int(tokens.unknown.sum())


def in_pieces(tokenizer: Tokenizer, text: str, size: int) -> tuple[list[int], list[bool], int]:
    pieces = [text[begin : begin + size] for begin in range(0, len(text), size)]
    parts = list(tokenizer.encode_pieces(pieces))
    assert all(part.lengths.tolist() == [len(part.ids)] for part in parts)
    ids, begins = ([value for part in parts for value in getattr(part, name)] for name in ("ids", "word_begins"))
    return ids, begins, sum(int(part.unknown.sum()) for part in parts)


FRAGMENTS = (
    *(
        "the",
        "The statement",
        "is",
        "executed.",
        " ",
        " ",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        " \t ",
        "\u00a0",
        "\u3000",
    ),
    *(
        "日本語",
        "中文没有空格。",
        "e\u0301",
        "\u0301",
        "A\u030a",
        "ﬁ½",
        "👍🏽",
        "👩‍👩‍👧",
        "İß",
        "ж",
        "\u200b",
        "\x00",
        "\x1f",
        "\x85",
    ),
    *("x" * 130, "ab" * 160, "don't", "'s", ",", ".", "...", "3.14", "1,000", "(", ")", "-", "_", "▁", "Ġ", "##s"),
    *("[MASK]", "<mask>", "<s>", "</s>", "<unk>", "<0x0A>", HOSTILE),
)
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join) | st.text(max_size=40)
long_texts = st.lists(texts, max_size=25).map(" ".join)
# The tokenizer that knows Greek alone drops nearly all of it, so an overlap of two windows has no token.
RINGS, LIGATURES = "A\u030aA\u030a", "\ufb01\xbd\ufb01\xbd"
DROPPED = f"{RINGS}▁{RINGS}{'ab' * 160}A\u030a{'x' * 130}{LIGATURES}▁▁{RINGS}{'x' * 130}▁{LIGATURES}▁\ufb01\xbd"


def test_a_text_in_pieces_has_the_tokens_of_the_whole(kind, tokenizer):
    exact = 2 if kind == "greek" else 3  # it drops characters, and counts some of them twice or not at a border

    @given(long_texts, st.integers(1, 900))
    @example(DROPPED, 900)
    @settings(max_examples=60)
    def check(text: str, size: int) -> None:
        assert in_pieces(tokenizer, text, size)[:exact] == whole(tokenizer, text)[:exact]
        tokens = tokenizer.encode([text, text[: len(text) // 2]])
        assert tokens.ids[: tokens.lengths[0]].tolist() == whole(tokenizer, text)[0]

    check()


def test_a_long_text_is_tokenised_in_parts(kind, tokenizer, monkeypatch):
    monkeypatch.setattr("mlmkit.tokenizer.LONGEST_TEXT", 2 * WINDOW)
    encode_batch, sizes = tokenizer._encode_batch, []

    def encode(batch: list[str]) -> list:
        sizes.append(sum(map(len, batch)))
        return encode_batch(batch)

    monkeypatch.setattr(tokenizer, "_encode_batch", encode)
    text = " ".join([*paragraphs(), *ODD[:3]] * 2)
    short = paragraphs()[:3]
    for words in (True, False):
        tokens = tokenizer.encode([short[0], text, "", short[1]], words=words)
        expected = [whole(tokenizer, each) for each in (short[0], text, "", short[1])]
        assert tokens.ids.tolist() == [id for ids, _, _ in expected for id in ids]
        assert tokens.lengths.tolist() == [len(ids) for ids, _, _ in expected]
        assert tokens.unknown.tolist() == [unknown for _, _, unknown in expected]
        if words:
            assert tokens.word_begins.tolist() == [begin for _, begins, _ in expected for begin in begins]
        else:
            assert tokens.word_begins is None
    sizes.clear()
    in_pieces(tokenizer, text, 10_000)
    # It drops most of this text, and the library then counts its spans without what was dropped, so none agree.
    assert max(sizes) <= 2 * WINDOW or kind == "greek"


def test_a_part_may_begin_inside_a_word(tokenizer):
    text = "The.statement<s>,executed;" * 100
    assert in_pieces(tokenizer, text, 1000) == whole(tokenizer, text)


def test_a_text_without_a_place_to_cut_grows_and_says_so(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("mlmkit.long_texts.LONG_WINDOW", 8 * WINDOW)
    monkeypatch.setattr("mlmkit.tokenizer.LONGEST_TEXT", 2 * WINDOW)
    text = "The statement " + "жabab" * 2000 + " is executed."
    assert in_pieces(tokenizer, text, 1000) == whole(tokenizer, text)
    (message,) = caplog.messages
    assert message.startswith("a text has 9,000 characters without a place to cut it: ")


@pytest.mark.parametrize("kind", [*KINDS, "words"])
def test_which_tokenizers_work_chunk_by_chunk(kind, made):
    assert (made(kind)._chunks is not None) == (kind in IN_CHUNKS)


@pytest.mark.skipif("MLMKIT_DATA" not in os.environ, reason="needs MLMKIT_DATA")
@pytest.mark.parametrize("kind", ["real bert uncased", "real byte-level", "unigram", "gemma"])
def test_a_book_in_one_line(kind, made, monkeypatch):
    book = (Path(os.environ["MLMKIT_DATA"]) / "novels_en" / "train.txt").read_text(encoding="utf-8")[:80_000]
    monkeypatch.setattr(made(kind), "_window", 20_000)
    for text in (book, book.replace("\n", " ")):
        assert in_pieces(made(kind), text, 30_000) == whole(made(kind), text)


# ------------------------------------------------------------------ chunks


@given(long_texts)
def test_chunks_are_cut_before_spaces_after_other_characters(text):
    chunks = split_chunks(text)
    assert "".join(chunks) == text
    cuts = [place for place in range(1, len(text)) if text[place] == " " and not text[place - 1].isspace()]
    assert np.cumsum([len(chunk) for chunk in chunks if chunk]).tolist() == [*cuts, *[len(text)] * bool(text)]
    assert last_cut(text) == max(cuts, default=0)


@given(st.lists(st.text("ab", max_size=9), max_size=9), st.integers(1, 9))
def test_pieces_are_regrouped(pieces, size):
    parts = list(regroup(pieces, size))
    assert "".join(parts) == "".join(pieces)
    assert all(len(part) == size for part in parts[:-1]) and all(0 < len(part) <= size for part in parts)


def test_a_full_cache_changes_nothing(made, monkeypatch):
    monkeypatch.setattr("mlmkit.chunks.CACHE_BYTES", 20_000)
    tokenizer = Tokenizer(_words(), {"mask_token": "<mask>"})
    assert tokenizer._chunks is not None
    for text in (*paragraphs(), *ODD, *paragraphs()):
        tokens = tokenizer.encode([text])
        assert tokens.word_begins is not None
        assert (tokens.ids.tolist(), tokens.word_begins.tolist(), int(tokens.unknown.sum())) == whole(tokenizer, text)
        assert len(tokenizer._chunks._packed) < 500


@pytest.mark.parametrize(
    "change",
    [
        lambda rust: rust.add_tokens([AddedToken("New York")]),
        lambda rust: rust.add_tokens([AddedToken("York", rstrip=True)]),
        lambda rust: setattr(rust, "normalizer", normalizers.Replace("a b", "ab")),
        lambda rust: setattr(rust, "pre_tokenizer", pre_tokenizers.Split("x", "removed")),
        lambda rust: setattr(rust, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.FixedLength(9)])),
        lambda rust: setattr(rust, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)),
    ],
)
def test_what_may_depend_on_more_than_a_chunk_is_not_cut(change):
    rust = _words()
    assert cuts_before_spaces(json.loads(rust.to_str()))
    change(rust)
    assert not cuts_before_spaces(json.loads(rust.to_str()))
