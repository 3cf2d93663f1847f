"""Tokenizers of every kind against transformers, special tokens, words, unknown characters."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PORTUGUESE, paragraphs
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from mlmkit.corpus import tokenize
from mlmkit.eval.rows import LATER_PIECE, pieces, word_ends
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.pretrained import load_tokenizer
from mlmkit.tokenizer import CLEAN_UP, CLEAN_UP_BPE, Tokenizer
from mlmkit.train.config import TokenizerConfig
from mlmkit.train.tokenizer import train_tokenizer

HOSTILE = "a [MASK] <mask> </s> <s> [SEP][CLS] [PAD] <pad> b"
DATA = Path(os.environ.get("MLMKIT_DATA", "missing")) / "tokenizers"

# ------------------------------------------------------------------ a tokenizer of every kind

BERT = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
ROBERTA = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _framed(rust: RustTokenizer, names: dict[str, str], **settings: Any) -> PreTrainedTokenizerFast:
    rust.add_special_tokens(list(names.values()))
    cls, sep = names["cls_token"], names["sep_token"]
    special = [(token, rust.token_to_id(token)) for token in (cls, sep)]
    rust.post_processor = processors.TemplateProcessing(single=f"{cls} $A {sep}", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=rust, **names, **settings)


def _wordpiece(*, lowercase: bool, **settings: Any) -> PreTrainedTokenizerFast:
    rust = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=list(BERT.values()), show_progress=False)
    rust.train_from_iterator(paragraphs(), trainer)
    return _framed(rust, BERT, **settings)


def _byte_level(*, prefix: bool, splits: bool = True, **settings: Any) -> PreTrainedTokenizerFast:
    rust, byte_level = RustTokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    rust.pre_tokenizer, rust.decoder = byte_level, decoders.ByteLevel()
    specials, alphabet = list(ROBERTA.values()), pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"special_tokens": specials, "initial_alphabet": alphabet, "show_progress": False}
    rust.train_from_iterator(paragraphs(), trainers.BpeTrainer(vocab_size=600, **options))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=splits)
    return _framed(rust, ROBERTA, **settings)


def _unigram(**settings: Any) -> PreTrainedTokenizerFast:
    """Like SentencePiece: the vocabulary has the special tokens as pieces."""
    rust = RustTokenizer(models.Unigram())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = list(ROBERTA.values())
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False)
    rust.train_from_iterator([*paragraphs(), "<>/", "one\ntwo"], trainer)
    return _framed(rust, ROBERTA, **settings)


def _sentencepiece(*, prepend: bool, special_bytes: bool = False, text: str = "") -> PreTrainedTokenizerFast:
    """Spaces become marks before pre-tokenising, as in Gemma's and Llama's tokenizers.

    With `text`, characters that are not in it have no token; without it, BPE falls back to bytes.
    """
    trained = RustTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    specials = [*ROBERTA.values(), *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    trained.train_from_iterator([text] if text else paragraphs(), trainer)
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    spells_all: dict[str, Any] = {} if text else {"unk_token": "<unk>", "byte_fallback": True}
    rust = RustTokenizer(models.BPE(learned["vocab"], merges, **spells_all))
    replace = normalizers.Replace(" ", "\u2581")
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prepend else replace
    if not prepend:
        rust.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # no space is left to split at
        rust.add_tokens([AddedToken("\n\n", normalized=False)])
    spell = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*spell, decoders.Strip(" ", 1, 0)] if prepend else spell)
    if special_bytes:
        rust.add_special_tokens(BYTES)
    return _framed(rust, ROBERTA)


def _real_bert(name: str, *, lowercase: bool) -> PreTrainedTokenizerFast:
    tokens = (DATA / name / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return BertTokenizer(vocab={token: id for id, token in enumerate(tokens)}, do_lower_case=lowercase)


def _real_byte_level() -> PreTrainedTokenizerFast:
    folder = DATA / "gpt2-roberta-bpe"
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    vocab |= {token: len(vocab) + place for place, token in enumerate(ROBERTA.values())}
    merges: Any = [tuple(line.split()) for line in lines]
    return RobertaTokenizer(vocab=vocab, merges=merges)


Makers = dict[str, Callable[[], PreTrainedTokenizerFast]]
KINDS: Makers = {
    "wordpiece cased": lambda: _wordpiece(lowercase=False),
    "wordpiece uncased": lambda: _wordpiece(lowercase=True),
    "byte-level": lambda: _byte_level(prefix=False),
    "byte-level, prefix": lambda: _byte_level(prefix=True),
    "byte-level, unsplit": lambda: _byte_level(prefix=False, splits=False),
    "unigram": _unigram,
    "gemma": lambda: _sentencepiece(prepend=False),
    "llama": lambda: _sentencepiece(prepend=True),
    "special bytes": lambda: _sentencepiece(prepend=True, special_bytes=True),
    "greek": lambda: _sentencepiece(prepend=False, text="αβγ δεζ ηθι κλμ νξο πρσ τυφ χψω"),
    "real bert cased": lambda: _real_bert("bert-base-cased", lowercase=False),
    "real bert uncased": lambda: _real_bert("bert-base-uncased", lowercase=True),
    "real byte-level": _real_byte_level,
}
CLEANED: Makers = {
    "cleaned wordpiece": lambda: _wordpiece(lowercase=True, **{CLEAN_UP: True}),
    "cleaned unigram": lambda: _unigram(**{CLEAN_UP: True}),
    "cleaned byte-level, which does not": lambda: _byte_level(prefix=False, **{CLEAN_UP: True}),
    "cleaned byte-level, all the same": lambda: _byte_level(prefix=False, **{CLEAN_UP: True, CLEAN_UP_BPE: True}),
}
# Spaces do not split text: a word is the whole text, or the part between added tokens.
UNSPLIT = {"byte-level, unsplit": "Ġ", "gemma": "▁", "llama": "▁", "special bytes": "▁", "greek": "▁"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], tuple[Tokenizer, Tokenizer, Any]]:
    """Make a kind: our tokenizer from the folder, ours from transformers, and transformers' own."""

    @cache
    def make(kind: str) -> tuple[Tokenizer, Tokenizer, Any]:
        if kind.startswith("real") and not DATA.exists():
            pytest.skip("needs MLMKIT_DATA with tokenizers")
        folder = tmp_path_factory.mktemp("kind")
        (KINDS | CLEANED)[kind]().save_pretrained(folder)
        return Tokenizer.from_folder(folder), load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)

    return make


