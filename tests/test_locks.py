"""Two processes in one folder: only one may work. Kills at any file operation: the next command recovers."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import PROOF, paragraphs
from interruptions import at_operation, killed, names
from test_eval_resume import without_times
from training import same_weights, small_architecture, write_config

from mlmkit.artifact import read_manifest
from mlmkit.backends import load
from mlmkit.errors import UserError
from mlmkit.eval.api import evaluate
from mlmkit.export.export import export
from mlmkit.files import PARTIAL, locked, new_folder
from mlmkit.locations import Source
from mlmkit.train import loop
from mlmkit.train.log import draw_loss, read_log
from mlmkit.train.loop import train

KILLS = int(os.environ.get("MLMKIT_KILLS", "4"))  # per command; 200 take ten minutes


def points(operations: int, count: int = KILLS) -> list[int]:
    """Sample some of a command's file operations."""
    chosen = random.Random(0).sample(range(operations), min(count, operations))
    return sorted(chosen)


# ---------------------------------------------------------------- two processes


def put(path: Path, content: str, *, overwrite: bool) -> bool:
    """Write a folder as exports do; return whether it worked."""
    try:
        with new_folder(path, replaces="manifest" if overwrite else "") as folder:
            for name in ("weights", "manifest"):
                (folder / name).write_text(content)
    except UserError:
        return False
    return True


def operations(work: Callable[..., object], *arguments: Any, **options: Any) -> int:
    """Count the file operations of a call."""
    with at_operation(-1, lambda: None) as count:
        work(*arguments, **options)
    return count[0]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_of_two_that_write_one_folder_one_does(tmp_path, overwrite, before):
    """The second tries at every operation of the first. The folder is always from one of them that was allowed to."""
    for operation in range(operations(put, tmp_path / "counted", "first", overwrite=False)):
        path, second = tmp_path / str(operation) / "folder", []
        if before:
            put(path, "old", overwrite=False)
        with at_operation(operation, lambda: second.append(put(path, "second", overwrite=overwrite))):  # noqa: B023
            first = put(path, "first", overwrite=overwrite)
        assert (first or second == [True]) if overwrite else [first, *second].count(True) == (not before)
        expected = "first" if first else "second" if True in second else "old"
        assert {file.read_text() for file in path.iterdir()} == {expected}
        assert (names(path), names(path.parent)) == ({"weights", "manifest"}, {"folder"})


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_evaluations_into_one_folder(artifact, tmp_path, overwrite):
    """The tables always belong to the result, and a call that succeeds finds its own."""
    model, source = load(str(artifact("bert"))), tmp_path / "text.txt"
    source.write_text("\n".join(paragraphs()[:3]))

    def run(seed: int, folder: Path) -> bool:
        try:
            evaluate(model, source, mask_seed=seed, output=folder, overwrite=overwrite)
        except UserError as error:
            assert "another process" in str(error) or (not overwrite and "another masking" in str(error)), error
            return False
        return True

    for operation in points(operations(run, 1, tmp_path / "counted"), 12):
        folder, second = tmp_path / str(operation) / "result", []
        with at_operation(operation, lambda: second.append(run(2, folder))):  # noqa: B023
            first = run(1, folder)
        assert first or second == [True]
        result = json.loads((folder / "result.json").read_text())
        assert result["masking"]["seed"] in {seed for seed, done in ((1, first), (2, second == [True])) if done}
        assert set(pq.read_table(folder / "tokens.parquet")["mask_seed"].to_pylist()) == {result["masking"]["seed"]}
        assert names(folder.parent) == {"result"}
        evaluate(model, source, mask_seed=result["masking"]["seed"], output=folder)  # not damaged


def test_two_trainings_into_one_folder(text_file, tmp_path):
    """The weights were trained with the configuration in `run.json`."""
    settings = ("train.steps=2", "train.save_every=2")
    config = write_config(tmp_path, text_file, small_architecture(tmp_path), *settings)
    configs = {lr: replace(config, optim=replace(config.optim, lr=lr)) for lr in (1e-3, 2e-3)}
    for lr, each in configs.items():
        train(each, tmp_path / f"alone-{lr}")

    def run(lr: float, folder: Path) -> bool:
        try:
            train(configs[lr], folder)
        except UserError as error:
            assert "another process" in str(error) or "was begun with another optim.lr" in str(error), error
            return False
        return True

    for operation in points(operations(run, 1e-3, tmp_path / "counted"), 5):
        folder, second = tmp_path / str(operation), []
        with at_operation(operation, lambda: second.append(run(2e-3, folder))):  # noqa: B023
            first = run(1e-3, folder)
        lr = json.loads((folder / "run.json").read_text())["phases"][0]["optim"]["lr"]
        assert lr == (1e-3 if first else 2e-3)
        assert first != (second == [True])
        assert same_weights(folder / "model", tmp_path / f"alone-{lr}" / "model")


