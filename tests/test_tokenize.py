"""`mlmkit tokenize`: shards that do not depend on who makes them, or how often that is interrupted."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import paragraphs, refusal, run, run_json
from interruptions import killed
from training import same_weights, write_config

from mlmkit import shards
from mlmkit.corpus import tokenize
from mlmkit.files import hash_tree
from mlmkit.locations import Source
from mlmkit.masking import document_key
from mlmkit.shards import finish, make_shards, plan_corpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.loop import train
from mlmkit.train.tokens import tokenize_texts


@pytest.fixture
def small_splits(monkeypatch) -> None:
    """Splits of about 2,000 bytes, which a plan has made before other processes read it."""
    monkeypatch.setattr("mlmkit.shards.SMALLEST_SPLIT", 2000)
    monkeypatch.setattr("mlmkit.shards.LARGEST_SPLIT", 2000)


@pytest.fixture
def configuration(tmp_path, tokenizer_folder, small_splits) -> list[Any]:
    """The arguments of `mlmkit tokenize` but for the output: two texts and a held-out one, of many splits."""
    texts = paragraphs()
    for name, lines in (("a", texts[:150]), ("b", texts[150:200]), ("held", texts[200:230])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    settings = [f"data.train=['{tmp_path}/a.txt', '{tmp_path}/b.txt']", f"data.held_out={tmp_path}/held.txt"]
    settings.append(f"tokenizer.path={tokenizer_folder('wordpiece')}")
    write_config(tmp_path, tmp_path / "a.txt", "bert-tiny", *settings)
    return ["tokenize", tmp_path / "config.toml", *(part for each in settings for part in ("--set", each))]


def test_the_number_of_workers_changes_no_byte(capsys, configuration, tmp_path):
    outputs = [tmp_path / str(workers) for workers in (1, 3)]
    for workers, output in zip((1, 3), outputs, strict=True):
        report = run_json(capsys, *configuration, "--output", output, "--workers", workers)
        assert {name: values["documents"] for name, values in report.items()} == {
            "train-1": 150,
            "train-2": 50,
            "held-out": 30,
        }
    first, second = (hash_tree(output) for output in outputs)
    assert first == second
    assert len([name for name in first if name.startswith("train-1/") and name.endswith("ids.npy")]) > 5
    # Words only where they are needed: of held-out text, for evaluation.
    assert {name.split("/")[0] for name in first if name.endswith("words.npy")} == {"held-out"}
    record = json.loads((outputs[0] / "train-1" / "tokens.json").read_text())
    expected = tokenize(paragraphs()[:150], Tokenizer.from_folder(outputs[0] / "tokenizer"))
    assert (record["fingerprint"], record["tokens"]) == (expected.fingerprint, expected.tokens)
    ids = [np.load(outputs[0] / "train-1" / "shards" / shard["name"] / "ids.npy") for shard in record["shards"]]
    assert np.concatenate(ids).tolist() == expected.ids.tolist()
    code, out, _ = run(capsys, *configuration, "--output", outputs[0])  # finished: nothing to do
    assert code == 0 and f'data.train = ["{outputs[0]}/train-1", "{outputs[0]}/train-2"]' in out
    assert hash_tree(outputs[0]) == first


def _serially(folders: list[Path]) -> None:
    tokenizer = Tokenizer.from_folder(folders[0].parent / "tokenizer")
    for folder in folders:
        for index in range(len(json.loads((folder / "plan.json").read_text())["splits"])):
            make_shards(folder, index, tokenizer)


def _tokenize(config: Any, output: Path) -> None:
    shards.SMALLEST_SPLIT = shards.LARGEST_SPLIT = 2000  # in the process that is killed too
    tokenize_texts(config, output, workers=1, run=_serially)


def test_a_killed_command_resumes_to_the_same_bytes(configuration, tmp_path, tokenizer_folder):
    from mlmkit.train.config_file import load_config

    config = load_config(configuration[1], list(configuration[3::2]))
    _tokenize(config, tmp_path / "whole")
    expected, ended = hash_tree(tmp_path / "whole"), False
    for point in (3, 30, 60, 90, 130, 170, 230, 300, 400, 10_000):
        output = tmp_path / f"killed-{point}"
        ended = not killed(point, _tokenize, config, output)
        if ended:
            break
        _tokenize(config, output)
        assert hash_tree(output) == expected, point
        assert not list(output.rglob(".*"))
        shutil.rmtree(output)
    assert ended


def test_small_files_share_a_shard(tmp_path, tokenizer_folder):
    tokenizer, texts = Tokenizer.from_folder(tokenizer_folder("wordpiece")), paragraphs()[:60]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(text)
    source = Source(str(tmp_path / "texts"))
    assert len(plan_corpus(source, tokenizer, tmp_path / "one", words=True).splits) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlmkit.shards.SMALLEST_SPLIT", 2000)
        groups = plan_corpus(source, tokenizer, tmp_path / "several", words=True).splits
    sizes = [[(tmp_path / "texts" / split.file).stat().st_size for split in group] for group in groups]
    assert [split.file for group in groups for split in group] == [f"{tmp_path}/texts/{n:02d}.txt" for n in range(60)]
    assert all(len(group) == 1 or sum(group) <= 2000 for group in sizes) and len(groups) < 40
    for index in range(len(groups)):
        make_shards(tmp_path / "several", index, tokenizer)
    assert finish(tmp_path / "several").fingerprint == tokenize(texts, tokenizer).fingerprint


@pytest.mark.parametrize("strip", [False, True])
def test_a_long_split_resumes_shard_by_shard(monkeypatch, tmp_path, tokenizer_folder, strip):
    """Blank texts, documents that are left out and a document of many stretches lie between the shards."""
    monkeypatch.setattr("mlmkit.shards.SHARD_TOKENS", 500)
    monkeypatch.setattr("mlmkit.corpus.CHARACTERS_PER_BATCH", 400)
    monkeypatch.setattr("mlmkit.corpus.DOCUMENTS_PER_BLOCK", 7)
    tokenizer = Tokenizer.from_folder(tokenizer_folder("wordpiece"))
    texts = [*paragraphs()[:20], " ", " ".join(paragraphs()[20:40]), "", *paragraphs()[40:80]]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    source = Source(str(tmp_path / "a.txt"), keys=(0.25, 1.0), strip=strip)
    for name in ("whole", "killed"):
        plan_corpus(source, tokenizer, tmp_path / name, words=True)
    make_shards(tmp_path / "whole", 0, tokenizer)
    names = sorted(path.name for path in (tmp_path / "whole" / "shards").iterdir())
    assert len(names) > 3
    while not (tmp_path / "killed" / "shards" / names[-1]).exists():
        with monkeypatch.context() as patch:
            number = len(list((tmp_path / "killed" / "shards").iterdir()))
            patch.setattr(
                "mlmkit.shards._name", lambda index, shard, most=number: names[shard] if shard <= most else 1 / 0
            )
            with suppress(ZeroDivisionError):
                make_shards(tmp_path / "killed", 0, tokenizer)
        assert sorted(path.name for path in (tmp_path / "killed" / "shards").iterdir()) == names[: number + 1]
    one, other = finish(tmp_path / "whole"), finish(tmp_path / "killed")
    assert hash_tree(tmp_path / "whole") == hash_tree(tmp_path / "killed")
    kept = [text.strip() if strip else text for text in texts if text.strip()]
    kept = [text for text in kept if document_key(text) >= 1 << 62]
    expected = tokenize(kept, tokenizer)
    assert (one.fingerprint, one.empty_texts, other.tokens) == (expected.fingerprint, 2, expected.tokens)
    assert one.part(0, len(one)).words.tolist() == expected.words.tolist()
    assert one.sizes == expected.sizes


def test_tokens_stand_for_the_text(capsys, configuration, tmp_path, text_file):
    """A training on tokens gives the same weights and held-out results, and an evaluation the same result."""
    assert run(capsys, *configuration, "--output", tmp_path / "tokens", "--workers", 2)[0] == 0
    tokens = tmp_path / "tokens"
    text = [f"data.train=['{tmp_path}/a.txt', '{tmp_path}/b.txt']", f"data.held_out={tmp_path}/held.txt"]
    folders = [f"data.train=['{tokens}/train-1', '{tokens}/train-2']", f"data.held_out={tokens}/held-out"]
    for name, settings in (("text", text), ("tokens-run", folders)):
        settings = [*settings, f"tokenizer.path={tokens}/tokenizer", "train.steps=4"]
        train(write_config(tmp_path, text_file, "bert-tiny", *settings), tmp_path / name)
    assert same_weights(tmp_path / "text" / "model", tmp_path / "tokens-run" / "model")
    evaluate = ["eval", tmp_path / "text", "--mask-seed", 1, "--output"]
    one = run_json(capsys, *evaluate, tmp_path / "of-text", "--set", tmp_path / "held.txt")
    other = run_json(capsys, *evaluate, tmp_path / "of-tokens", "--set", tokens / "held-out")
    assert one["metrics"] == other["metrics"]


def test_what_does_not_fit_is_refused_in_one_line(capsys, configuration, tmp_path, tokenizer_folder):
    tokens = tmp_path / "tokens"
    assert run(capsys, *configuration, "--output", tokens, "--workers", 1)[0] == 0
    line = refusal(capsys, *configuration, "--set", "tokenizer.lowercase=true", "--output", tokens)
    assert "tokenizer.lowercase has no effect" in line
    line = refusal(capsys, *configuration, "--set", "data.blank_line=true", "--output", tokens)
    assert f"{tokens} was begun with other texts" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    assert "holds something other than tokens" in refusal(capsys, *configuration, "--output", tmp_path / "other")

    settings = ["model.architecture=bert-tiny", f"data.train={tokens}/train-1"]
    command = ["train", configuration[1], "--output", tmp_path / "run"]

    def refused(*extra: str) -> str:
        return refusal(capsys, *command, *(part for each in [*settings, *extra] for part in ("--set", each)))

    assert "data.on_bad_row has no effect, as all texts are tokenised" in refused("data.on_bad_row=skip")
    own, other = f"tokenizer.path={tokens}/tokenizer", f"tokenizer.path={tokenizer_folder('bpe')}"
    assert "was tokenised with another tokenizer" in refused(other)
    assert "does not say where words begin" in refused(own, "masking.whole_word=true")
    (tokens / "train-1" / "tokens.json").unlink()
    assert "is incomplete: run the same mlmkit tokenize command again" in refused(own)
    (shard,) = list((tokens / "train-2" / "shards").iterdir())[:1]
    (shard / "ids.npy").write_bytes((shard / "ids.npy").read_bytes()[:-1] + b"x")
    settings[1] = f"data.train={tokens}/train-2"
    assert "ids.npy is damaged" in refused(own)
