"""Truncation, whole targets and joint fillings: against plain transformers, one row at a time, and its pipeline."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KINDS, paragraphs, refusal, run, run_json
from hypothesis import given, settings
from hypothesis import strategies as some
from numpy.typing import NDArray

from mlmkit.artifact import DYNAMIC_INT8
from mlmkit.backends import Backend, load
from mlmkit.fill import answer_all, fill
from mlmkit.questions import TargetError, TextTooLongError, ask_all

LONG = " ".join(paragraphs()[:12]).replace("[", "(")
BACKENDS = [*product(KINDS, ["torch", "onnx"]), ("convbert", "torch")]  # convbert's scores change with padding


class Plain:
    """transformers alone: a model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.model: Any = AutoModelForMaskedLM.from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.mask, self.mask_id = self.tokenizer.mask_token, self.tokenizer.mask_token_id

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def log_prob(self, ids: list[int], position: int) -> NDArray[np.float64]:
        """Of every token of the vocabulary at a position."""
        import torch

        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, position]
        return torch.log_softmax(logits.double(), -1).numpy()

    def chain(self, ids: list[int], positions: list[int], tokens: list[int]) -> float:
        """log P of tokens at open positions, from left to right: each given those before it."""
        ids, total = list(ids), 0.0
        for position, token in zip(positions, tokens, strict=True):
            total += self.log_prob(ids, position)[token]
            ids[position] = token
        return total


@pytest.fixture(scope="module")
def plain(checkpoint: Callable[[str], Path]) -> Callable[[str], Plain]:
    made: dict[str, Plain] = {}
    return lambda kind: made.get(kind) or made.setdefault(kind, Plain(checkpoint(kind)))


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path], artifact: Callable[[str], Path]) -> Callable[[str, str], Backend]:
    made: dict[tuple[str, str], Backend] = {}

    def make(kind: str, backend: str) -> Backend:
        folder = checkpoint(kind) if backend == "torch" else artifact(kind)
        return made.get((kind, backend)) or made.setdefault((kind, backend), load(str(folder), backend))

    return make


def masked(plain: Plain, text: str) -> tuple[str, list[int], list[int]]:
    """A text with masks for each {}, its ids, and the positions of the masks."""
    text = text.replace("{}", plain.mask)
    ids = plain.ids(text)
    return text, ids, [position for position, id in enumerate(ids) if id == plain.mask_id]


# ---------------------------------------------------------------- truncation


@pytest.mark.parametrize(("kind", "backend"), BACKENDS)
@pytest.mark.parametrize("place", [0, 300, len(LONG)])
def test_a_window_around_the_mask_is_filled(kind, backend, place, model, plain):
    plain = plain(kind)
    text, ids, [mask] = masked(plain, f"{LONG[:place]} {{}} {LONG[place:]}")
    begin = min(max(mask - 14, 1), len(ids) - 1 - 30)  # 14 tokens before the mask, 15 behind it, [CLS] and [SEP]
    window = [ids[0], *ids[begin : begin + 30], ids[-1]]
    expected = plain.log_prob(window, window.index(plain.mask_id))
    [candidates] = fill(model(kind, backend), text, top_k=9, truncation=True, max_length=32)
    assert [each["token"] for each in candidates] == np.argsort(-expected)[:9].tolist()
    scores = np.exp(expected[[each["token"] for each in candidates]])
    np.testing.assert_allclose([each["score"] for each in candidates], scores, rtol=1e-4)
    best = [candidates[0]["token"] if id == plain.mask_id else id for id in window]
    assert candidates[0]["sequence"] == plain.tokenizer.decode(best, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_at_the_beginning_the_window_is_the_pipelines(kind, checkpoint, model):
    from transformers import pipeline

    pipe: Any = pipeline("fill-mask", model=str(checkpoint(kind)))
    cut: Any = {"truncation": True, "max_length": 24}
    expected = pipe(f"{pipe.tokenizer.mask_token} {LONG}", tokenizer_kwargs=cut)
    [candidates] = fill(model(kind, "torch"), f"{pipe.tokenizer.mask_token} {LONG}", **cut)
    assert candidates == [{**each, "score": pytest.approx(each["score"], abs=1e-5)} for each in expected]


@settings(max_examples=100, deadline=None)
@given(words=some.lists(some.booleans(), min_size=1, max_size=120).filter(any), size=some.integers(3, 64))
def test_the_window_holds_all_masks_in_its_middle(words, size, model):
    backend = model("bert", "torch")
    text = " ".join("[MASK]" if is_mask else "the" for is_mask in words)
    masks = [index for index, is_mask in enumerate(words) if is_mask]
    span, room = masks[-1] - masks[0] + 1, size - 2

    def ask(**options: Any) -> Any:
        return ask_all(backend.tokenizer, backend.info, [text], **options)[0]

    if len(words) <= room:
        question, whole = ask(truncation=True, max_length=size), ask()
        assert not question.is_truncated
        np.testing.assert_array_equal(question.ids, whole.ids)
    elif span > room:
        with pytest.raises(TextTooLongError, match=f"from the first to the last are {span} tokens, and {room} fit"):
            ask(truncation=True, max_length=size)
    else:
        question = ask(truncation=True, max_length=size)
        assert (len(question.ids), question.tokens, question.is_truncated) == (size, len(words) + 2, True)
        assert len(question.masks) == len(masks)
        begin = masks[0] - (question.masks[0] - 1)  # of the window, in words
        assert [bool(id == backend.tokenizer.mask_id) for id in question.ids[1:-1]] == words[begin : begin + room]
        before, after = masks[0] - begin, begin + room - 1 - masks[-1]
        assert after - before in (0, 1) or (before < after and begin == 0) or (begin + room == len(words))


def test_a_text_that_fits_is_not_changed_and_one_that_is_cut_is_named(capsys, caplog, checkpoint, tmp_path):
    short, long = "The [MASK] statement is [MASK].", f"[MASK] {LONG}"
    assert run_json(capsys, "fill", checkpoint("bert"), short, "--truncation") == run_json(
        capsys, "fill", checkpoint("bert"), short
    )
    assert "truncated" not in caplog.text
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (short, long)), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        _, out, _ = run(
            capsys, "fill", checkpoint("bert"), "--file", path, "--truncation", "--max-length", 20, "--json"
        )
    assert [json.loads(line).get("truncated", False) for line in out.splitlines()] == [False, True]
    [line] = [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]
    assert line.startswith(f"{path}: text 2, '[MASK] ") and "is truncated to 20 of its" in line


