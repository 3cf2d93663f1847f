"""Where the time goes in `mlmkit train`, `mlmkit eval` and `mlmkit serve`, by stage.

py-spy samples the stacks of the running threads 200 times per second. A sample counts for the stage of its innermost
function of mlmkit, of the HTTP libraries, or of an import. Commands are sampled from beginning to end, the server only
under load, with its clients on the same cores. A tiny model shows mlmkit's own cost, a larger one what users wait for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

from harness import ContestantError, Report, SkippedError, last_line, main, table
from inputs import TINY, artifact, checkpoint, documents, held_out, write_lines
from serve_load import client_command, load, mlmkit_command, running, short_requests

LOOKS = 200  # samples per second
LEAST = 0.5  # per cent of a workload; a stage below that everywhere is left out
STAGES = {
    "the model": "backends/ model.py packing.py loss.py train/step.py",  # backward is called there
    "the optimiser": "train/optimisers.py",
    "reading, tokenising": "documents.py tokenizer.py corpus.py eval/data.py train/tokenizer.py",
    "hashing": "files.py artifact.py",
    "masks, packs, batches": "masking.py batching.py train/rows.py train/order.py train/data.py eval/rows.py",
    "scores into tables": "eval/scoring.py eval/results_store.py eval/evaluate.py",
    "metrics, bootstrap": "eval/metrics.py eval/pairs.py eval/statistics.py",
    "report": "eval/report.py eval/plots.py",
    "making or loading a model": "train/start.py train/presets.py",
    "checkpoints": "train/checkpoints.py",
    "text to rows, scores to JSON": "fill.py serve/requests.py serve/schemas.py",
    "the batcher": "serve/batcher.py",
}
HTTP = ("mlmkit/serve/", "uvicorn/", "asyncio/", "fastapi/", "starlette/", "pydantic/", "prometheus_client/")
STAGE_OF_PATH = {f"mlmkit/{path}": stage for stage, paths in STAGES.items() for path in paths.split()}
STAGE_OF_PATH |= {**dict.fromkeys(HTTP, "HTTP"), "<frozen importlib": "imports", "mlmkit/": "the rest of mlmkit"}
IDLE = "_worker (concurrent/futures/thread.py"  # a thread that waits for work, which py-spy counts as running
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
    """A column per workload, a row per stage, in per cent."""
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
                seen[f"serve, {size}, {connections}"] = serving(folder, artifact(**model), connections, options.seconds)
    percent = {
        name: {stage: 100 * count / looks.total() for stage, count in looks.items()} for name, looks in seen.items()
    }
    most = {stage: max(column.get(stage, 0.0) for column in percent.values()) for stage in chain(*percent.values())}
    shown = sorted((stage for stage in most if most[stage] >= LEAST), key=lambda stage: -most[stage])
    rows: list[dict[str, object]] = [
        {"": stage, **{name: round(column.get(stage, 0.0)) or None for name, column in percent.items()}}
        for stage in shown
    ]
    rows.append({"": "seconds seen", **{name: looks.total() / LOOKS for name, looks in seen.items()}})
    return Report(
        [table("Share of the time, %", rows)],
        [
            "`train` is a BERT-small shape; `serve` has 1 or 64 connections that ask to fill a mask in 16 tokens. "
            "A thread that waits for a core counts as running, so times exceed those of an ordinary run. Below half a "
            f"per cent everywhere, and left out: {'; '.join(sorted(most.keys() - shown)) or 'nothing'}."
        ],
        figures={name: dict(looks.most_common()) for name, looks in seen.items()},
    )


def command(output: Path, *arguments: object) -> Counter[str]:
    """Samples by stage of a command of mlmkit, from beginning to end."""
    words = map(str, [*arguments, "--output", output])
    looks = look(output.parent, "--", sys.executable, "-m", "mlmkit", *words)
    if not output.exists():  # py-spy does not report how the command ended
        raise ContestantError(f"mlmkit {arguments[0]} wrote nothing")
    return looks


def serving(folder: Path, model: Path, connections: int, seconds: int) -> Counter[str]:
    """Samples by stage of a warm server under load."""
    requests = folder / "requests.json"
    with running(mlmkit_command(model)) as (port, process):
        load(port, requests, connections, 1.0)
        under_load = client_command(port, requests, connections, seconds + 2)  # py-spy takes a while to attach
        with subprocess.Popen(under_load, stdout=subprocess.DEVNULL):
            return look(folder, "--pid", str(process), "--duration", str(seconds))


def look(folder: Path, *arguments: str) -> Counter[str]:
    """Samples by stage. Raises `SkippedError` if py-spy is missing or not permitted, otherwise `ContestantError`."""
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
    """The stage of a stack, which is frames `function (path:line)`, outermost first."""
    for frame in reversed(stack.split(";")):
        path = frame.rpartition(" (")[2].rpartition(":")[0]
        if matches := [prefix for prefix in STAGE_OF_PATH if path.startswith(prefix)]:
            return STAGE_OF_PATH[max(matches, key=len)]
    return "Python's own start and end"


if __name__ == "__main__":
    main(__doc__, measure, documents=(200, 20), steps=(4, 1), layers=(0, 1), seconds=(3, 1))
