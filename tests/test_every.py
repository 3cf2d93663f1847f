"""Evaluations over the course of a run: checkpoints kept at word counts, and `eval RUN --every`."""

import csv
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import refusal, run, run_json
from interruptions import run_two_ranks
from numpy.typing import NDArray
from training import log_lines, write_config

from mlmkit.backends import Backend, load
from mlmkit.eval import babylm
from mlmkit.eval.acquisition import age_of_acquisition, fit_sigmoid
from mlmkit.train import evaluations
from mlmkit.train.checkpoints import read_state, saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.loop import train

MARKS = (800, 1200, 1600)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    path = tmp_path_factory.mktemp("sets") / "held.txt"
    path.write_text("".join(text_file.read_text(encoding="utf-8").splitlines(keepends=True)[::30]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(text: Path) -> Path:
    """The declaration of a few pairs."""
    rows = [{"sentence_good": f"The value is {word}.", "sentence_bad": f"Is the {word} value."} for word in "abcd"]
    (text.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = text.parent / "order.toml"
    path.write_text('name = "order"\ntask = "pairs"\nlocal = "pairs.jsonl"\n')
    return path


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, text: Path, checkpoint: Callable[[str], Path]
) -> Config:
    """12 steps from trained weights, of which the first after 800, 1,200 and 1,600 words are kept, and the last."""
    kept = ("train.keep_checkpoints=1", "train.save_every=12", f"train.keep_at_words={list(MARKS)}")
    start = (f"model.init_from={checkpoint('bert')}", f"data.held_out={text}")
    return write_config(tmp_path_factory.mktemp("config"), text_file, "", *start, *kept)


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config, folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ------------------------------------------------------------------ which checkpoints a run keeps


def test_a_checkpoint_is_kept_at_the_first_step_after_each_number_of_words(finished):
    saved = saved_checkpoints(finished)
    cursors = [read_state(folder).position.cursor for folder in saved]
    assert [read_state(folder).is_kept for folder in saved] == [True, True, True, False]
    for mark, cursor in zip(MARKS, cursors, strict=False):
        assert mark <= cursor.words < mark * (1 + 1.2 / cursor.step)
    logged = {entry["step"]: entry for entry in log_lines(finished) if "words_seen" in entry}
    assert (cursors[-1].step, cursors[-1].words) == (12, logged[12]["words_seen"])
    tokens = sum(entry["tokens"] for entry in logged.values())
    assert cursors[-1].tokens == cursors[-1].phase_tokens == tokens == logged[12]["tokens_seen"]


def test_an_epoch_shows_all_words_of_its_texts(config, text_file, tmp_path, caplog):
    """The number is rounded, so a checkpoint at the words of the text is that at its end."""
    words = len(text_file.read_text(encoding="utf-8").split())
    run = replace(config.train, steps=None, epochs=1.0, keep_at_words=(words,))
    train(replace(config, train=run), tmp_path / "run")
    state = read_state(saved_checkpoints(tmp_path / "run")[-1])
    assert state.position.cursor.words == pytest.approx(words)
    assert state.is_kept
    assert not [message for message in caplog.messages if "keep_at_words" in message]


def test_counts_go_on_in_the_next_phase_and_in_a_branch(config, finished, tmp_path):
    start = saved_checkpoints(finished)[0]
    before = read_state(start).position.cursor
    branch = tmp_path / "branch"
    train(replace(config, train=replace(config.train, steps=2, keep_at_words=())), branch, start)
    after = read_state(saved_checkpoints(branch)[-1]).position.cursor
    assert (after.step, after.phase_steps) == (before.step + 2, 2)
    assert after.tokens == before.tokens + after.phase_tokens > after.phase_tokens
    assert after.words / after.tokens == pytest.approx(before.words / before.tokens)


def test_a_number_of_words_that_was_not_reached_is_named(config, tmp_path, caplog):
    run = replace(config.train, steps=2, keep_at_words=(100, 5000), save_every=2)
    train(replace(config, train=run), tmp_path / "run")
    [warning] = [message for message in caplog.messages if "keep_at_words" in message]
    assert warning.endswith("no checkpoint at train.keep_at_words [5000]")


# ------------------------------------------------------------------ eval --every


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call draws its figure only where it is looked at, as that takes half a second."""
    monkeypatch.setattr(evaluations, "can_draw", lambda path: False)


def every(capsys: pytest.CaptureFixture[str], run_folder: Path, *options: object) -> list[dict[str, Any]]:
    return run_json(capsys, "eval", run_folder, "--every", *options)["evaluations"]


def modified(run_folder: Path) -> dict[str, int]:
    paths = (run_folder / "evaluations").glob("*/step-*/result.json")
    return {str(path.relative_to(run_folder)): path.stat().st_mtime_ns for path in paths}


def test_each_checkpoint_has_the_numbers_that_eval_gives(capsys, folder, text, pairs, monkeypatch):
    monkeypatch.undo()  # with the figure
    rows = every(capsys, folder, "--set", text, "--set", pairs)
    names = ["initial", *(f"checkpoints/{path.name}" for path in saved_checkpoints(folder))]
    assert [(row["set"], row["checkpoint"]) for row in rows] == [
        (name, at) for name in ("held", "order") for at in names
    ]
    for row in rows:
        chosen = text if row["set"] == "held" else pairs
        alone = run_json(capsys, "eval", folder / row["checkpoint"], "--set", chosen)["metrics"]
        name = {"held": "masked_cross_entropy", "order": "pair_accuracy"}[row["set"]]
        assert row["metric"] == name
        assert {key: row[key] for key in ("value", "low", "high")} == alone[name]
    assert [row["tokens"] for row in rows[:1]] == [0]
    assert [row["words"] for row in rows] == sorted(row["words"] for row in rows[:5]) * 2
    last = read_state(saved_checkpoints(folder)[-1]).position.cursor
    assert (rows[4]["step"], rows[4]["tokens"], rows[4]["words"]) == (12, last.tokens, round(last.words))
    assert (folder / "evaluations" / "evaluations.png").read_bytes().startswith(b"\x89PNG")


def test_a_later_call_measures_new_checkpoints_only_and_forgets_no_old_one(capsys, folder, text):
    saved = saved_checkpoints(folder)
    later = saved[-1].rename(folder / "later")
    first = every(capsys, folder, "--set", text)
    before = modified(folder)
    assert [row["checkpoint"] for row in first] == ["initial", *(f"checkpoints/{path.name}" for path in saved[:-1])]
    later.rename(saved[-1])
    shutil.rmtree(saved[0])  # as training removes old ones
    second = every(capsys, folder, "--set", text)
    assert second[:-1] == first
    assert second[-1]["checkpoint"] == f"checkpoints/{saved[-1].name}"
    after = modified(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1
    assert every(capsys, folder, "--set", text) == second  # nothing appears twice
    assert modified(folder) == after


def test_an_interrupted_call_resumes(capsys, folder, text, monkeypatch):
    expected = every(capsys, folder, "--set", text, "--output", folder.parent / "straight")
    loads: list[str] = []

    def load_two(path: str, *options: Any) -> Backend:
        loads.append(path)
        if len(loads) > 2:
            raise KeyboardInterrupt
        return load(path, *options)

    monkeypatch.setattr(evaluations, "load", load_two)
    assert run(capsys, "eval", folder, "--every", "--set", text)[0] == 130
    before = modified(folder)
    assert len(before) == 2
    monkeypatch.undo()
    assert every(capsys, folder, "--set", text) == expected
    after = modified(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == 5


def test_a_run_in_training_says_how_many_checkpoints_there_are(capsys, folder, text, caplog):
    shutil.rmtree(folder / "model")
    caplog.set_level(logging.INFO, logger="mlmkit")
    code, out, _ = run(capsys, "eval", folder, "--every", "--set", text)
    assert code == 0
    assert f"{folder} is not finished: it has 5 checkpoints so far" in caplog.messages
    header, _rule, *rows, place = out.splitlines()
    assert header.split() == ["checkpoint", "tokens", "words", "held", "masked_cross_entropy"]
    assert [row.split()[0] for row in rows] == [
        "initial",
        *(f"checkpoints/{p.name}" for p in saved_checkpoints(folder)),
    ]
    assert place == f"results: {folder / 'evaluations'}"


def test_the_model_is_measured_if_no_checkpoint_is_left(capsys, folder, text):
    rows = every(capsys, folder, "--set", text, "--output", folder.parent / "before")
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "initial")
    assert every(capsys, folder, "--set", text) == [{**rows[-1], "checkpoint": "model"}]


def test_two_ranks_share_the_work(capsys, folder, text):
    expected = every(capsys, folder, "--set", text, "--output", folder.parent / "alone")
    printed = run_two_ranks(folder.parent / "log", ["eval", str(folder), "--every", "--set", str(text), "--json"])
    assert json.loads(printed)["evaluations"] == expected


def test_what_cannot_be_measured_is_refused_in_a_line(capsys, folder, text, tmp_path, checkpoint):
    measure = ("--every", "--set", text)
    for wrong in (checkpoint("bert"), tmp_path / "missing", tmp_path):
        assert "is not a training run: name the folder" in refusal(capsys, "eval", wrong, *measure)
    assert "no set or file 'blimq'" in refusal(capsys, "eval", folder, "--every", "--set", "blimq")
    assert "two sets have the same name" in refusal(capsys, "eval", folder, *measure, "--set", text)
    every(capsys, folder, "--set", text)
    message = refusal(capsys, "eval", folder, *measure, "--mask-seed", 1)
    assert "step-00000000 holds an evaluation with another" in message
    (folder / "evaluations" / "evaluations.json").write_text("{}")
    assert "evaluations.json is damaged" in refusal(capsys, "eval", folder, *measure)
    for name in ("initial", "checkpoints", "model"):
        shutil.rmtree(folder / name)
    assert "has no checkpoint yet" in refusal(capsys, "eval", folder, *measure)


# ------------------------------------------------------------------ ages of acquisition

BABYLM = np.log10([1e6 * n for n in (*range(1, 11), *range(20, 101, 10), *range(200, 1001, 100))])
CHANCE = np.log(16384)


def sigmoid(lower: float, height: float, middle: float, width: float) -> NDArray[np.float64]:
    return lower + height / (1 + np.exp((BABYLM - middle) / width))


@pytest.mark.parametrize(("middle", "width"), [(7.2, 0.3), (8.1, 0.1), (6.4, 0.5), (7.7, 0.02)])
def test_the_age_of_acquisition_is_where_the_curve_crosses_the_cutoff(middle, width):
    surprisal = sigmoid(2.5, 8.0, middle, width)
    cutoff = (CHANCE + surprisal.min()) / 2
    expected = middle + width * np.log(8.0 / (cutoff - 2.5) - 1)
    assert sigmoid(2.5, 8.0, middle, width)[expected > BABYLM].min() > cutoff
    # A step between two checkpoints may be anywhere between them.
    assert age_of_acquisition(BABYLM, surprisal, CHANCE) == pytest.approx(expected, abs=1e-3 if width > 0.05 else 0.05)
    noise = np.random.default_rng(0).normal(0, 0.2, (50, len(BABYLM)))
    ages = [age_of_acquisition(BABYLM, surprisal + each, CHANCE) for each in noise]
    assert np.median(ages) == pytest.approx(expected, abs=0.05)
    assert np.std(ages) < 0.1


def test_the_fit_has_no_larger_error_than_the_curve_that_made_the_data():
    generator = np.random.default_rng(1)
    for _ in range(20):
        made = sigmoid(
            generator.uniform(1, 4), generator.uniform(1, 9), generator.uniform(6, 9), generator.uniform(0.05, 1)
        )
        data = made + generator.normal(0, 0.1, len(made))
        fitted = sigmoid(*map(float, fit_sigmoid(BABYLM, data)))
        assert ((fitted - data) ** 2).sum() <= ((made - data) ** 2).sum() * 1.0001


def test_a_word_whose_curve_does_not_cross_the_cutoff_has_no_age():
    falling = sigmoid(2.0, 8.0, 7.5, 0.2)
    assert age_of_acquisition(BABYLM, falling, CHANCE) == pytest.approx(7.5, abs=0.05)
    never, always = sigmoid(10.0, 2.0, 7.5, 0.2), sigmoid(1.0, 1.0, 7.5, 0.2)
    for surprisal in (falling[::-1], never, always, np.full_like(falling, 9.0), np.full_like(falling, np.nan)):
        assert np.isnan(age_of_acquisition(BABYLM, surprisal, CHANCE))


def test_every_writes_the_ages_of_the_words_of_a_cloze_set(capsys, folder, tmp_path, caplog):
    targets = {"value": "value", "object": "object", 'a "quoted" one': "name"}
    rows = [
        {"before": before, "word": word, "group": group}
        for group, word in targets.items()
        for before in ("This is the", "It")
    ]
    (tmp_path / "cloze.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    declared, columns = tmp_path / "cloze.toml", 'prefix = "before"\ntarget = "word"\nparadigm = "group"\n'
    declared.write_text(f'name = "words"\ntask = "cloze"\nlocal = "cloze.jsonl"\n[cloze]\n{columns}')
    every(capsys, folder, "--set", declared)
    read = list(csv.DictReader((folder / "evaluations" / "words" / "acquisition.csv").open()))
    assert [row["paradigm"] for row in read] == sorted(targets)
    saved = saved_checkpoints(folder)
    x = np.log10([round(read_state(each).position.cursor.words) for each in saved])
    results = [run_json(capsys, "eval", each, "--set", declared) for each in saved]
    for row in read:
        values = [result["items"]["paradigms"][row["paradigm"]]["cloze_log_probability"]["value"] for result in results]
        age = age_of_acquisition(x, -np.array(values), np.log(results[0]["model"]["vocabulary_size"]))
        assert float(row["log10_words"] or "nan") == pytest.approx(age, nan_ok=True)
    caplog.set_level(logging.INFO, logger="mlmkit")
    shutil.rmtree(saved[0])
    every(capsys, folder, "--set", declared, "--output", tmp_path / "few")
    assert "words has no ages of acquisition: they need a paradigm and 4 checkpoints" in caplog.messages
    assert not (tmp_path / "few" / "words" / "acquisition.csv").exists()


def test_predictions_for_babylm_of_each_checkpoint(finished, capsys, tmp_path, monkeypatch):
    """Those of the first checkpoint after each million words, and all surprisals in one file."""
    monkeypatch.setattr(babylm, "MILLION", 400)
    (tmp_path / "words.jsonl").write_text(
        "".join(f'{{"c": "The", "w": "{word}"}}\n' for word in ("name", "name", "list"))
    )
    (tmp_path / "words.toml").write_text(
        'name = "words"\ntask = "cloze"\nlocal = "words.jsonl"\n[cloze]\nprefix = "c"\ntarget = "w"\nparadigm = "w"\n'
    )
    rows = [{"sentence_good": "The name is bound.", "sentence_bad": "The name are bound.", "UID": "p"}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "few.toml").write_text(
        'name = "few"\ntask = "pairs"\nlocal = "pairs.jsonl"\n[pairs]\nparadigm = "UID"\n'
    )
    suite = 'name = "s"\nsets = ["words.toml", "few.toml"]\n[babylm]\nwords = "AoA_word"\nfew = "blimp/blimp_fast"\n'
    (tmp_path / "s.toml").write_text(suite)
    arguments = ("--suite", tmp_path / "s.toml", "--output", tmp_path / "out", "--babylm-predictions", tmp_path / "b")
    found = run_json(capsys, "eval", finished, "--every", *arguments)["evaluations"]
    words = {row["words"]: row["step"] for row in found if row["set"] == "words" and row["words"] >= 400}
    names: dict[str, int] = {}
    for count in sorted(words):
        names.setdefault(f"chck_{count // 400}M", count)
    folder = tmp_path / "b" / finished.name
    assert {path.name for path in folder.iterdir()} == {"main", *names}
    for name in names:
        path = folder / name / "zero_shot" / "mlm" / "blimp" / "blimp_fast" / "predictions.json"
        assert json.loads(path.read_text())["p"]["predictions"][0]["id"] == "p_0"
    written = json.loads((folder / "main" / "zero_shot" / "mlm" / "AoA_word" / "surprisal.json").read_text())["results"]
    assert [(row["step"], row["word_count"]) for row in written[::3]] == list(names.items())
    assert [(row["target_word"], row["context_id"], row["context"]) for row in written[:3]] == [
        ("name", 0, "The"), ("name", 1, "The"), ("list", 0, "The")
    ]  # fmt: skip
    tokens = pq.read_table(tmp_path / "out" / "words" / f"step-{words[names['chck_2M']]:08d}" / "tokens.parquet")
    first = sum(row["log_prob"] for row in tokens.to_pylist() if row["document"] == 0)
    assert written[0]["step"] == "chck_2M" and written[0]["surprisal"] == pytest.approx(-first)
