"""Shards made by Ray and by Slurm jobs, of which one is killed: the same bytes as on one machine.

Without a Slurm cluster, tests/sbatch.py takes the place of `sbatch`: it runs the elements of the real job here.
examples/ray_serve.py is tested here too, as Ray takes 20 s to start: many requests at once over HTTP.
"""

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import paragraphs
from interruptions import free_port

from mlmkit.backends import load
from mlmkit.cluster import run_on_cluster, run_with_ray
from mlmkit.errors import UserError
from mlmkit.files import hash_tree
from mlmkit.fill import fill
from mlmkit.locations import Source
from mlmkit.shards import finish, is_made, make_shards, plan_corpus
from mlmkit.tokenizer import Tokenizer

PARTS = 6  # files, and so tasks
ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TEXTS = ["Return a [MASK] object.", "If the argument is [MASK], an exception is raised.", "the [MASK] of the [MASK]"]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """The `ray` module while Ray runs on loopback with two workers; skips the test where it does not start."""
    ray: Any = pytest.importorskip("ray", reason="ray has no wheel for this Python or system")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    temporary = tempfile.mkdtemp(prefix="ray-")  # not pytest's: Ray's sockets need a short path
    with pytest.MonkeyPatch.context() as patch:  # its workers inherit this
        patch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        try:
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=100 << 20,
                log_to_driver=False,
                _temp_dir=temporary,
            )
        except Exception as error:  # too little shared memory or time, say
            pytest.skip(f"Ray does not start on this machine: {error}")
    try:
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> None:
    """The Slurm cluster that this machine belongs to, or tests/sbatch.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if shutil.which("sinfo") and not subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode:
        return
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "sbatch"
    command = shlex.join([sys.executable, str(ROOT / "tests" / "sbatch.py")])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")


def plan(folder: Path, text: Path, tokenizer: Path, patch: pytest.MonkeyPatch) -> Path:
    """Plan the corpus of a text, each file a task, in a new folder with the tokenizer; return the folder."""
    patch.setattr("mlmkit.shards.SMALLEST_SPLIT", max(file.stat().st_size for file in text.iterdir()))
    shutil.copytree(tokenizer, folder / "tokenizer")
    plan_corpus(Source(str(text)), Tokenizer.from_folder(folder / "tokenizer"), folder / "train-1", words=True)
    return folder


@pytest.fixture
def planned(tmp_path, tokenizer_folder, monkeypatch) -> Callable[[str, Path], Path]:
    """Plans the corpus of a text in a folder of this name."""
    return lambda name, text: plan(tmp_path / name, text, tokenizer_folder("wordpiece"), monkeypatch)


@pytest.fixture(scope="module")
def made_here(text, tokenizer_folder, tmp_path_factory) -> dict[str, str]:
    """The files that this process makes of the text, and their hashes."""
    with pytest.MonkeyPatch.context() as patch:
        here = plan(tmp_path_factory.mktemp("one") / "here", text, tokenizer_folder("wordpiece"), patch)
        for part in range(PARTS):
            make_shards(here / "train-1", part, Tokenizer.from_folder(here / "tokenizer"))
        return _finished(here)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of files that take about a second each."""
    folder = tmp_path_factory.mktemp("text")
    for part in range(PARTS):
        (folder / f"{part}.txt").write_text("\n".join(f"{part} {line}" for line in paragraphs() * 12))
    return folder


