"""Corpus text is data; special tokens are known; both ways of loading agree."""

import json

import numpy as np
import pytest
from conftest import PORTUGUESE, paragraphs
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, processors, trainers

from mlmkit.errors import UserError
from mlmkit.model import load_tokenizer
from mlmkit.tokenizer import Tokenizer

HOSTILE = "a [MASK] <mask> </s> <s> [SEP][CLS] [PAD] <pad> b"


def unigram() -> Tokenizer:
    """A SentencePiece-like tokenizer, whose vocabulary holds its special tokens as pieces."""
    rust = RustTokenizer(models.Unigram())
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False)
    rust.train_from_iterator([*paragraphs(), "<>/"], trainer)
    rust.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return Tokenizer(rust, {"mask_token": "<mask>", "unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"})


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_corpus_text_yields_no_control_token(kind, tokenizer_folder):
    tokenizer = unigram() if kind == "unigram" else Tokenizer.from_folder(tokenizer_folder(kind))
    tokens = tokenizer.encode([HOSTILE, *PORTUGUESE, HOSTILE])
    assert set(tokens.ids.tolist()) & tokenizer.special_ids <= {tokenizer.unk_id}
    assert tokens.lengths.sum() == len(tokens.ids) == len(tokens.words)
    alone = tokenizer.encode([PORTUGUESE[0]]).ids.tolist()
    begin = int(tokens.lengths[0])
    assert tokens.ids[begin : begin + len(alone)].tolist() == alone


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_characters_that_are_lost_to_the_unknown_token_are_counted(kind, tokenizer_folder):
    tokenizer = unigram() if kind == "unigram" else Tokenizer.from_folder(tokenizer_folder(kind))
    texts = ["the name of the 日本語 object", "日本語  日本語", "the object", "日本 e 語", ""]
    expected = [0] * 5 if kind == "bpe" else [3, 6, 0, 3, 0]  # byte-level BPE spells everything
    assert tokenizer.encode(texts).unknown.tolist() == expected


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_loading_with_and_without_transformers_agrees(kind, tokenizer_folder):
    light, full = Tokenizer.from_folder(tokenizer_folder(kind)), load_tokenizer(str(tokenizer_folder(kind)))
    assert light.fingerprint == full.fingerprint
    assert light.special_ids == full.special_ids
    assert (light.prefix, light.suffix, light.limit) == (full.prefix, full.suffix, full.limit)
    assert light.encode(paragraphs()).ids.tolist() == full.encode(paragraphs()).ids.tolist()


def test_text_for_fill_keeps_its_masks(tokenizer_folder):
    tokenizer = Tokenizer.from_folder(tokenizer_folder("wordpiece"))
    ids = tokenizer.encode_control("O rato [MASK] a [MASK].").ids
    assert ids.count(tokenizer.mask_id) == 2
    assert ids[0] == tokenizer.prefix[0]
    assert ids[-1] == tokenizer.suffix[0]


def test_accents_survive_lower_casing():
    from mlmkit.train.config import TokenizerConfig
    from mlmkit.train.tokenizer import train_tokenizer

    config = TokenizerConfig(vocab_size=300, lowercase=True)
    trained = train_tokenizer(lambda: [*PORTUGUESE, "avó avô"], config, max_length=32)
    assert trained.tokenize("Águia CÉU avó avô")[0].startswith("á")
    assert trained.tokenize("AVÓ") != trained.tokenize("AVÔ")


def test_training_a_tokenizer_twice_gives_the_same(tokenizer_folder):
    from mlmkit.train.config import TokenizerConfig
    from mlmkit.train.tokenizer import train_tokenizer

    for kind in ("wordpiece", "bpe"):
        again = train_tokenizer(paragraphs, TokenizerConfig(kind=kind, vocab_size=600), max_length=64)
        assert Tokenizer.from_transformers(again).fingerprint == load_tokenizer(str(tokenizer_folder(kind))).fingerprint


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_long_word_loses_no_character(kind):
    """Proteins: WordPiece takes words of up to 100 characters, so longer ones are cut there."""
    from mlmkit.train.config import TokenizerConfig
    from mlmkit.train.tokenizer import train_tokenizer

    proteins = [
        "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV" * times for times in (1, 3, 40)
    ]
    trained = train_tokenizer(lambda: proteins, TokenizerConfig(kind=kind, vocab_size=300), max_length=64)
    tokens = Tokenizer.from_transformers(trained).encode(proteins)
    assert tokens.unknown.tolist() == [0, 0, 0]
    words = [set(part.tolist()) for part in np.split(tokens.words, np.cumsum(tokens.lengths)[:-1])]
    assert [len(each) for each in words] == ([1, 3, 28] if kind == "wordpiece" else [1, 1, 1])
    spelled = [str(trained.decode(trained(text, add_special_tokens=False).input_ids)) for text in proteins]
    assert [text.replace(" ", "") for text in spelled] == proteins


def test_truncation_and_padding_of_the_file_are_switched_off(tokenizer_folder, tmp_path):
    for file in tokenizer_folder("wordpiece").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rust = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.enable_truncation(4)
    rust.enable_padding(length=9)
    rust.save(str(tmp_path / "tokenizer.json"))
    plain, cut = Tokenizer.from_folder(tokenizer_folder("wordpiece")), Tokenizer.from_folder(tmp_path)
    assert cut.encode(PORTUGUESE).ids.tolist() == plain.encode(PORTUGUESE).ids.tolist()
    assert cut.fingerprint == plain.fingerprint


def test_a_tokenizer_without_a_mask_is_refused(tokenizer_folder, tmp_path):
    for file in tokenizer_folder("wordpiece").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no mask token"):
        Tokenizer.from_folder(tmp_path)
