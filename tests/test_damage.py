"""Damaged, missing or foreign files of mlmkit: one line names the file and what to do."""

import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import paragraphs, refusal, run
from test_eval_resume import Interrupted
from training import Ranks, same_weights, write_config

from mlmkit.backends import load
from mlmkit.eval.api import evaluate
from mlmkit.eval.data import cut_parts
from mlmkit.eval.results_store import load_result
from mlmkit.files import write_json
from mlmkit.locations import Source
from mlmkit.token_cache import load_corpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoints import resuming
from mlmkit.train.loop import train

DAMAGE: dict[str, Callable[[Path, random.Random], object]] = {
    "flipped": lambda path, rng: path.write_bytes(flipped(path.read_bytes(), rng)),
    "cut": lambda path, rng: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
    "emptied": lambda path, _: path.write_bytes(b""),
    "removed": lambda path, _: path.unlink(),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
    "of another": lambda path, _: write_json(path, {"mask_digest": "00", "identity": {}, "metrics": {}}),
}


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Flip one bit of a byte that is not white space between values."""
    place = rng.choice([place for place, byte in enumerate(content) if byte not in b" \n"])
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def half(tmp_path_factory, text_file) -> tuple[Path, list[object]]:
    """A run with checkpoints of steps 2, 4 and 6 of 6 but no final model, and the command without `--output`."""
    folder = tmp_path_factory.mktemp("half")
    overrides = ["train.steps=6", "train.save_every=2", f"data.held_out={str(text_file)!r}"]
    train(write_config(folder, text_file, "bert-tiny", *overrides), folder / "run")
    shutil.copytree(folder / "run" / "model", folder / "model")
    shutil.rmtree(folder / "run" / "model")
    (folder / "run" / "held_out.json").unlink()
    return folder / "run", ["train", folder / "config.toml", *(part for each in overrides for part in ("--set", each))]


LAST = "checkpoints/step-00000006"
SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    "name", ["run.json", f"{LAST}/trainer.json", f"{LAST}/config.json", f"{LAST}/optimizer/{SHARD}"]
)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_named_with_what_to_do(capsys, half, tmp_path, name, kind):
    folder, command = half
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    DAMAGE[kind](copy / name, random.Random(name + kind))
    code, out, err = run(capsys, *command, "--output", copy)
    [line] = [line for line in err.splitlines() if line.startswith("mlmkit: ")]
    assert (code, out, "Traceback" in err) == (2, "", False), err
    assert name.rpartition("/")[2] in line and ("delete" in line) and (LAST in line) == name.startswith(LAST)
    if name.startswith(LAST) and kind == "removed":  # do what the line says
        shutil.rmtree(copy / LAST)
        assert f"{copy}/checkpoints/step-00000004" in line
        code, _, err = run(capsys, *command, "--output", copy)
        assert code == 0, err
        assert same_weights(copy / "model", folder.parent / "model")


def test_a_damaged_log_or_held_out_result_is_made_good_and_said(capsys, caplog, half, tmp_path):
    folder, command = half
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    log = copy / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    steps = [number for number, line in enumerate(lines) if '"loss"' in line]
    broken = dict(zip(steps, ("[" * 100_000, "\x00\xff", '{"step": "2"}', "[1]"), strict=False))
    log.write_text("".join(f"{broken[number]}\n" if number in broken else line for number, line in enumerate(lines)))
    DAMAGE["flipped"](copy / LAST / "held-out" / "result.json", random.Random(0))
    code, _, err = run(capsys, *command, "--output", copy)
    # the only entries with a loss are gone, so the run does not know whether it learned
    assert "result.json is damaged" in caplog.text
    for number in broken:
        assert f"log.jsonl: line {number + 1} is damaged and left out" in caplog.text
    assert (code, "had a token to predict" in err) == ((1, True) if len(broken) == len(steps) else (0, False)), err
    assert load_result(copy / LAST / "held-out").result["mask_digest"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_too_little_memory_is_no_damage(error, tmp_path):
    """The user must not be told to delete a good checkpoint."""
    with pytest.raises(type(error)), resuming(tmp_path / "checkpoints" / "step-00000002"):
        raise error


def test_a_full_disk_when_a_run_begins(text_file, tmp_path):
    ranks = Ranks(
        write_config(tmp_path, text_file, "bert-tiny"), tmp_path / "run", limits=((resource.RLIMIT_FSIZE, 999),)
    )
    assert ranks.wait() == [2]
    [message] = ranks.messages()
    assert "File too large" in message and "\n" not in message
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- evaluations


@pytest.fixture(scope="module")
def result(artifact, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "text.txt").write_text("\n".join(paragraphs()[:8]))
    evaluate(str(artifact("bert")), folder / "text.txt", output=folder / "result")
    return folder / "result"


@pytest.mark.parametrize("name", ["result.json", "tokens.parquet", "documents.parquet"])
def test_a_result_is_what_was_written_or_named(capsys, result, artifact, tmp_path, name):
    """For any flipped bit; following the line's advice measures it again."""
    copy, rng = Path(shutil.copytree(result, tmp_path / "copy")), random.Random(name)
    content = (copy / name).read_bytes()
    kinds = [*DAMAGE] if name == "result.json" else [*DAMAGE][:-1]
    for kind in kinds + 40 * ["flipped"]:
        (copy / name).write_bytes(content)
        DAMAGE[kind](copy / name, rng)
        assert name in refusal(capsys, "report", copy), kind
        if (copy / name).is_dir():
            (copy / name).rmdir()
    assert run(capsys, "compare", result, copy)[0] == 2
    if name == "result.json":
        (copy / name).unlink()  # the tables say that this was an evaluation
    command = ["eval", artifact("bert"), "--set", result.parent / "text.txt", "--output", copy]
    code, _, err = run(capsys, *command)
    assert (code, "--overwrite" in err) == (2, True)
    assert run(capsys, *command, "--overwrite")[0] == 0
    assert load_result(copy).result["metrics"] == load_result(result).result["metrics"]


