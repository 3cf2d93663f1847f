"""Text that the tokenizer has no token for: scored as its unknown token, counted, and never free."""

import json
import shutil
from math import floor

import numpy as np
import pytest
from conftest import paragraphs, run
from test_pairs import write_pairs
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer

from mlmkit.backends import load
from mlmkit.corpus import tokenize
from mlmkit.errors import UserError
from mlmkit.eval.api import evaluate
from mlmkit.eval.compare import compare
from mlmkit.eval.sets import find_set
from mlmkit.masking import random_words
from mlmkit.tokenizer import Tokenizer

UNKNOWN = "日本語 日本語"  # six unknown tokens of the WordPiece
NOTHING = "\u200b"  # no token at all


def test_a_sample_draws_unknown_tokens_as_often_and_masks_never_do(checkpoint):
    """Else N times the sample's mean would not estimate the sum."""
    model, texts = load(str(checkpoint("bert"))), [f"{UNKNOWN} {text} {UNKNOWN}" for text in paragraphs()[:12]]
    found = evaluate(model, texts, metrics=("masked", "pseudo"), pseudo_sample=0.5, mask_seed=3)
    corpus, unknown = tokenize(texts, model.tokenizer), model.tokenizer.unk_id or 0
    draws = random_words(corpus.keys, corpus.lengths, np.zeros_like(corpus.lengths), 3, 0)[::2] >> np.uint64(11)
    for metric, share, excluded in (("masked", 0.15, [unknown]), ("pseudo", 0.5, [])):
        tokens = found.tokens.to_pandas().groupby("metric").get_group(metric)
        flat = corpus.starts[tokens["document"].to_numpy()] + tokens["offset"].to_numpy()
        passes = (draws < np.uint64(floor(share * 2**53))) & ~np.isin(corpus.ids, excluded)
        assert flat.tolist() == np.flatnonzero(passes).tolist()
    assert found.documents["scorable"].to_pylist() == corpus.lengths.tolist()
    estimate = tokens["log_prob"].to_numpy().astype(np.float64).mean() * len(corpus.ids)  # of the last, pseudo
    assert found.metrics["pseudo_log_likelihood"]["value"] == pytest.approx(estimate)


def test_figures_per_unit_of_text_need_text_that_is_spelled(capsys, checkpoint, tmp_path):
    known = "The statement is executed. " * 75
    names = ("pseudo_perplexity_per_word", "pseudo_perplexity_per_character", "bits_per_byte")
    for lost, is_spelled in ((2, True), (3, False)):  # of 2,025 characters and a few
        path, folder = tmp_path / f"{lost}.txt", tmp_path / f"result-{lost}"
        path.write_text(f"{known}{'語' * lost}\nThe end.\n", encoding="utf-8")
        options = ["--metric", "pseudo", "--pseudo-sample", 0.1, "--output", folder]
        code, out, err = run(capsys, "eval", checkpoint("bert"), "--set", path, *options)
        assert code == 0, err
        result = json.loads((folder / "result.json").read_text())
        assert result["unknown"]["characters"] == lost
        assert (result["unknown"]["character_share"] < 0.001) == is_spelled
        for name in names:
            assert (result["metrics"][name]["value"] is not None) == is_spelled
        assert result["metrics"]["pseudo_perplexity"]["value"] > 0
        reason = "too many (above 0.1%) for figures per unit of text"
        for text in (out, (folder / "report.html").read_text(encoding="utf-8")):
            assert f"{lost} characters (0.1" in text
            assert (reason in text) != is_spelled
    (found,) = compare([folder, folder])["comparisons"]
    assert "pseudo_perplexity" in found["metrics"] and not set(names) & found["metrics"].keys()
    assert reason in run(capsys, "compare", folder, folder)[1]


