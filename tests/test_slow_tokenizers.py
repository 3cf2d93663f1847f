"""Tokenizers that transformers has in Python only, with small vocabularies that the tests write."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal, run_json
from transformers import AutoTokenizer, EsmConfig, EsmForMaskedLM

from mlmkit.pretrained import load_tokenizer
from mlmkit.slow_tokenizer import align

RESIDUES = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
VIETNAMESE = "xin chào th@@ ế gi@@ ới < m@@ a@@ s@@ k@@ > @USER HTTPURL"
MERGES = ("x i 9", "xi n</w> 8", "c h 7", "ch à 6", "chà o</w> 5", "t h 4", "g i 3", "ớ i</w> 2")
JAPANESE = "[PAD] [UNK] [CLS] [SEP] [MASK] 東 京 都 ##京 ##都 に 住 む the ##re [ MASK ] ##MASK ##] M A S K"
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQ"
# The class, its files, its settings, a text, and the words of it.
KINDS: dict[str, tuple[str, dict[str, Sequence[str]], dict[str, Any], str, Sequence[str]]] = {
    "esm": ("EsmTokenizer", {"vocab.txt": RESIDUES.split()}, {}, PROTEIN, list(PROTEIN)),
    "phobert": (
        "PhobertTokenizer",
        {"vocab.txt": [f"{token} 1" for token in VIETNAMESE.split()], "bpe.codes": list(MERGES)},
        {},
        "xin chào thế  giới\txin",
        ["xin", "chào", "thế", "giới", "xin"],
    ),
    "bertweet": (
        "BertweetTokenizer",
        {"vocab.txt": [f"{token} 1" for token in VIETNAMESE.split()], "bpe.codes": list(MERGES)},
        {"normalization": True},
        "xin chào thế",
        ["xin", "chào", "thế"],
    ),
    "japanese-characters": (
        "BertJapaneseTokenizer",
        {"vocab.txt": JAPANESE.split()},
        {"subword_tokenizer_type": "character", "word_tokenizer_type": "basic"},
        "東京都 に住む",
        ["東京都", "に住む"],
    ),
    "japanese-pieces": (
        "BertJapaneseTokenizer",
        {"vocab.txt": JAPANESE.split()},
        {"do_lower_case": True},
        "東京都 There",
        ["東京都", "There"],
    ),
    "perceiver": ("PerceiverTokenizer", {}, {}, "a b", ["a", " ", "b"]),
    "roc_bert": (
        "RoCBertTokenizer",
        {"vocab.txt": JAPANESE.split()},
        {},
        "東京 there",
        ["東", "京", "there"],
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a tokenizer of each kind."""

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        name, files, settings, *_ = KINDS[kind]
        for file, lines in files.items():
            (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if kind == "roc_bert":
            for file in ("word_shape.json", "word_pronunciation.json"):
                (folder / file).write_text(json.dumps({char: id for id, char in enumerate(JAPANESE.split())}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **settings}))
        return folder

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_ids_words_and_spans(folders, kind):
    name, _, _, text, words = KINDS[kind]
    folder = folders(kind)
    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert (type(theirs).__name__, theirs.is_fast) == (name, False)
    tokens, [spans] = ours.encode([text]), ours.spans([text])
    assert ours.unk_id not in tokens.ids
    assert tokens.word_begins is not None
    assert ours.frame(tokens.ids).tolist() == theirs(text)["input_ids"]
    assert ours.encode_control(text).ids == theirs(text)["input_ids"]
    begins = [index for index, begin in enumerate(tokens.word_begins) if begin]
    ends = [*begins[1:], len(tokens.ids)]
    found = [text[spans[first, 0] : spans[last - 1, 1]] for first, last in zip(begins, ends, strict=True)]
    assert found == words
    if kind != "bertweet":  # transformers saves it without its merges
        theirs.save_pretrained(folder.parent / f"{kind}-saved")
        assert load_tokenizer(str(folder.parent / f"{kind}-saved")).fingerprint == ours.fingerprint
    assert sum(tokens.unknown) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_in_a_text_is_data(folders, kind):
    *_, text, _ = KINDS[kind]
    tokenizer = load_tokenizer(str(folders(kind)))
    text = f"{text} {tokenizer.mask_token} {text}"
    tokens, [spans] = tokenizer.encode([text]), tokenizer.spans([text])
    assert not (tokenizer.special_ids - {tokenizer.unk_id}) & set(tokens.ids.tolist())
    assert tokenizer.encode_control(text).ids.count(tokenizer.mask_id) == 1
    assert len(spans) == len(tokens.ids)