def test_impossible_windows_are_refused(capsys, checkpoint):
    def refused(text: str, *options: object) -> str:
        return refusal(capsys, "fill", checkpoint("bert"), text, *options)

    assert "a maximum length has no effect without truncation" in refused("a [MASK]", "--max-length", 20)
    for length in (-1, 0, 2, 65):
        error = refused("a [MASK]", "--truncation", "--max-length", length)
        assert f"max_length must be between 3 and 64, not {length}" in error
    assert "the masks are too far apart for truncation" in refused(f"[MASK] {LONG} [MASK]", "--truncation")
    assert "shorten it or allow truncation" in refused(f"[MASK] {'a ' * 70}")
    assert "has no [MASK]" in refused(LONG, "--truncation")
    assert "characters, and at most 524288 are taken" in refused("[MASK] " + "a" * 2**19, "--truncation")


# ---------------------------------------------------------------- whole targets

TARGETS = [" exception", " the", " statement of Roma", "the", " exception", " raised exceptions", ","]


@pytest.mark.parametrize(("kind", "backend"), BACKENDS)
@pytest.mark.parametrize("text", ["If the{} is raised", "The{} of the{}, in{}."])
def test_whole_targets_are_scored_by_the_chain_rule(kind, backend, text, model, plain):
    plain, backend = plain(kind), model(kind, backend)
    text, ids, masks = masked(plain, text)
    answer = fill(backend, text, targets=TARGETS, whole_targets=True, top_k=20)
    assert len(answer) == len(masks)
    lengths = set()
    for mask, candidates in zip(masks, answer, strict=True):
        scores = [each["score"] for each in candidates]
        assert scores == sorted(scores, reverse=True)
        assert {each["token_str"] for each in candidates} <= set(TARGETS)
        for each in candidates:
            pieces = plain.tokenizer(each["token_str"], add_special_tokens=False)["input_ids"]
            opened = [*ids[:mask], *[plain.mask_id] * len(pieces), *ids[mask + 1 :]]
            expected = plain.chain(opened, list(range(mask, mask + len(pieces))), pieces)
            assert each["tokens"] == pieces
            assert each["log_prob"] == pytest.approx(expected, abs=1e-4)
            assert each["score"] == pytest.approx(math.exp(expected / len(pieces)), rel=1e-4)
            filled = [*ids[:mask], *pieces, *ids[mask + 1 :]]
            assert each["sequence"] == plain.tokenizer.decode(filled, skip_special_tokens=len(masks) == 1)
            lengths.add(len(pieces))
        tokens = [tuple(plain.tokenizer(target, add_special_tokens=False)["input_ids"]) for target in TARGETS]
        assert len(candidates) == len(set(tokens))  # each once
    assert len(lengths) > 1 in lengths


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_targets_of_one_token_have_the_score_that_they_have_anyway(kind, model, plain):
    backend, mask, targets = model(kind, "onnx"), plain(kind).mask, [" the", ",", " of"]
    for text in (f"The {mask} is", f"The {mask} is {mask}"):
        whole = fill(backend, text, targets=targets, whole_targets=True)
        for one, other in zip(whole, fill(backend, text, targets=targets), strict=True):
            assert [each["tokens"] for each in one] == [[each["token"]] for each in other]
            assert [each["score"] for each in one] == [each["score"] for each in other]
            assert [each["sequence"] for each in one] == [each["sequence"] for each in other]


