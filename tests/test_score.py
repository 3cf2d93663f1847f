"""`mlmkit score` and `mlmkit.pseudo_log_likelihood`: what words are, and that they take nothing from the text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import PORTUGUESE, refusal, run, run_json

from mlmkit.eval.score_texts import TextScore

TEXTS = (*PORTUGUESE, "  The  interpreter's\tkeyword-only\n arguments, \U0001d54f日本語 … end ")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_surprisal_of_a_word_is_that_of_its_tokens(capsys, kind, checkpoint, lines):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint(kind))
    answer = run_json(capsys, "score", checkpoint(kind), lines, "--per-word", "--per-token")
    assert answer["surprisal_unit"] == "nats"
    for item, text in zip(answer["texts"], TEXTS, strict=True):
        words, tokens = item["per_word"], item["per_token"]
        assert [word["word"] for word in words] == text.split()
        assert all(text[word["begin"] : word["end"]] == word["word"] for word in words)
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert [(token["begin"], token["end"]) for token in tokens] == spans
        expected = dict.fromkeys((word["begin"] for word in words), 0.0)
        for (begin, end), token in zip(spans, tokens, strict=True):
            begin += len(text[begin:end]) - len(text[begin:end].lstrip())
            own = next((word for word in words if begin < word["end"]), words[-1])
            expected[own["begin"]] -= token["log_prob"]
            assert token["word"] == own["word"]
        assert [word["surprisal"] for word in words] == pytest.approx(list(expected.values()), rel=1e-12)
        assert sum(word["tokens"] for word in words) == item["tokens"]
        assert sum(word["surprisal"] for word in words) == pytest.approx(-item["pseudo_log_likelihood"], rel=1e-12)


def test_surprisal_in_bits(capsys, checkpoint, lines):
    nats = run_json(capsys, "score", checkpoint("bert"), lines, "--per-word")
    bits = run_json(capsys, "score", checkpoint("bert"), lines, "--per-word", "--bits")
    assert bits["surprisal_unit"] == "bits"
    for one, two in zip(nats["texts"], bits["texts"], strict=True):
        assert one["pseudo_log_likelihood"] == two["pseudo_log_likelihood"]
        pairs = zip(one["per_word"], two["per_word"], strict=True)
        assert all(b["surprisal"] == pytest.approx(a["surprisal"] / math.log(2)) for a, b in pairs)
    assert "add --per-word" in refusal(capsys, "score", checkpoint("bert"), lines, "--bits")


def test_words_are_shown_with_their_place(capsys, checkpoint, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("O rato\n", encoding="utf-8")
    [word, other] = run_json(capsys, "score", checkpoint("bert"), path, "--per-word")["texts"][0]["per_word"]
    _, out, _ = run(capsys, "score", checkpoint("bert"), path, "--per-word")
    assert [line.split() for line in out.splitlines()[1:]] == [
        [f"{word['surprisal']:.4f}", "0-1", "O"],
        [f"{other['surprisal']:.4f}", "2-6", "rato"],
    ]


@pytest.mark.parametrize(
    ("text", "spans", "words"),
    [
        ("of the day", [(0, 6), (6, 10)], [("of the", [0]), ("day", [1])]),  # one token spans two words
        ("a b c d", [(0, 3), (2, 5), (5, 7)], [("a b c", [0, 1]), ("d", [2])]),  # three words are chained
        ("a  b", [(0, 1), (1, 2), (2, 4)], [("a", [0]), ("b", [1, 2])]),  # a token of white space
        ("ab\n", [(0, 0), (0, 2), (2, 3)], [("ab", [0, 1, 2])]),  # one without characters, one at the end
        ("a \u200b b", [(0, 1), (4, 5)], [("a", [0]), ("\u200b", []), ("b", [1])]),  # a word without tokens
        (" \n", [(0, 2)], [(" \n", [0])]),
        ("", [], [("", [])]),
    ],
)
def test_every_token_belongs_to_one_word(text, spans, words):
    log_prob = -np.arange(1, len(spans) + 1, dtype=np.float32)
    ids = np.zeros(len(spans), dtype=np.int64)
    score = TextScore(text, None, ids, ids, log_prob, np.array(spans, dtype=np.int64).reshape(-1, 2))
    assert [(word.text, word.tokens) for word in score.words] == words
    sums = [sum(log_prob[tokens].tolist()) if tokens else None for _, tokens in words]
    assert [word.log_prob for word in score.words] == sums


@pytest.mark.parametrize("spelling", ["within_word", "within_word_l2r"])
def test_other_spellings_of_within_word(capsys, spelling, checkpoint, lines):
    model = checkpoint("bert")
    scored, expected = (run_json(capsys, "score", model, lines, "--pll", pll) for pll in (spelling, "within-word"))
    assert scored == expected
    assert scored["pll"] == "within-word"
    result = run_json(capsys, "eval", model, "--set", lines, "--metric", "pseudo", "--pll", spelling)
    assert result["pseudo"]["variant"] == "within-word"
