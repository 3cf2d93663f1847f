"""Where the time goes in `mlmkit train`, `mlmkit eval` and `mlmkit serve`, by stage.

py-spy looks 200 times a second at the stacks of the threads that run. Each look is booked to the stage of the innermost
function of mlmkit, of what answers HTTP, or of an import. Commands are looked at from beginning to end, the server
under its load alone, with clients on the same cores. A tiny model shows what is ours, a larger one what users wait for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

from harness import ContestantError, Report, SkippedError, Table, last_line, main
from inputs import TINY, artifact, checkpoint, documents, held_out, write_lines
from serve_load import clients, load, mlmkit_command, running, short_requests

LOOKS = 200  # a second
STAGES = {
    "the model": "backends/ model.py packing.py loss.py train/loop.py",  # the loop calls backward
    "the optimiser": "train/optim.py train/parallel.py",
    "reading, tokenising": "documents.py tokenizer.py corpus.py eval/material.py train/tokenizer.py",
    "hashing": "files.py artifact.py",
    "masks, packs, batches": "masking.py batching.py train/packs.py train/order.py train/data.py eval/plan.py",
    "scores into tables": "eval/scoring.py eval/store.py eval/stored.py eval/parts.py eval/passes.py eval/examples.py",
    "metrics, bootstrap": "eval/measure.py eval/metrics.py eval/slices.py eval/statistics.py",
    "report": "eval/report.py eval/plots.py train/curve.py",
    "making or loading a model": "train/start.py train/presets.py",
    "checkpoints": "train/checkpoint.py",
    "text to rows, scores to JSON": "fill.py serve/requests.py serve/schemas.py",
    "the batcher": "serve/batcher.py",
}
HTTP = ("mlmkit/serve/", "uvicorn/", "asyncio/", "fastapi/", "starlette/", "pydantic/", "prometheus_client/")
PLACES = {f"mlmkit/{place}": stage for stage, places in STAGES.items() for place in places.split()}
PLACES |= {**dict.fromkeys(HTTP, "HTTP"), "<frozen importlib": "imports", "mlmkit/": "the rest of mlmkit"}
IDLE = "_worker (concurrent/futures/thread.py"  # a thread that waits for work, which py-spy takes for one that runs
TRAINING = """[data]
train = "{text}"
[tokenizer]
path = "{model}"
[model]
architecture = "{model}/config.json"
max_length = 256
[train]
steps = {steps}
save_every = {steps}
global_batch_tokens = 8192
micro_batch_tokens = 8192
device = "cpu"
"""


def measure(options: argparse.Namespace) -> Report:
    """A column a workload, a row a stage, in per cent."""
    larger = {"architecture": "bert-small", "num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = write_lines(folder / "train.txt", documents()[: options.documents * 4])
        held = write_lines(folder / "held-out.txt", held_out()[: options.documents])
        config = folder / "config.toml"
        config.write_text(TRAINING.format(text=text, model=checkpoint(**larger), steps=options.steps))
        (folder / "requests.json").write_text(json.dumps(short_requests(256, 16)))
        seen = {"train": command(folder / "run", "train", config)}
        for size, model in {"tiny": {"architecture": "bert-mini", **TINY}, "small": larger}.items():
            for kind, path in {"torch": checkpoint(**model), "ONNX": artifact(**model)}.items():
                seen[f"eval, {size}, {kind}"] = command(folder / f"{size} {kind}", "eval", path, "--set", held)
            for connections in (1, 64):
                found = serving(folder, artifact(**model), connections, options.seconds)
                seen[f"serve, {size}, {connections}"] = found
    shares = {name: {stage: looks / found.total() for stage, looks in found.items()} for name, found in seen.items()}
    most = {
        stage: max(found.get(stage, 0.0) for found in shares.values())
        for stage in dict.fromkeys(chain(*shares.values()))
    }
    shown = sorted((stage for stage, share in most.items() if cell(share)), key=lambda stage: -most[stage])
    rows = [[stage, *(cell(found.get(stage, 0.0)) for found in shares.values())] for stage in shown]
    rows.append(["seconds seen", *(f"{found.total() / LOOKS:.1f}" for found in seen.values())])
    return Report(
        [Table("Share of the time, %", ["", *shares], rows)],
        [
            "`train` is a BERT-small shape; `serve` has 1 or 64 connections that ask to fill a mask in 16 tokens. "
            "A thread that waits for a core counts as running, so times are longer than a run's own. Below half a per "
            f"cent, and left out everywhere: {'; '.join(sorted(most.keys() - shown)) or 'nothing'}."
        ],
        figures={name: dict(found.most_common()) for name, found in seen.items()},
    )


def cell(share: float) -> str:
    """In per cent."""
    return f"{100 * share:.0f}" if share >= 0.005 else ""


def command(output: Path, *arguments: object) -> Counter[str]:
    """mlmkit, from beginning to end."""
    words = map(str, [*arguments, "--output", output])
    looks = look(output.parent, "--", sys.executable, "-m", "mlmkit", *words)
    if not output.exists():  # py-spy does not say how what it looked at ended
        raise ContestantError(f"mlmkit {arguments[0]} wrote nothing")
    return looks


def serving(folder: Path, model: Path, connections: int, seconds: int) -> Counter[str]:
    """A server under load, once it is warm."""
    requests = folder / "requests.json"
    with running(mlmkit_command(model)) as (port, process):
        load(port, requests, connections, 1.0)
        under_load = clients(port, requests, connections, seconds + 2)  # py-spy takes a while to attach
        with subprocess.Popen(under_load, stdout=subprocess.DEVNULL):
            return look(folder, "--pid", str(process), "--duration", str(seconds))


def look(folder: Path, *arguments: str) -> Counter[str]:
    """Looks by stage. Raises `SkippedError` where there is no py-spy or it may not look, else `ContestantError`."""
    seen = folder / "seen.txt"
    spy = [str(Path(sys.executable).with_name("py-spy")), "record", "--rate", str(LOOKS), "--format", "raw"]
    try:
        done = subprocess.run([*spy, "--output", str(seen), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise SkippedError("py-spy is not installed: pip install py-spy") from None
    if done.returncode or not seen.exists():
        is_refused = "Permission" in done.stderr + done.stdout
        raise (SkippedError if is_refused else ContestantError)(f"py-spy: {last_line(done.stderr or done.stdout)}")
    looks = Counter[str]()
    for line in seen.read_text(encoding="utf-8").splitlines():
        stack, _, count = line.rpartition(" ")
        if not stack.rpartition(";")[2].startswith(IDLE):
            looks[stage_of(stack)] += int(count)
    seen.unlink()
    return looks


def stage_of(stack: str) -> str:
    """Of frames `function (path:line)`, outermost first."""
    for frame in reversed(stack.split(";")):
        path = frame.rpartition(" (")[2].rpartition(":")[0]
        found: list[Any] = [place for place in PLACES if path.startswith(place)]
        if found:
            return PLACES[max(found, key=len)]
    return "Python's own start and end"


if __name__ == "__main__":
    main(__doc__, measure, documents=(200, 20), steps=(4, 1), layers=(0, 1), seconds=(3, 1))
