"""`mlmkit serve` under load, against the same weights behind FastAPI and transformers.pipeline.

A BERT-base shape with random weights in float32 answers fill-mask for real English sentences of `--tokens` tokens with
one mask, on cores that the clients share. The peer is what people write: a route of FastAPI that calls the pipeline,
one request at a time. Per number of connections: requests a second and the latency's median and 99th percentile, as
clients in a process of their own see them; rounds alternate, each with fresh servers. Before, on one connection, what
the server adds to the bare engine's call, in slices of a second that alternate.

`--mixed SECONDS` is another measurement: more clients than the server keeps up with, sending short texts, long ones,
several masks and texts to score, for that long, with the server's memory. Anything but 200 and 429 fails it.

The floor is the bare engine's call: what it answers one after another, and its rows a second in calls of 64.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from harness import ROOT, Bars, Contestant, ContestantError, Report, Table, alternate, main, memory_mib, say, spread
from inputs import artifact, bert_tokenizer, checkpoint, held_out, sentences

CONNECTIONS, PEER = (1, 8, 64), "pipeline"
STARTING = 300.0  # seconds that a server may take to load
Requests = list[tuple[str, dict[str, Any]]]


# ---------------------------------------------------------------- texts


def short_requests(count: int, tokens: int) -> Requests:
    """Sentences cut to `tokens` wordpieces with the special ones, one of them masked."""
    tokenizer = bert_tokenizer()
    found = sentences(2 * count, tokens, tokenizer)
    rows = [ids for ids in tokenizer(found, add_special_tokens=False)["input_ids"] if len(ids) >= tokens - 2]
    requests = []
    for number, ids in enumerate(rows[:count]):
        ids = ids[: tokens - 2]
        ids[number % len(ids)] = tokenizer.mask_token_id
        requests.append(("/fill-mask", {"inputs": tokenizer.decode(ids)}))
    return requests


def mixed_requests() -> Requests:
    """Short and long texts to fill, with one mask or several, in lists and with targets, and texts to score."""
    words = [line.split() for line in held_out() if len(line.split()) > 200][:8]
    long = [("/fill-mask", {"inputs": " ".join([*text[:90], "[MASK]", *text[91:180]])}) for text in words]
    several = [("/fill-mask", {"inputs": " ".join([*text[:9], "[MASK]", "[MASK]", *text[9:14]])}) for text in words]
    score = [("/score", {"inputs": " ".join(text[:12]), "parameters": {"per_token": True}}) for text in words]
    short = short_requests(64, 16)
    listed = [("/fill-mask", {"inputs": [body["inputs"] for _, body in short[:8]]})]
    targets = [("/fill-mask", {**body, "parameters": {"targets": ["the", "a", "house"]}}) for _, body in short[:8]]
    return [request for group in zip(short[::8], long, several, score, targets, strict=False) for request in group] + [
        *short,
        *listed,
    ]


# ---------------------------------------------------------------- servers


def mlmkit_command(folder: Path, *more: str) -> list[str]:
    """The server that this measures."""
    return [sys.executable, "-m", "mlmkit", "serve", str(folder), "--port", "0", *more]


def pipeline_command(source: Path) -> list[str]:
    """The peer."""
    return [sys.executable, __file__, PEER, str(source)]


def serve_pipeline(source: str) -> None:
    """FastAPI and the pipeline. The route runs on the event loop, so requests are answered one at a time."""
    import logging
    import socket

    import uvicorn
    from fastapi import Body, FastAPI
    from transformers import pipeline

    fill = pipeline("fill-mask", model=source)
    app = FastAPI()

    @app.post("/fill-mask")
    async def fill_mask(inputs: str | list[str] = Body(embed=True)) -> Any:  # noqa: B008
        return fill(inputs)

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    logging.info("serving on http://127.0.0.1:%d", listener.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[tuple[int, int]]:
    """A server's port and process id; it is told to stop, and must end with 0 or by the signal."""
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stderr=said, cwd=ROOT) as process:
        try:
            yield _port(process, said), process.pid
        finally:
            process.terminate()
            process.wait(60)