ODD = (
    *("", " ", "\t", "a\tb", "a\r\nb", "one\ntwo\n\nthree", "  around  ", "a    b", "x" * 300, "1234567890 3.14 1,000"),
    *("👍🏽 👩‍👩‍👧", "🏴󠁧󠁢󠁥󠁮󠁧󠁿 flag", "cafe\u0301 A\u030a", "café Å ﬁ ½ Ⅷ", "z̸̢a̶̧l̴g̵o", "𝔘𝔫𝔦 𐍈", "İstanbul ß ǅ"),
    *("שלום עולם", "مرحبا \u200f! بك", "\u202eabc\u202c", "日本語 テキスト", "中文没有空格"),
    *("ภาษาไทย", "αβγ δεζ", "한국어 단어"),
    *(
        "a\u00a0b",
        "a\u200bb",
        "a\u200db",
        "a\u2003b\u3000c",
        "\ufeffa",
        "\u2028a\u2029b",
        "\0\x01\x1b[0m",
        "a\x7fb\x85c",
    ),
    *("don't we've I'm he's n't . !", "▁a ▁b", "Ġa Ċb", "##a ##b", "<0x0A><0xC3>", "<unk><pad> [UNK]", HOSTILE),
)


def _same_ids(made: tuple[Tokenizer, Tokenizer, Any], texts: Sequence[str]) -> list[bool]:
    light, full, theirs = made
    expected = theirs(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert light.encode(texts).ids.tolist() == full.encode(texts).ids.tolist()
    return [light.encode([text]).ids.tolist() == ids for text, ids in zip(texts, expected, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_texts_get_the_ids_that_transformers_gives(kind, made):
    light, full, theirs = made(kind)
    differs = [text for text, same in zip(ODD, _same_ids(made(kind), ODD), strict=True) if not same]
    # A wanted difference: in transformers a text that spells "<s>" gets the control token, if that is a piece.
    assert differs == ([text for text in ODD if "<pad>" in text] if kind == "unigram" else [])
    assert (light.prefix, light.suffix) == (full.prefix, full.suffix) != ([], [])
    assert light.frame(light.encode(["α b"]).ids).tolist() == theirs("α b")["input_ids"]
    assert (light.fingerprint, light.special_ids, light.limit) == (full.fingerprint, full.special_ids, full.limit)


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_gets_the_ids_that_transformers_gives(kind, made):
    tokenizers = made(kind)

    @given(st.lists(st.text(max_size=30), min_size=1, max_size=3))
    @settings(max_examples=40)
    def check(texts: list[str]) -> None:
        assert all(_same_ids(tokenizers, texts))

    check()


@pytest.mark.parametrize("kind", [*KINDS, *CLEANED])
def test_ids_become_the_text_that_transformers_gives(kind, made):
    light, full, theirs = made(kind)
    texts = (*ODD, "it 's [MASK] , I 'm here . he ' s don't ! 've 're ?", *paragraphs()[:20])
    for ids in theirs(list(texts))["input_ids"]:
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert light.decode(ids, skip_special_tokens=skip) == expected
            assert full.decode(ids, skip_special_tokens=skip) == expected
    if not kind.startswith("real"):  # their decoders remove those spaces themselves
        cleaned = light.decode(light.encode([" a ."]).ids.tolist()).strip() == "a."
        assert cleaned == (kind.startswith("cleaned") and "does not" not in kind)


def test_bytes_of_a_text_are_ordinary_even_if_they_are_marked_special(made):
    light, _, theirs = made("special bytes")
    assert light.encode(["ж"]).ids.tolist() == theirs.convert_tokens_to_ids(["▁", "<0xD0>", "<0xB6>"])
    assert not light.special_ids & set(theirs.convert_tokens_to_ids(BYTES))
    assert set(theirs.convert_tokens_to_ids(BYTES)) <= set(light.masking.ordinary.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_the_tokenizers_own_or_begin_at_spaces(kind, made):
    light, _, theirs = made(kind)
    for texts in (ODD, paragraphs()):
        tokens, begin = light.encode(texts), 0
        for text, length in zip(texts, tokens.lengths.tolist(), strict=True):
            if kind == "unigram" and "<pad>" in text:  # spelled out, in the same word
                begin += length
                continue
            encoding = theirs(text, add_special_tokens=False, split_special_tokens=True)
            expected = encoding.word_ids()
            if kind in UNSPLIT:
                word, previous = -1, None
                for place, token in enumerate(encoding.tokens()):
                    spaces = (UNSPLIT[kind], *"\t\n\rĉĊč", "<0x20>", "<0x09>", "<0x0A>", "<0x0D>")
                    word += place == 0 or expected[place] != previous or token.startswith(spaces)
                    previous, expected[place] = expected[place], word
            begins = [now != last for now, last in zip(expected, [None, *expected], strict=False)]
            assert tokens.word_begins[begin : begin + length].tolist() == begins
            begin += length
    before = [json.loads(light._serialized), light.named, sorted(light.special_ids)]
    same = light.fingerprint == sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert same == (kind not in UNSPLIT)  # caches stay valid, except those with the old words


def test_whole_words_of_an_unsplit_text_are_selected_one_by_one(made):
    """`word_ids()` takes each document for one word, so either all of its tokens would be selected or none."""
    light, _, _ = made("gemma")
    corpus = tokenize([text for text in paragraphs() if len(text.split()) > 20], light)
    recipe = MaskRecipe(whole_word=True)
    found = corrupt(corpus.ids, corpus.lengths, corpus.keys, recipe, light.masking, seed=0, words=corpus.words)
    document = np.searchsorted(corpus.starts, found.selected, side="right") - 1
    share = np.bincount(document, minlength=len(corpus)) / corpus.lengths
    assert share.max() < 0.6
    assert (share == 0).mean() < 0.1
    assert share.mean() == pytest.approx(0.15, abs=0.02)
    kinds = pieces(corpus, np.arange(len(corpus.ids)))
    begins = np.array([light.token(id).startswith("▁") for id in corpus.ids.tolist()])
    begins[corpus.starts[:-1]] = True
    assert (kinds != LATER_PIECE).tolist() == begins.tolist()
    assert (word_ends(corpus)[begins] - np.flatnonzero(begins)).max() < 30


@pytest.fixture(params=["wordpiece", "bpe", "unigram"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(kind, tokenizer_folder, made) -> Tokenizer:
    return made(kind)[0] if kind == "unigram" else Tokenizer.from_folder(tokenizer_folder(kind))


def test_corpus_text_yields_no_control_token(tokenizer):
    tokens = tokenizer.encode([HOSTILE, *PORTUGUESE, HOSTILE])
    assert set(tokens.ids.tolist()) & tokenizer.special_ids <= {tokenizer.unk_id}
    assert tokens.lengths.sum() == len(tokens.ids) == len(tokens.word_begins)
    alone = tokenizer.encode([PORTUGUESE[0]]).ids.tolist()
    begin = int(tokens.lengths[0])
    assert tokens.ids[begin : begin + len(alone)].tolist() == alone


def test_words_are_left_out_if_nobody_asks(tokenizer):
    with_words, without = (tokenizer.encode([HOSTILE, *PORTUGUESE], words=words) for words in (True, False))
    assert with_words.word_begins is not None and without.word_begins is None
    for name in ("ids", "lengths", "unknown"):
        assert getattr(with_words, name).tolist() == getattr(without, name).tolist()


def test_characters_that_are_lost_to_the_unknown_token_are_counted(kind, tokenizer):
    texts = ["the name of the 日本語 object", "日本語  日本語", "the object", "日本 e 語", ""]
    expected = [0] * 5 if kind == "bpe" else [3, 6, 0, 3, 0]  # byte-level BPE spells everything
    assert tokenizer.encode(texts).unknown.tolist() == expected


def test_text_for_fill_keeps_its_masks(tokenizer_folder):
    tokenizer = Tokenizer.from_folder(tokenizer_folder("wordpiece"))
    ids = tokenizer.encode_control("O rato [MASK] a [MASK].").ids
    assert ids.count(tokenizer.mask_id) == 2
    assert (ids[0], ids[-1]) == (tokenizer.prefix[0], tokenizer.suffix[0])


def test_other_threads_run_while_a_long_text_is_tokenised(tokenizer_folder):
    tokenizer, counts, is_over = Tokenizer.from_folder(tokenizer_folder("wordpiece")), [0], threading.Event()

    def count() -> None:
        while not is_over.is_set():
            counts[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for tokenize_it in (tokenizer.encode_control, lambda text: list(tokenizer.spans([text]))):
            before = counts[0]
            tokenize_it("1.!" * 100_000)
            assert counts[0] - before > 100_000  # about 30,000 happen just before and after
    finally:
        is_over.set()
        thread.join()


def test_accents_survive_lower_casing():
    config = TokenizerConfig(vocab_size=300, lowercase=True)
    trained = train_tokenizer(lambda: [*PORTUGUESE, "avó avô"], config, max_length=32)
    assert trained.tokenize("Águia CÉU avó avô")[0].startswith("á")
    assert trained.tokenize("AVÓ") != trained.tokenize("AVÔ")


def test_training_a_tokenizer_twice_gives_the_same(tokenizer_folder):
    for kind in ("wordpiece", "bpe"):
        again = train_tokenizer(paragraphs, TokenizerConfig(kind=kind, vocab_size=600), max_length=64)
        assert Tokenizer.from_transformers(again).fingerprint == load_tokenizer(str(tokenizer_folder(kind))).fingerprint


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_long_word_loses_no_character(kind):
    """WordPiece accepts words of up to 100 characters, so longer ones, such as proteins, are cut."""
    protein = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV"
    proteins = [protein, protein * 3, protein * 40]
    trained = train_tokenizer(lambda: proteins, TokenizerConfig(kind=kind, vocab_size=300), max_length=64)
    tokens = Tokenizer.from_transformers(trained).encode(proteins)
    assert tokens.unknown.tolist() == [0, 0, 0]
    begins = np.split(np.array(tokens.word_begins), np.cumsum(tokens.lengths)[:-1])
    assert [each.sum() for each in begins] == ([1, 3, 28] if kind == "wordpiece" else [1, 1, 1])
    spelled = [str(trained.decode(trained(text, add_special_tokens=False).input_ids)) for text in proteins]
    assert [text.replace(" ", "") for text in spelled] == proteins


def test_truncation_and_padding_of_the_file_are_switched_off(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder("wordpiece"), tmp_path, dirs_exist_ok=True)
    rust = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.enable_truncation(4)
    rust.enable_padding(length=9)
    rust.save(str(tmp_path / "tokenizer.json"))
    plain, cut = Tokenizer.from_folder(tokenizer_folder("wordpiece")), Tokenizer.from_folder(tmp_path)
    assert cut.encode(PORTUGUESE).ids.tolist() == plain.encode(PORTUGUESE).ids.tolist()
    assert cut.fingerprint == plain.fingerprint
