"""Documents held out by their keys, and held-out documents that a model was trained on."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import paragraphs, run, run_json
from hypothesis import given
from hypothesis import strategies as st
from training import small_architecture, write_config

from mlmkit.documents import is_selected, read_documents
from mlmkit.errors import UserError
from mlmkit.locations import Source
from mlmkit.masking import document_key
from mlmkit.overlap import find_overlap, shared_documents
from mlmkit.pretrained import load_tokenizer
from mlmkit.token_cache import load_corpus
from mlmkit.train.checkpoints import branch_config
from mlmkit.train.config import Config
from mlmkit.train.config_file import load_config
from mlmkit.train.loop import train
from mlmkit.train.tokenizer import BYTES_PER_TOKEN, sample_documents

KEYS = st.integers(0, 2**64 - 1)
SHARE = 0.1


def make(folder: Path, text: Path, *overrides: str) -> Config:
    """A short run."""
    return write_config(folder, text, small_architecture(folder), "train.steps=2", "train.save_every=1", *overrides)


@given(KEYS, st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_share_and_the_rest_have_every_key_once(key, share):
    assert is_selected(key, (0.0, share)) != is_selected(key, (share, 1.0))
    assert is_selected(key, (0.0, 1.0))


@given(st.lists(st.integers(0, 40), min_size=1), st.lists(st.lists(st.integers(0, 60))))
def test_documents_are_shared_if_their_key_occurs_in_a_block(keys, blocks):
    arrays = (np.array(block, np.uint64) for block in blocks)
    shared = shared_documents(np.array(keys, np.uint64), arrays)
    assert shared.tolist() == [any(key in block for block in blocks) for key in keys]


# ---------------------------------------------------------------- a share of the training documents


def test_documents_are_held_out_by_their_key_in_whatever_files(tmp_path, text_file):
    documents = [*paragraphs(), *paragraphs()[:40]]  # some twice
    held = sorted(text for text in documents if document_key(text) < SHARE * 2**64)
    assert 0 < len(held) < len(documents) / 4
    random.Random(1).shuffle(documents)
    for name, begin in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{text}\n" for text in documents[begin::2]), encoding="utf-8")
    config = make(tmp_path, text_file, f"data.train={[f'{tmp_path}/{name}.txt' for name in 'ba']}", "data.held_out=0.1")
    (source,) = config.held_out_sources.values()
    assert sorted(read_documents(source)) == held
    trained = [text for each in config.data.sources for text in read_documents(each)]
    assert sorted([*trained, *held]) == sorted(documents)


@pytest.fixture(scope="module")
def by_share(tmp_path_factory, text_file) -> tuple[Config, Path]:
    """A run with a share of its documents held out, at a tokenizer that has seen a sample."""
    folder = tmp_path_factory.mktemp("share")
    config = make(folder, text_file, f"data.held_out={SHARE}", "tokenizer.train_tokens=6k", "tokenizer.vocab_size=400")
    train(config, folder / "run")
    return config, folder / "run"


def test_a_share_is_evaluated_and_is_not_in_the_training_text(by_share, text_file, capsys):
    config, folder = by_share
    expected = [text for text in paragraphs() if document_key(text) < SHARE * 2**64]
    result = json.loads((folder / "checkpoints" / "step-00000002" / "held-out" / "result.json").read_text())
    assert result["corpus"]["documents"] == len(expected)
    assert result["corpus"]["overlap"] == {"documents": 0, "share": 0.0, "texts": {}}
    assert result["corpus"]["source"]["locations"] == [str(text_file)]
    summary = run_json(capsys, "train", folder.parent / "config.toml", "--output", folder, *settings(config))
    assert summary["next"][0].startswith(f"mlmkit eval {folder / 'model'} --set TEXT")
    # As a file of their own the documents have the same masks.
    own = folder.parent / "own.txt"
    own.write_text("".join(f"{text}\n" for text in expected), encoding="utf-8")
    again = run_json(capsys, "eval", folder, "--set", own)
    assert again["mask_digest"] == result["mask_digest"]
    assert again["metrics"]["masked_cross_entropy"] == result["metrics"]["masked_cross_entropy"]


def settings(config: Config) -> list[str]:
    """The overrides of `by_share`."""
    values = ("train.steps=2", "train.save_every=1", f"data.held_out={SHARE}", "tokenizer.vocab_size=400")
    return [word for value in (*values, "tokenizer.train_tokens=6k") for word in ("--set", value)]


def test_another_share_is_another_training_text(by_share, tmp_path):
    config, folder = by_share
    copied = Path(shutil.copytree(folder, tmp_path / "run"))
    assert train(config, copied) == copied / "model"
    with pytest.raises(UserError, match=r"begun with another text in data\.train"):
        train(replace(config, data=replace(config.data, held_out=SHARE / 2)), copied)


@pytest.mark.parametrize(
    ("share", "message"), [("0.0001", r"0\.0001 takes none of its documents"), ("0.45", r"0\.45 takes all documents")]
)
def test_a_share_of_nothing_and_of_everything_is_refused(tmp_path, text_file, share, message):
    texts = [text for text in paragraphs() if 0.0001 < document_key(text) / 2**64 < 0.45][:3]
    (tmp_path / "text.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    config = make(tmp_path, tmp_path / "text.txt", f"data.held_out={share}", f"tokenizer.path={tmp_path}")
    tokenizer = make(tmp_path, text_file)
    train(tokenizer, tmp_path / "other")
    config = replace(config, tokenizer=replace(config.tokenizer, path=str(tmp_path / "other" / "tokenizer")))
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- a sample for the tokenizer


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1), st.integers(8, 60), st.randoms())
def test_a_sample_does_not_depend_on_the_order_and_has_the_highest_keys(texts, tokens, shuffled):
    other = [*texts]
    shuffled.shuffle(other)
    samples = []
    for given_texts in (texts, other):
        try:
            samples.append(sorted(sample_documents(given_texts, tokens)))
        except UserError:
            samples.append([])
    first, second = samples
    assert first == second
    left_out = [text for text in texts if text not in first]
    assert sum(len(text.encode()) for text in first) <= tokens * BYTES_PER_TOKEN
    if left_out:
        nearest = max(map(document_key, left_out))
        assert all(document_key(text) > nearest for text in first)
        group = [text for text in texts if document_key(text) >= nearest]
        assert sum(len(text.encode()) for text in group) > tokens * BYTES_PER_TOKEN
    else:
        assert sorted(texts) == first


def test_a_tokenizer_is_trained_on_a_sample_without_what_is_held_out(by_share, tmp_path, text_file, caplog):
    config, folder = by_share
    assert config.tokenizer.train_tokens == 6000
    sample = sample_documents(read_documents(config.data.sources[0]), 6000)
    assert 0 < len(sample) < len(paragraphs())
    assert all(document_key(text) >= SHARE * 2**64 for text in sample)
    # The sample alone gives the same tokenizer.
    (tmp_path / "sample.txt").write_text("".join(f"{text}\n" for text in sorted(sample)), encoding="utf-8")
    caplog.set_level("INFO", logger="mlmkit")
    alone = make(tmp_path, tmp_path / "sample.txt", "tokenizer.train_tokens=1M", "tokenizer.vocab_size=400")
    train(alone, tmp_path / "run")
    assert f"trained on all {len(sample)} documents, about" in caplog.text
    assert "tokens per word" in caplog.text and "bytes per token" in caplog.text
    one, other = ((each / "tokenizer" / "tokenizer.json").read_bytes() for each in (folder, tmp_path / "run"))
    assert one == other


def test_a_sample_needs_a_document(tmp_path, text_file):
    with pytest.raises(UserError, match=r"tokenizer\.train_tokens \(1\) is smaller than one document"):
        train(make(tmp_path, text_file, "tokenizer.train_tokens=1"), tmp_path / "run")


# ---------------------------------------------------------------- held-out documents that are trained on


@pytest.fixture
def leaking(tmp_path, text_file) -> Config:
    """A run whose held-out text has three documents of the training text, one of them twice."""
    lines = paragraphs()
    own = [f"{text} Held out." for text in lines[:16]]
    held = [*own, *lines[20:23], lines[20]]
    (tmp_path / "held.txt").write_text("".join(f"{text}\n" for text in held), encoding="utf-8")
    return make(tmp_path, text_file, f"data.held_out={tmp_path / 'held.txt'}")


def test_an_overlap_is_reported_once_and_with_each_evaluation(
    leaking, tmp_path, text_file, capsys, caplog, monkeypatch
):
    monkeypatch.setenv("MLMKIT_CACHE", str(tmp_path / "cache"))
    folder, name = tmp_path / "run", str(text_file)
    train(leaking, folder)
    expected = {"documents": 4, "share": 0.2, "texts": {name: 4}}
    said = f"4 documents (20.00%) are also in the training text (4 in {name})"
    assert [record.levelname for record in caplog.records if said in record.message] == ["WARNING"]
    for checkpoint in (folder / "checkpoints").iterdir():
        assert json.loads((checkpoint / "held-out" / "result.json").read_text())["corpus"]["overlap"] == expected
    caplog.clear()
    train(leaking, folder)
    assert said not in caplog.text

    output = tmp_path / "result"
    assert run(capsys, "eval", folder, "--set", tmp_path / "held.txt", "--output", output)[0] == 0
    assert said in (output / "report.html").read_text(encoding="utf-8")
    for model in (folder, folder / "model", folder / "checkpoints" / "step-00000001"):
        assert run_json(capsys, "eval", model, "--set", tmp_path / "held.txt")["corpus"]["overlap"] == expected
        code, out, _ = run(capsys, "eval", model, "--set", text_file)
        documents = len(paragraphs())
        assert code == 0 and f"\n{documents} documents (100.00%) are also in the training text" in out
    (tmp_path / "other.txt").write_text("A new text, which nobody has seen before.\n" * 9, encoding="utf-8")
    code, out, _ = run(capsys, "eval", folder, "--set", tmp_path / "other.txt")
    assert code == 0 and "also in the training text" not in out

    apart = Path(shutil.copytree(folder / "model", tmp_path / "apart" / "from" / "it" / "model"))
    assert run_json(capsys, "eval", apart, "--set", tmp_path / "held.txt")["corpus"]["overlap"] is None
    shutil.rmtree(tmp_path / "cache")
    assert run_json(capsys, "eval", folder, "--set", tmp_path / "held.txt")["corpus"]["overlap"] == expected
    assert run_json(capsys, "eval", folder, "--set", tmp_path / "other.txt")["corpus"]["overlap"] is None


def test_a_branch_has_been_trained_on_the_texts_of_its_parent(leaking, tmp_path, caplog):
    train(leaking, tmp_path / "run")
    (tmp_path / "new.txt").write_text("".join(f"{text} And more.\n" for text in paragraphs()), encoding="utf-8")
    (tmp_path / "branch.toml").write_text(f'data.train = "{tmp_path / "new.txt"}"\ntrain.steps = 1\n', encoding="utf-8")
    start = tmp_path / "run" / "checkpoints" / "step-00000002"
    caplog.clear()
    branch = load_config(tmp_path / "branch.toml", base=branch_config(tmp_path / "branch", start))
    train(branch, tmp_path / "branch", start)
    assert "4 documents (20.00%) are also in the training text" in caplog.text
    assert len(json.loads((tmp_path / "branch" / "texts.json").read_text())["tokens"]) == 2


def test_a_damaged_record_of_the_texts_is_ignored(leaking, tmp_path, caplog):
    train(leaking, tmp_path / "run")
    held = load_corpus(Source(tmp_path / "held.txt"), load_tokenizer(str(tmp_path / "run" / "tokenizer")))
    assert find_overlap(tmp_path / "run" / "model", held)
    path = tmp_path / "run" / "texts.json"
    path.write_text(path.read_text().replace("0.2", "0.1"))
    caplog.clear()
    assert find_overlap(tmp_path / "run" / "model", held) is None
    assert "texts.json is damaged" in caplog.text
    train(leaking, tmp_path / "run")
    assert find_overlap(tmp_path / "run" / "model", held)