def _port(process: subprocess.Popen[bytes], said: Any) -> int:
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        said.seek(0)
        text = said.read()
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", text):
            return int(found[1])
        if process.poll() is not None:
            raise ContestantError(f"a server ended: {text[-300:]}")
        time.sleep(0.1)
    raise ContestantError("a server did not start in time")


def clients(port: int, requests: Path, connections: int, seconds: float) -> list[str]:
    """The command that loads a server (load.py)."""
    command = [sys.executable, str(Path(__file__).with_name("load.py")), str(port), str(requests)]
    return [*command, "--connections", str(connections), "--seconds", str(seconds)]


def load(port: int, requests: Path, connections: int, seconds: float) -> dict[str, Any]:
    """What the clients saw."""
    command = clients(port, requests, connections, seconds)
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def open_engine(folder: Path, requests: Requests) -> tuple[Any, list[Any]]:
    """The engine alone, and the batches of the requests."""
    from mlmkit.backends import load as load_backend
    from mlmkit.fill import ask

    backend = load_backend(str(folder))
    return backend, [ask(backend.tokenizer, backend.info, body["inputs"]).batch for _, body in requests]


def bare_calls(made: tuple[Any, list[Any]], seconds: float) -> float:
    """Seconds of one of its calls, in the median."""
    backend, batches = made
    taken, until = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < until:
        backend.score(batches[len(taken) % len(batches)])
        taken.append(time.perf_counter() - begun)
    return median(taken)


def bare_rate(made: tuple[Any, list[Any]]) -> float:
    """Rows a second that the engine does in large calls: what no server can pass."""
    import numpy as np

    from mlmkit.backends import Batch

    backend, batches = made
    longest = max(batch.input_ids.shape[1] for batch in batches)
    rows = [batch for batch in batches if batch.input_ids.shape == (1, longest)][:64]
    places = np.concatenate([batch.positions + longest * row for row, batch in enumerate(rows)])
    batch = Batch(
        np.concatenate([batch.input_ids for batch in rows]),
        np.concatenate([batch.attention_mask for batch in rows]),
        places,
        np.concatenate([batch.targets for batch in rows]),
    )
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        backend.score(batch)
        taken.append(time.perf_counter() - began)
    return len(rows) / median(taken[1:])


def overhead(folder: Path, requests: Requests, path: Path, slices: int) -> dict[str, list[float]]:
    """Short slices of the bare engine and of one connection to a server, alternating, in processes that stay."""
    engine = Contestant(open_engine, folder, requests)
    with running(mlmkit_command(folder)) as (port, _):
        calls = {
            "bare": partial(engine.call, bare_calls, 1.0),
            "served": lambda: load(port, path, 1, 1.0)["p50"],
        }
        found = alternate(calls, slices)
    found["rows a second"] = [engine.call(bare_rate)]
    engine.stop()
    return found


# ---------------------------------------------------------------- the two measurements


def compare(options: argparse.Namespace, path: Path) -> Report:
    """Rounds of both servers at each number of connections."""
    requests = short_requests(256, options.tokens)
    path.write_text(json.dumps(requests))
    target = artifact("bert-base", num_hidden_layers=options.layers)
    commands = {
        "mlmkit": mlmkit_command(target),
        PEER: pipeline_command(checkpoint("bert-base", num_hidden_layers=options.layers)),
    }
    runs: dict[str, dict[int, list[Any]]] = {name: {count: [] for count in CONNECTIONS} for name in commands}
    alone = overhead(target, requests, path, 3 * options.rounds)
    for _ in range(options.rounds):  # not `alternate`: a server of each round is a fresh one, and warms up for itself
        for name, command in commands.items():
            with running(command) as (port, _):
                load(port, path, 4, 2.0)
                for count in CONNECTIONS:
                    runs[name][count].append(load(port, path, count, options.seconds))
    for counts in runs.values():
        for found in (run for rounds in counts.values() for run in rounds):
            assert set(found["statuses"]) == {"200"}, found
    return compared(alone, runs)