def test_whole_targets_and_truncation_leave_room_for_the_longest(model, plain):
    plain, backend = plain("bert"), model("bert", "onnx")
    options: Any = {"targets": ["the", "exceptionally raised statements"], "whole_targets": True}
    text, ids, [mask] = masked(plain, f"{LONG[:300]} {{}} {LONG[300:]}")
    [candidates] = fill(backend, text, truncation=True, max_length=32, **options)
    pieces = next(each["tokens"] for each in candidates if len(each["tokens"]) > 1)
    room = 30 - len(pieces) + 1
    begin = mask - (room - 1) // 2
    opened = [ids[0], *ids[begin:mask], *[plain.mask_id] * len(pieces), *ids[mask + 1 : begin + room], ids[-1]]
    assert len(opened) == 32
    expected = plain.chain(opened, list(range(mask - begin + 1, mask - begin + 1 + len(pieces))), pieces)
    assert max(each["log_prob"] for each in candidates if each["tokens"] == pieces) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(TextTooLongError, match=r"a text with its longest target has 6\d tokens, and at most 64"):
        fill(backend, "[MASK] " + "a " * (61 - len(pieces) + 2), **options)


def test_targets_that_cannot_be_scored_whole_are_refused(capsys, checkpoint):
    model, options = checkpoint("bert"), ("--whole-targets", "--targets")
    assert "name targets too" in refusal(capsys, "fill", model, "a [MASK]", options[0])
    for target in ("the [MASK]", "the 😀", "[MASK]", "the [SEP] of"):
        assert "cannot be scored whole" in refusal(capsys, "fill", model, "a [MASK]", *options, target)
    assert "the target '' has no token" in refusal(capsys, "fill", model, "a [MASK]", *options, "")
    assert "a target has" in refusal(capsys, "fill", model, "a [MASK]", *options, "the " * 63)
    with pytest.raises(TargetError):
        fill(load(str(model)), "a [MASK]", targets=["😀"], whole_targets=True)
    one = fill(load(str(model)), "a [MASK]", targets="the")  # not its letters
    assert [candidate["token_str"] for candidate in one[0]] == ["the"]


# ---------------------------------------------------------------- joint fillings


@pytest.mark.parametrize(("kind", "backend"), BACKENDS)
def test_joint_fillings_are_scored_by_the_chain_rule(kind, backend, model, plain):
    plain, backend = plain(kind), model(kind, backend)
    text, ids, masks = masked(plain, "The {} of the {} is {}.")
    [fillings] = fill(backend, text, joint=True, top_k=4)
    assert len({tuple(each["tokens"]) for each in fillings}) == 4
    assert [each["log_prob"] for each in fillings] == sorted([each["log_prob"] for each in fillings], reverse=True)
    for each in fillings:
        expected = plain.chain(ids, masks, each["tokens"])
        assert each["log_prob"] == pytest.approx(expected, abs=1e-4)
        assert each["score"] == pytest.approx(math.exp(each["log_prob"]), rel=1e-6)
        assert each["token_strs"] == [plain.tokenizer.decode([id]) for id in each["tokens"]]
        filled = list(ids)
        for mask, id in zip(masks, each["tokens"], strict=True):
            filled[mask] = id
        assert each["sequence"] == plain.tokenizer.decode(filled, skip_special_tokens=True)
    beam = [(0.0, [])]
    for number in range(3):
        options = []
        for total, tokens in beam:
            row = list(ids)
            for mask, id in zip(masks, tokens, strict=False):
                row[mask] = id
            scores = total + plain.log_prob(row, masks[number])
            options += [(scores[id], [*tokens, int(id)]) for id in np.argsort(-scores)[:20]]
        beam = sorted(options, reverse=True)[:10]
    assert [tokens for _, tokens in beam[:4]] == [each["tokens"] for each in fillings]