def test_a_folder_of_parts_of_something_else_is_left_alone(capsys, result, artifact, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "screws.csv").touch()
    command = ["eval", artifact("bert"), "--set", result.parent / "text.txt", "--output", tmp_path, "--overwrite"]
    code, _, err = run(capsys, *command)
    assert (code, "so --overwrite leaves it alone" in err) == (2, True)
    assert (tmp_path / "parts" / "screws.csv").exists()


def test_parts_that_are_damaged_or_of_another_evaluation_are_scored_again(artifact, tmp_path, monkeypatch, caplog):
    """A flipped bit, in a footer too; a part of another evaluation; a part under another name. None is used."""
    monkeypatch.setattr(cut_parts, "__defaults__", (600.0,))
    (tmp_path / "text.txt").write_text("\n".join(paragraphs()[:100]))
    model, source, rng = load(str(artifact("bert"))), tmp_path / "text.txt", random.Random(0)
    for name, seed in (("one", 0), ("other", 1)):
        with pytest.raises(KeyboardInterrupt):
            evaluate(Interrupted(model, 20), source, mask_seed=seed, output=tmp_path / name, batch_tokens=300)
    first, second, third, *_ = sorted((tmp_path / "one").glob("parts/*.parquet"))
    footer = bytearray(first.read_bytes())
    footer[footer.rindex(b"piece")] ^= 4  # the name of a column
    first.write_bytes(footer)
    for suffix in (".json", ".parquet"):
        shutil.copy(third.with_suffix(suffix), second.with_suffix(suffix))
        shutil.copy(next((tmp_path / "other").glob(f"parts/*{suffix}")), third.with_suffix(suffix))
    evaluate(model, source, output=tmp_path / "one")
    assert caplog.text.count("is damaged or belongs to another evaluation: scoring it again") == 3
    DAMAGE["flipped"](next((tmp_path / "other").glob("parts/*.parquet")), rng)
    evaluate(model, source, mask_seed=1, output=tmp_path / "other")
    assert caplog.text.count("is damaged or belongs to another evaluation: scoring it again") == 4
    evaluate(model, source, output=tmp_path / "whole")
    tables = [pq.read_table(tmp_path / name / "tokens.parquet") for name in ("one", "whole")]
    assert tables[0].equals(tables[1])


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounting needs root")
def test_a_finished_result_on_a_read_only_mount_is_printed(capsys, caplog, result, artifact, tmp_path):
    mount = Path(shutil.copytree(result.parent, tmp_path / "mount"))
    commands = (["mount", "--bind", mount, mount], ["mount", "-o", "remount,bind,ro", mount])
    if any(subprocess.run(command, capture_output=True).returncode for command in commands):
        pytest.skip("this system lets nobody mount")
    try:
        command = ["eval", artifact("bert"), "--set", mount / "text.txt", "--json", "--output", mount / "result"]
        code, out, err = run(capsys, *command)
        assert (code, json.loads(out)["metrics"]) == (0, load_result(result).result["metrics"]), err
        assert "is read-only: report.html stays as it is" in caplog.text
        code, _, err = run(capsys, *command, "--overwrite")
        assert (code, "Read-only file system" in err) == (2, True)
    finally:
        subprocess.run(["umount", mount], check=True)


# ---------------------------------------------------------------- the system


def test_too_many_open_files_are_no_damage(tokenizer_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLMKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("one two\nthree\n")
    tokenizer, source = Tokenizer.from_folder(tokenizer_folder("wordpiece")), Source(str(tmp_path / "text.txt"))
    load_corpus(source, tokenizer)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(4):
        opened = [os.open(os.devnull, os.O_RDONLY)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 1 + spare, hard))
            with pytest.raises(Exception, match="Too many open files"):
                while True:
                    load_corpus(source, tokenizer)
                    opened.append(os.open(os.devnull, os.O_RDONLY))
        finally:
            for descriptor in opened:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert not caplog.records