@contextmanager
def one_killed(folder: Path) -> Iterator[list[int]]:
    """Kill the process that is writing a shard once another shard is there. Yields the process ids of those killed."""
    shards, killed, ended = folder / "train-1" / "shards", [], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            if any(is_made(shards.parent, part) for part in range(PARTS)) and (process := _writer(shards)):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def _writer(shards: Path) -> int | None:
    """A process that has an unfinished shard open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if (target := str(descriptor.readlink())).startswith(str(shards)) and ".mlmkit-partial/" in target:
                return int(descriptor.parts[2])
    return None


def _finished(folder: Path) -> dict[str, str]:
    finish(folder / "train-1")
    return {name: sha256 for name, sha256 in hash_tree(folder / "train-1").items() if "mlmkit-partial" not in name}


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process to kill in /proc")
@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_a_killed_task_changes_no_byte(engine, planned, made_here, text, request):
    cluster = planned("cluster", text)
    request.getfixturevalue(engine)
    begun = time.monotonic()
    with one_killed(cluster) as killed:
        run_on_cluster([cluster / "train-1"], cluster / "tokenizer", engine, workers=2)
    assert len(killed) == 1
    assert _finished(cluster) == made_here
    assert time.monotonic() - begun < 60
    if engine == "slurm":
        assert list((cluster / "logs").glob("*.log"))
    run_on_cluster([cluster / "train-1"], cluster / "tokenizer", engine)  # nothing is left to do


@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_a_task_that_fails_says_why(engine, planned, tmp_path, request):
    request.getfixturevalue(engine)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "good.txt").write_text("\n".join(paragraphs()))
    (tmp_path / "text" / "wrong.txt").write_bytes(b"fine\nbroken \xff\n")
    folder = planned("cluster", tmp_path / "text")
    with pytest.raises(UserError, match=r"^\S*wrong.txt: line 2, byte 8 is not UTF-8"):
        run_on_cluster([folder / "train-1"], folder / "tokenizer", engine, workers=1)


def test_no_more_calls_at_once_than_workers(ray, tmp_path):
    def call(number: int) -> int:
        (tmp_path / str(number)).touch()
        time.sleep(0.2)
        running = len(list(tmp_path.iterdir()))
        (tmp_path / str(number)).unlink()
        return running

    assert sorted(run_with_ray(call, range(4), workers=1)) == [1, 1, 1, 1]


def test_a_job_that_always_dies_is_given_up(slurm, planned, text, monkeypatch):
    folder = planned("cluster", text)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UserError, match=r"made nothing \(exit code 1\): see \S*cluster/logs/\d*_\*.log"):
        run_on_cluster([folder / "train-1"], folder / "tokenizer", "slurm")


def test_without_sbatch(planned, text, monkeypatch):
    folder = planned("cluster", text)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch"):
        run_on_cluster([folder / "train-1"], folder / "tokenizer", "slurm")


def test_without_ray(planned, text, monkeypatch):
    folder = planned("cluster", text)
    monkeypatch.setattr("mlmkit.errors.find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(UserError, match=r"pip install '\.\[cluster\]'"):
        run_on_cluster([folder / "train-1"], folder / "tokenizer", "ray")


# ---------------------------------------------------------------- serving with Ray


@pytest.fixture(scope="module")
def address(ray, artifact) -> Iterator[str]:
    """Where the example answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        serve, example = importlib.import_module("ray.serve"), importlib.import_module("ray_serve")
        port = free_port()
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(example.app({"artifact": str(artifact("bert"))}))
            yield f"http://127.0.0.1:{port}/"
        finally:
            serve.shutdown()


def post(address: str, body: Any) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(address, json.dumps(body).encode(), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_requests_at_once_get_the_answers_of_fill(address, artifact):
    backend = load(str(artifact("bert")))
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda text: post(address, {"inputs": text}), TEXTS * 8))
    for text, (status, answer) in zip(TEXTS * 8, answers, strict=True):
        assert status == 200
        lists = answer if isinstance(answer[0], list) else [answer]
        for masks, expected in zip(lists, fill(backend, text), strict=True):
            for candidate, wanted in zip(masks, expected, strict=True):
                assert candidate == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-5)}


def test_parameters_and_mistakes(address, artifact):
    status, answer = post(address, {"inputs": TEXTS[0], "parameters": {"top_k": 2, "targets": ["a", "the"]}})
    expected = fill(load(str(artifact("bert"))), TEXTS[0], top_k=2, targets=["a", "the"])[0]
    assert (status, [one["token"] for one in answer]) == (200, [one["token"] for one in expected])
    for wrong in ({"inputs": "no mask"}, {"inputs": 3}, [], {}, {"inputs": TEXTS[0], "parameters": {"beam": 3}}):
        status, answer = post(address, wrong)
        assert status == 422, wrong
        assert answer["error_type"] == "invalid_request"