@pytest.mark.parametrize("kind", KINDS)
def test_one_mask_is_filled_jointly_as_always(kind, model, plain):
    text = f"The {plain(kind).mask} is open"
    [alone], [fillings] = fill(model(kind, "onnx"), text), fill(model(kind, "onnx"), text, joint=True)
    for one, other in zip(alone, fillings, strict=True):
        assert [one["token"]] == other["tokens"] and [one["token_str"]] == other["token_strs"]
        assert (one["score"], one["sequence"]) == (other["score"], other["sequence"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a vocabulary of 10, so that a beam of 10 holds every filling of a first mask."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    rust = Tokenizer(models.WordLevel({word: id for id, word in enumerate([*special, *"abcde"])}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{token[1:-1].lower()}_token": token for token in special}
    folder = tmp_path_factory.mktemp("tiny")
    PreTrainedTokenizerFast(tokenizer_object=rust, **names).save_pretrained(folder)
    torch.manual_seed(1)
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    network = BertForMaskedLM(BertConfig(vocab_size=10, max_position_embeddings=16, **sizes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", ["a {} b {}", "{} {}", "{} e d c {} a"])
def test_a_beam_that_holds_everything_finds_the_best_of_all_fillings(text, tiny):
    plain = Plain(tiny)
    text, ids, masks = masked(plain, text)
    joint = {pair: plain.chain(ids, masks, list(pair)) for pair in product(range(10), repeat=2)}
    assert sum(map(math.exp, joint.values())) == pytest.approx(1)
    [fillings] = fill(load(str(tiny)), text, joint=True, top_k=10)
    best = sorted(joint, key=lambda pair: -joint[pair])[:10]
    assert [tuple(each["tokens"]) for each in fillings] == best
    assert [each["log_prob"] for each in fillings] == pytest.approx([joint[pair] for pair in best], abs=1e-5)


def test_texts_of_all_forms_are_answered_together_as_alone(artifact):
    """One beam is at its third mask when others are at their first, and rows of several texts share batches."""
    backend = load(str(artifact("bert")))
    texts = [
        text.replace("{}", "[MASK]") for text in ("{}", "The {} of {} {}", "a {} b", "{} {}", LONG[:90] + "{}{}{}{}")
    ]
    forms: list[dict[str, Any]] = [
        {"joint": True},
        {"targets": TARGETS, "whole_targets": True},
        {"targets": TARGETS[:2]},
        {},
    ]
    for options in forms:
        together = list(answer_all(backend, ask_all(backend.tokenizer, backend.info, texts, **options)))
        for text, answer in zip(texts, together, strict=True):
            for one, other in zip(answer, fill(backend, text, **options), strict=True):
                assert [each["sequence"] for each in one] == [each["sequence"] for each in other]
                np.testing.assert_allclose([each["score"] for each in one], [e["score"] for e in other], rtol=1e-4)


@pytest.mark.parametrize("property", [{"precision": DYNAMIC_INT8}, {"sees_padding": True}])
def test_rows_run_alone_where_others_would_change_their_scores(property, checkpoint, monkeypatch):
    backend, rows = load(str(checkpoint("bert"))), []
    score = backend.score
    monkeypatch.setattr(backend, "info", replace(backend.info, **property))
    monkeypatch.setattr(backend, "score", lambda batch: rows.append(len(batch.input_ids)) or score(batch))
    fill(backend, "The [MASK] of [MASK]", joint=True)
    fill(backend, "The [MASK] of [MASK]", targets=TARGETS, whole_targets=True)
    assert len(rows) > 11 and set(rows) == {1}


def test_the_command_prints_fillings(capsys, checkpoint):
    model, text = checkpoint("bert"), "The [MASK] is [MASK]."
    [fillings] = fill(load(str(model)), text, joint=True, top_k=2)
    assert run_json(capsys, "fill", model, text, "--joint", "--top-k", 2) == {"text": text, "fillings": fillings}
    _, out, _ = run(capsys, "fill", model, text, "--joint", "--top-k", 2)
    assert [" | ".join(each["token_strs"]) in line for each, line in zip(fillings, out.splitlines(), strict=True)] == [
        True
    ] * 2
    _, out, _ = run(capsys, "fill", model, "a [MASK]", "--whole-targets", "--targets", "the statement")
    assert "the statement     a the statement" in out
    error = refusal(capsys, "fill", model, text, "--joint", "--targets", "the")
    assert "joint fillings rank the whole vocabulary: leave out either joint or the targets" in error