def test_a_vocabulary_is_part_of_the_fingerprint(folders, tmp_path):
    folder = folders("phobert")
    before = load_tokenizer(str(folder)).fingerprint
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "bpe.codes").write_text("\n".join(MERGES[:3]) + "\n")
    assert load_tokenizer(str(other)).fingerprint != before
    added = AutoTokenizer.from_pretrained(folders("esm"))
    added.add_tokens(["MKT"])
    added.save_pretrained(tmp_path / "added")
    assert load_tokenizer(str(tmp_path / "added")).fingerprint != load_tokenizer(str(folders("esm"))).fingerprint


def test_unknown_characters_are_counted(folders):
    tokenizer = load_tokenizer(str(folders("japanese-pieces")))
    tokens = tokenizer.encode(["東京都 zzz the", "the"])
    assert tokens.unknown.tolist() == [3, 0]
    long = "the 東京都 " * 21_000  # longer than a window
    pieces = list(tokenizer.encode_pieces([long[:100_001], long[100_001:]]))
    assert (len(pieces), sum(len(piece.ids) for piece in pieces)) == (2, 84_000)


def test_tokens_that_a_text_does_not_spell_share_what_lies_between():
    assert align("The ﬁne day", ["the", "fine", "day"]) == [(0, 3), (4, 7), (8, 11)]
    assert align("ab zzz cd", ["ab", "", "", "cd"]) == [(0, 2), (3, 6), (3, 6), (7, 9)]
    assert align("zz", ["", ""]) == [(0, 2), (0, 2)]
    assert align(" ", []) == []


@pytest.fixture(scope="module")
def protein_model(folders, tmp_path_factory) -> Path:
    """A tiny ESM with random weights."""
    folder = Path(shutil.copytree(folders("esm"), tmp_path_factory.mktemp("esm") / "model"))
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=66,
        mask_token_id=32,
        pad_token_id=1,
        position_embedding_type="rotary",
    )
    EsmForMaskedLM(config).save_pretrained(folder)
    return folder


def test_a_checkpoint_with_it_runs_on_torch(capsys, protein_model, tmp_path):
    text = tmp_path / "proteins.txt"
    text.write_text(f"{PROTEIN}\n{PROTEIN[::-1]}\n")
    [first, _] = run_json(capsys, "score", protein_model, text, "--per-word", "--per-token")["texts"]
    assert [token["token_str"] for token in first["per_token"]] == list(PROTEIN)
    assert [word["word"] for word in first["per_word"]] == [PROTEIN]
    measured = run_json(
        capsys, "eval", protein_model, "--set", text, "--metric", "masked", "--metric", "pseudo", "--whole-word"
    )
    assert {"masked_cross_entropy", "pseudo_perplexity"} <= measured["metrics"].keys()
    filled = run_json(capsys, "fill", protein_model, f"{PROTEIN[:5]}<mask>{PROTEIN[6:]}")
    assert len(filled["masks"][0]) == 5
    ids = torch.tensor([AutoTokenizer.from_pretrained(protein_model)(PROTEIN)["input_ids"]])
    network: Any = EsmForMaskedLM.from_pretrained(protein_model).eval()
    expected = 0.0
    for place in range(1, ids.shape[1] - 1):
        masked = ids.clone()
        masked[0, place] = 32
        with torch.no_grad():
            expected += float(network(masked).logits[0, place].log_softmax(-1)[ids[0, place]])
    assert first["pseudo_log_likelihood"] == pytest.approx(expected, abs=1e-4)


def test_it_is_refused_by_name_where_it_cannot_be_used(capsys, protein_model, text_file, tmp_path):
    for layout in ([], ["--layout", "transformers"]):
        said = refusal(capsys, "export", protein_model, "--output", tmp_path / "exported", *layout)
        assert "EsmTokenizer exists in Python only, so it cannot be exported" in said
    config, words = tmp_path / "train.toml", tmp_path / "words.txt"
    words.write_text("MKT\n")
    config.write_text(f'[data]\ntrain = "{text_file}"\n')
    start = [f"model.init_from={protein_model}", f"tokenizer.add={words}"]
    for settings in ([f"tokenizer.path={protein_model}"], start):
        options = [part for setting in settings for part in ("--set", setting)]
        said = refusal(capsys, "train", config, "--output", tmp_path / "run", *options)
        assert "EsmTokenizer exists in Python only" in said