def test_tokenizers_are_not_compared_where_one_loses_text(checkpoint, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(f"The {UNKNOWN} is executed.\nThe end.\n", encoding="utf-8")
    for name in ("bert", "roberta"):
        evaluate(checkpoint(name), path, metrics="pseudo", output=tmp_path / name)
    for order in (("bert", "roberta"), ("roberta", "bert")):
        with pytest.raises(UserError, match=r"tokenizers differ, .* 6 tokens .*too many"):
            compare([tmp_path / name for name in order])
    write_pairs(pairs := tmp_path / "pairs.jsonl", [("The end.", f"The {UNKNOWN}.")])
    for name in ("bert", "roberta"):
        evaluate(checkpoint(name), find_set(str(pairs), pairs=True), output=tmp_path / f"pairs-{name}")
    with pytest.raises(UserError, match=r"tokenizers differ, .*too many"):
        compare([tmp_path / "pairs-bert", tmp_path / "pairs-roberta"])


def test_the_unknown_token_need_not_be_named(tokenizer_folder, tmp_path):
    named = Tokenizer.from_folder(tokenizer_folder("wordpiece"))
    folder = shutil.copytree(tokenizer_folder("wordpiece"), tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["unk_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found, expected = (each.encode([f"The {UNKNOWN} is."]) for each in (Tokenizer.from_folder(folder), named))
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.unknown.tolist() == expected.unknown.tolist() == [6]


@pytest.mark.parametrize("normalizer", [None, BertNormalizer(lowercase=True)])
def test_characters_that_a_tokenizer_drops_are_unknown(normalizer):
    """BPE without bytes and without an unknown token has nothing for them, and says nothing."""
    rust = RustTokenizer(BPE())
    if normalizer:
        rust.normalizer = normalizer
    rust.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(special_tokens=["[MASK]"], initial_alphabet=list("the cat"), show_progress=False)
    rust.train_from_iterator(["the cat", "eat the tea"], trainer)
    tokenizer = Tokenizer(rust, {"mask_token": "[MASK]"})
    texts = ["the cat", "the 日本 cat 語", "日本語", " the\u200a", "the cat\u0301"]
    accent = 0 if normalizer else 1  # which the normalizer leaves out
    assert tokenizer.encode(texts).unknown.tolist() == [0, 3, 3, 0, accent]


def test_a_text_without_a_scored_token_has_no_score(capsys, caplog, checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text(f"{NOTHING}\n{UNKNOWN}\n", encoding="utf-8")
    code, out, _ = run(capsys, "score", checkpoint("bert"), tmp_path / "a.txt")
    assert (code, out.split("\n")[0]) == (0, f"-\t0\t{NOTHING}")
    assert "6 characters are unknown" in caplog.text
    _, out, _ = run(capsys, "score", checkpoint("bert"), tmp_path / "a.txt", "--json")
    nothing, unknown = json.loads(out)["texts"]
    assert (nothing["pseudo_log_likelihood"], nothing["tokens"]) == (None, 0)
    assert (unknown["pseudo_log_likelihood"] < 0, unknown["tokens"]) == (True, 6)


@pytest.mark.parametrize(("good", "bad"), [(NOTHING, "The end."), ("The end.", NOTHING), (NOTHING, NOTHING)])
def test_a_pair_with_a_sentence_without_a_scored_token_is_wrong(good, bad, capsys, checkpoint, tmp_path):
    write_pairs(tmp_path / "p.jsonl", [(good, bad)] * 2)
    arguments = ["eval", checkpoint("bert"), "--set", tmp_path / "p.jsonl", "--metric", "pairs"]
    code, out, err = run(capsys, *arguments, "--output", tmp_path / "result")
    if good == bad:
        assert (code, "no token to score" in err) == (2, True)
        return
    result = json.loads((tmp_path / "result" / "result.json").read_text())
    assert result["metrics"]["pair_accuracy"] == {"value": 0, "low": 0, "high": 0}
    assert result["metrics"]["pair_accuracy_per_token"]["value"] == 0
    assert (result["items"]["unscored"], result["items"]["ties"]) == (2, 0)
    assert "2 of 2 items have an option without a scored token" in out


def test_masks_on_text_of_unknown_tokens_alone_say_so(checkpoint):
    with pytest.raises(UserError, match=r"select no token \(never an unknown one\)"):
        evaluate(checkpoint("bert"), [UNKNOWN] * 9)
