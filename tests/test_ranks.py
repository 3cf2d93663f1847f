"""Ranks started without torchrun: when one is killed, the others exit and say so."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, paragraphs
from training import CONFIG

SHORT = "import mlmkit.distributed as d; d.BEAT_SECONDS, d.BEATS, d.MEETING_BEATS = 0.1, 20, 600"
SAID = "does not answer. Start all ranks again with the same command: it resumes from what was saved last\n"


def start(arguments: Sequence[str], folder: Path, before: str = SHORT) -> list[subprocess.Popen[bytes]]:
    """Both ranks, whose standard error goes to `FOLDER/RANK`. `before` is Python that runs first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, "-c", f"{before}; from mlmkit.cli import main; main()", *arguments]
        with (folder / rank).open("wb") as said:
            processes.append(subprocess.Popen(command, env=environment, stderr=said, stdout=subprocess.DEVNULL))
    return processes


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
        (tmp_path / "architecture.json").write_text(ARCHITECTURES["bert"])
        config = CONFIG.format(text=str(text), architecture=str(tmp_path / "architecture.json"))
        (tmp_path / "config.toml").write_text(config.replace("steps = 12", "steps = 100_000"))
        arguments = ["train", str(tmp_path / "config.toml")]
    else:
        arguments = ["eval", str(checkpoint("bert")), "--set", str(text), "--metric", "pseudo"]
    processes = start([*arguments, "--output", str(output)], tmp_path)
    try:
        until = time.monotonic() + 60
        while not ((output / "log.jsonl").exists() or list(output.glob("parts/*.parquet"))):
            assert time.monotonic() < until
            time.sleep(0.05)
        processes[victim].send_signal(signal.SIGKILL)
        assert processes[1 - victim].wait(30) == 1
    finally:
        for process in processes:
            process.kill()
    last = (tmp_path / str(1 - victim)).read_text().splitlines(True)[-1]
    assert last in (f"mlmkit: rank {victim} {SAID}", f"mlmkit: another rank {SAID}")
    assert "Traceback" not in (tmp_path / str(1 - victim)).read_text()


def test_a_rank_that_dies_before_they_meet_ends_the_other(text, checkpoint, tmp_path) -> None:
    """The first one used to wait for a week."""
    arguments = ["eval", str(checkpoint("bert")), "--set", str(text), "--output", str(tmp_path / "output")]
    first, second = start(arguments, tmp_path, SHORT.replace("600", "30"))
    second.kill()
    try:
        assert first.wait(60) == 1
    finally:
        first.kill()
    assert (tmp_path / "0").read_text() == f"mlmkit: rank 1 {SAID}"


def test_a_rank_that_is_done_is_not_taken_for_dead(
    text: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first one still evaluates and writes long after the other has left."""
    slow = f"{SHORT}; import time, mlmkit.eval.report as r; r.write_report = lambda _: time.sleep(5)"
    output = ["--metric", "masked", "--output", str(tmp_path / "output")]
    first, second = start(["eval", str(checkpoint("bert")), "--set", str(text), *output], tmp_path, slow)
    try:
        assert second.wait(60) == 0
        assert first.poll() is None
        assert first.wait(60) == 0, (tmp_path / "0").read_text()
    finally:
        first.kill()
        second.kill()
    assert (tmp_path / "1").read_text() == ""
