"""Ranks started without torchrun: when one is killed, the others exit and say so."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import paragraphs
from interruptions import PROCESSES
from training import small_architecture, write_config

from mlmkit import distributed
from mlmkit.cli import main
from mlmkit.eval import evaluate

SAID = "does not answer. Start all ranks again with the same command: it resumes from what was saved last\n"


def start(arguments: Sequence[str], folder: Path, *, meeting_beats: int = 600, report_seconds: int = 0) -> list[Any]:
    """Both ranks, whose standard error goes to `FOLDER/RANK`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in ("0", "1"):
        environment = shared | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        settings = (environment, arguments, folder / rank, meeting_beats, report_seconds)
        processes.append(PROCESSES.Process(target=be_rank, args=settings))
        processes[-1].start()
    return processes


def be_rank(
    environment: dict[str, str], arguments: Sequence[str], said: Path, meeting_beats: int, report_seconds: int
) -> None:
    """The command in this process, with short beats and a report that takes that long."""
    os.environ |= environment
    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    distributed.BEAT_SECONDS, distributed.BEATS, distributed.MEETING_BEATS = 0.1, 20, meeting_beats
    if report_seconds:
        evaluate.write_report = lambda *_: time.sleep(report_seconds)
    main(list(arguments))


def code_of(process: Any, seconds: float) -> int | None:
    """Its exit code; None if it still runs after so many seconds."""
    process.join(seconds)
    return process.exitcode


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} {line}\n" for number in range(20) for line in paragraphs()), encoding="utf-8")
    return path


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_rank_that_is_killed_ends_the_other(
    command: str, victim: int, text: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """It used to hang in a collective for days."""
    output = tmp_path / "output"
    if command == "train":
        write_config(tmp_path, text, small_architecture(tmp_path))
        arguments = ["train", str(tmp_path / "config.toml"), "--set", "train.steps=100000"]
    else:
        arguments = ["eval", str(checkpoint("bert")), "--set", str(text), "--metric", "pseudo"]
    processes = start([*arguments, "--output", str(output)], tmp_path)
    try:
        until = time.monotonic() + 60
        while not ((output / "log.jsonl").exists() or list(output.glob("parts/*.parquet"))):
            assert time.monotonic() < until
            time.sleep(0.05)
        processes[victim].kill()
        assert code_of(processes[1 - victim], 30) == 1
    finally:
        for process in processes:
            process.kill()
    last = (tmp_path / str(1 - victim)).read_text().splitlines(True)[-1]
    assert last in (f"mlmkit: rank {victim} {SAID}", f"mlmkit: another rank {SAID}")
    assert "Traceback" not in (tmp_path / str(1 - victim)).read_text()


def test_a_rank_that_dies_before_they_meet_ends_the_other(text, checkpoint, tmp_path) -> None:
    """The first one used to wait for a week."""
    arguments = ["eval", str(checkpoint("bert")), "--set", str(text), "--output", str(tmp_path / "output")]
    first, second = start(arguments, tmp_path, meeting_beats=30)
    second.kill()
    try:
        assert code_of(first, 60) == 1
    finally:
        first.kill()
    assert (tmp_path / "0").read_text() == f"mlmkit: rank 1 {SAID}"


def test_a_rank_that_is_done_is_not_taken_for_dead(
    text: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first one still evaluates and writes long after the other has left."""
    output = ["--metric", "masked", "--output", str(tmp_path / "output")]
    first, second = start(["eval", str(checkpoint("bert")), "--set", str(text), *output], tmp_path, report_seconds=4)
    try:
        assert code_of(second, 60) == 0
        assert first.is_alive()
        assert code_of(first, 60) == 0, (tmp_path / "0").read_text()
    finally:
        first.kill()
        second.kill()
    assert (tmp_path / "1").read_text() == ""