def test_a_lock_whose_file_was_removed_while_it_was_awaited_is_taken_anew(tmp_path):
    lock = tmp_path / ".folder.mlmkit-lock"
    with at_operation(2, lock.unlink), locked(tmp_path / "folder"):  # between opening and locking it
        assert lock.exists()
        with pytest.raises(UserError, match="another process is using"), locked(tmp_path / "folder"):
            pass
    assert names(tmp_path) == set()


# ---------------------------------------------------------------- kills


def left(folder: Path) -> set[str]:
    """List a folder without leftovers that are too young to be removed."""
    return {name for name in names(folder) if not name.endswith(PARTIAL)}


def test_a_folder_after_a_kill(tmp_path):
    put(tmp_path / "counted", "old", overwrite=False)
    for operation in points(operations(put, tmp_path / "counted", "new", overwrite=True), 2 * KILLS):
        path = tmp_path / str(operation) / "folder"
        put(path, "old", overwrite=False)
        assert killed(operation, put, path, "new", overwrite=True)
        assert not path.exists() or {file.read_text() for file in path.iterdir()} <= {"old", "new"}
        assert put(path, "newest", overwrite=True)
        assert {file.read_text() for file in path.iterdir()} == {"newest"}
        assert left(path.parent) == {"folder"}


def measure(model: Path, source: Path, folder: Path, seed: int) -> None:
    evaluate(model, Source(str(source)), mask_seed=seed, output=folder, overwrite=seed > 0)


def test_an_evaluation_after_a_kill(artifact, tmp_path):
    """When one overwrites another, the old or the new result is there, and running it again gives the new one."""
    source = tmp_path / "text.txt"
    source.write_text("\n".join(paragraphs()[:3]))
    command = artifact("bert"), source
    for seed in (0, 1):
        count = operations(measure, *command, tmp_path / "whole" / "result", seed)
    whole = without_times(tmp_path / "whole" / "result")
    for operation in points(count):
        folder = tmp_path / str(operation) / "result"
        measure(*command, folder, 0)
        if killed(operation, measure, *command, folder, 1):
            measure(*command, folder, 1)
        assert without_times(folder) == whole, operation
        assert (left(folder.parent), left(folder)) == ({"result"}, left(tmp_path / "whole" / "result")), operation


def test_a_training_after_a_kill(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "draw_loss", draw_loss)  # as in the process that is killed
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("".join(text_file.read_text().splitlines(keepends=True)[::20]))
    settings = ["train.steps=4", "train.save_every=2", "train.log_every=1", f"data.held_out={held_out}"]
    config = write_config(tmp_path, text_file, small_architecture(tmp_path), *settings)
    count = operations(train, config, tmp_path / "whole" / "run")
    timeless = [
        (entry["step"], entry.get("loss"), entry.get("held_out")) for entry in read_log(tmp_path / "whole" / "run")
    ]
    for operation in points(count):
        run = tmp_path / str(operation) / "run"
        if killed(operation, train, config, run):
            train(config, run)
        assert same_weights(run / "model", tmp_path / "whole" / "run" / "model"), operation
        found = [(entry["step"], entry.get("loss"), entry.get("held_out")) for entry in read_log(run)]
        assert found == timeless, operation
        assert (left(run.parent), left(run)) == ({"run"}, left(tmp_path / "whole" / "run")), operation


@pytest.mark.skipif("MLMKIT_KILLS" not in os.environ, reason="half a minute for each kill: set MLMKIT_KILLS")
def test_an_export_after_a_kill(checkpoint, tmp_path):
    whole = export(checkpoint("bert"), tmp_path / "artifact", text=PROOF)
    count = operations(export, checkpoint("bert"), tmp_path / "artifact", text=PROOF, overwrite=True)
    for operation in points(count):
        if killed(operation, export, checkpoint("bert"), tmp_path / "artifact", text=PROOF, overwrite=True):
            assert read_manifest(tmp_path / "artifact") == whole
            export(checkpoint("bert"), tmp_path / "artifact", text=PROOF, overwrite=True)
        assert read_manifest(tmp_path / "artifact") == whole
        assert left(tmp_path) == {"artifact"}