def compared(alone: dict[str, list[float]], runs: dict[str, dict[int, list[Any]]]) -> Report:
    """Medians over the rounds, and the range of the ratios within a round."""
    rows, headlines = [], {}
    for count in CONNECTIONS:
        peers = runs[PEER][count]
        for name, counts in runs.items():
            rounds = counts[count]
            fast = [a["requests_per_second"] / b["requests_per_second"] for a, b in zip(rounds, peers, strict=True)]
            rate, p50, p99 = (median(run[key] for run in rounds) for key in ("requests_per_second", "p50", "p99"))
            rows.append([count, name, f"{rate:.1f}", f"{p50 * 1e3:.1f}", f"{p99 * 1e3:.1f}", spread(fast)])
            if name == "mlmkit":
                headlines[f"serve_{count}_times_as_fast"] = median(fast)
                headlines[f"serve_{count}_requests_per_second"] = rate
    added = [(served - bare) * 1e3 for served, bare in zip(alone["served"], alone["bare"], strict=True)]
    bare, most = median(alone["bare"]) * 1e3, alone["rows a second"][0]
    headlines["serve_overhead_ms"] = median(added)
    return Report(
        [Table("", ["connections", "server", "requests/s", "p50 ms", "p99 ms", "x the pipeline's requests/s"], rows)],
        [
            f"On one connection the server adds {spread(added)} ms to the bare call's {bare:.2f} ms, in alternating "
            f"slices of a second. The engine alone does {most:.1f} rows a second in calls of 64: the floor."
        ],
        headlines,
        Bars(
            "64 connections",
            "requests a second",
            {name: [run["requests_per_second"] for run in counts[64]] for name, counts in runs.items()},
        ),
        {"overhead": alone, "runs": runs},
    )


def mixed(options: argparse.Namespace, path: Path) -> Report:
    """The server under more than it can do."""
    path.write_text(json.dumps(mixed_requests()))
    memory: list[float] = []
    target = artifact("bert-base", num_hidden_layers=options.layers)
    with running(mlmkit_command(target, "--max-requests", "48", "--deadline", "120")) as (port, process):
        until = time.monotonic() + options.mixed
        parts = []
        while time.monotonic() < until:
            parts.append(load(port, path, 64, min(30.0, max(until - time.monotonic(), 1.0))))
            memory.append(memory_mib("VmRSS", process) / 1024)
            say(f"{memory[-1]:.3f} GiB, {parts[-1]['statuses']}")
    statuses: dict[str, int] = {}
    for part in parts:
        for status, count in part["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    assert set(statuses) <= {"200", "429"}, (statuses, [part["last_error"] for part in parts])
    rows = [[30 * (part + 1), f"{gib:.3f}", parts[part]["statuses"]] for part, gib in enumerate(memory)]
    return Report(
        [Table("Mixed load", ["seconds", "resident GiB", "answers by status"], rows)],
        figures={"statuses": statuses, "resident_gib": memory, "p99": [part["p99"] for part in parts]},
    )


def measure(options: argparse.Namespace) -> Report:
    """Either."""
    with tempfile.TemporaryDirectory() as temporary:
        return (mixed if options.mixed else compare)(options, Path(temporary) / "requests.json")


if __name__ == "__main__":
    if sys.argv[1:2] == [PEER]:
        serve_pipeline(sys.argv[2])
    else:
        main(
            __doc__,
            measure,
            rounds=(2, 1),
            seconds=(6.0, 1.0),
            tokens=(16, 16),
            layers=(0, 2),
            mixed=(0.0, 0.0),
        )
