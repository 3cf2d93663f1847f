"""Evaluations over the course of a run: checkpoints kept at word counts, as BabyLM asks for them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from training import log_lines, write_config

from mlmkit.train.checkpoints import read_state, saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.loop import train

MARKS = (800, 1500)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    path = tmp_path_factory.mktemp("sets") / "held.txt"
    path.write_text("".join(text_file.read_text(encoding="utf-8").splitlines(keepends=True)[::30]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, text: Path, checkpoint: Callable[[str], Path]
) -> Config:
    """12 steps from trained weights, of which the first after 800 and 1,500 words are kept, and the last."""
    kept = ("train.keep_checkpoints=1", "train.save_every=12", f"train.keep_at_words={list(MARKS)}")
    start = (f"model.init_from={checkpoint('bert')}", f"data.held_out={text}")
    return write_config(tmp_path_factory.mktemp("config"), text_file, "", *start, *kept)


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config, folder)
    return folder


# ------------------------------------------------------------------ which checkpoints a run keeps


def test_a_checkpoint_is_kept_at_the_first_step_after_each_number_of_words(finished):
    saved = saved_checkpoints(finished)
    cursors = [read_state(folder).position.cursor for folder in saved]
    assert [read_state(folder).is_kept for folder in saved] == [True, True, False]
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
