"""`mlmkit serve` under load, against the same weights behind FastAPI and transformers.pipeline.

A BERT-base shape with random weights in float32 fills one mask in English sentences of 16 tokens; the clients
share its cores. The peer is what people write: a FastAPI route that calls the pipeline, one request at a time. For each
number of connections: requests per second, and the latency's median and 99th percentile, as clients in a process of
their own see them. Rounds alternate, each with fresh servers. Before them, on one connection, what the server adds to
the bare engine's call, in alternating slices of a second. The limit is the bare engine: its calls one after another,
and its rows per second in calls of 64.

`--mixed SECONDS` is another measurement: more clients than the server can keep up with send short texts, long ones,
several masks and texts to score for that long, while the server's memory is watched. Answers other than 200 and 429
fail it.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from harness import Report, alternate, cell, main, ratios, say, table, timed
from inputs import artifact, bert_tokenizer, checkpoint, held_out, sentences
from load import run_alone
from processes import ROOT, ContestantError, contestants, isolated, memory_mib

CONNECTIONS, PEER = (1, 8, 64), "pipeline"
TOKENS = 16  # per sentence to fill
START_SECONDS = 300.0  # that a server may take to load
Requests = list[tuple[str, dict[str, Any]]]  # path, body


# ---------------------------------------------------------------- requests


def short_requests(count: int) -> Requests:
    """Sentences cut to `TOKENS` wordpieces including the special ones, with one wordpiece masked."""
    tokenizer, length = bert_tokenizer(), TOKENS - 2
    texts = sentences(2 * count, TOKENS, tokenizer)
    rows = [ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if len(ids) >= length]
    requests = []
    for number, ids in enumerate(rows[:count]):
        ids = ids[:length]
        ids[number % len(ids)] = tokenizer.mask_token_id
        requests.append(("/fill-mask", {"inputs": tokenizer.decode(ids)}))
    return requests


def mixed_requests() -> Requests:
    """Texts to fill: short, long, with several masks, in lists, with targets; and texts to score."""
    short, requests = short_requests(64), []
    texts = [line.split() for line in held_out() if len(line.split()) > 200][:8]
    for words, (path, body) in zip(texts, short[::8], strict=False):
        requests += [
            (path, body),
            (path, {"inputs": " ".join([*words[:90], "[MASK]", *words[91:180]])}),
            (path, {"inputs": " ".join([*words[:9], "[MASK]", "[MASK]", *words[9:14]])}),
            ("/score", {"inputs": " ".join(words[:12]), "parameters": {"per_token": True}}),
            (path, {**body, "parameters": {"targets": ["the", "a", "house"]}}),
        ]
    return [*requests, *short, ("/fill-mask", {"inputs": [body["inputs"] for _, body in short[:8]]})]


# ---------------------------------------------------------------- servers and clients


def mlmkit_command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "mlmkit", "serve", str(folder), "--port", "0", *more]


def serve_pipeline(source: str) -> None:
    """The peer. The route runs on the event loop, so requests are answered one at a time."""
    import socket

    import uvicorn
    from fastapi import Body, FastAPI
    from transformers import pipeline

    fill = pipeline("fill-mask", model=source)
    app = FastAPI()

    @app.post("/fill-mask")
    async def fill_mask(inputs: str | list[str] = Body(embed=True)) -> Any:  # noqa: B008
        return fill(inputs)

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    say(f"serving on http://127.0.0.1:{listener.getsockname()[1]}")
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[tuple[int, int]]:
    """A server's port and process id. It is terminated in the end, and must stop within a minute."""
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log, cwd=ROOT) as process:
        try:
            yield _port(process, log), process.pid
        finally:
            process.terminate()
            process.wait(60)


def _port(process: subprocess.Popen[bytes], log: Any) -> int:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        log.seek(0)
        text = log.read()
        if announced := re.search(r"http://127\.0\.0\.1:(\d+)", text):
            return int(announced[1])
        if process.poll() is not None:
            raise ContestantError(f"a server ended: {text[-300:]}")
        time.sleep(0.1)
    raise ContestantError("a server did not start in time")


# ---------------------------------------------------------------- the bare engine


def open_engine(folder: Path, requests: Requests) -> tuple[Any, list[Any]]:
    """The engine alone, and the batches of the requests."""
    from mlmkit.backends import load as load_backend
    from mlmkit.fill import rank_together, step
    from mlmkit.questions import ask_all

    backend = load_backend(str(folder))
    texts = [body["inputs"] for _, body in requests]
    return backend, step(rank_together(ask_all(backend.tokenizer, backend.info, texts)))[0]


def seconds_per_call(engine: tuple[Any, list[Any]], seconds: float) -> float:
    """The median of calls with one request each, for that long."""
    backend, batches = engine
    taken, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        taken.append(timed(backend.score, batches[len(taken) % len(batches)]))
    return median(taken)


def rows_per_second(engine: tuple[Any, list[Any]]) -> float:
    """In calls of 64 rows: what no server can exceed."""
    import numpy as np

    from mlmkit.backends import Batch

    backend, batches = engine
    longest = max(batch.input_ids.shape[1] for batch in batches)
    rows = [batch for batch in batches if batch.input_ids.shape == (1, longest)][:64]
    moved = [batch._replace(positions=batch.positions + longest * row) for row, batch in enumerate(rows)]
    batch = Batch(*map(np.concatenate, zip(*moved, strict=True)))
    return len(rows) / median([timed(backend.score, batch) for _ in range(4)][1:])


def overhead(folder: Path, requests: Requests, slices: int) -> dict[str, list[float]]:
    """Alternating slices of a second of the bare engine and of one connection to a server; and the engine's rows."""
    with contestants({"": (open_engine, folder, requests)}) as engine, running(mlmkit_command(folder)) as (port, _):
        turns = {
            "bare": partial(engine[""].call, seconds_per_call, 1.0),
            "served": lambda: isolated(run_alone, port, requests, 1, 1.0)["p50"],
        }
        taken = alternate(turns, slices)
        return taken | {"rows per second": [engine[""].call(rows_per_second)]}


# ---------------------------------------------------------------- the two measurements


def compare(options: argparse.Namespace) -> Report:
    """Rounds of both servers at each number of connections."""
    requests = short_requests(256)
    layers = {"num_hidden_layers": options.layers}
    target, source = artifact("bert-base", **layers), checkpoint("bert-base", **layers)
    commands = {"mlmkit": mlmkit_command(target), PEER: [sys.executable, __file__, PEER, str(source)]}
    runs: dict[tuple[str, int], list[Any]] = {(name, count): [] for count in CONNECTIONS for name in commands}
    alone = overhead(target, requests, 3 * options.rounds)
    for _ in range(options.rounds):  # not `alternate`: each round has fresh servers, which warm up for themselves
        for name, command in commands.items():
            with running(command) as (port, _):
                isolated(run_alone, port, requests, 4, 2.0)
                for count in CONNECTIONS:
                    seen = isolated(run_alone, port, requests, count, options.seconds)
                    assert seen["statuses"].keys() == {"200"}, seen
                    runs[name, count].append(seen)
    rates = {key: [seen["requests_per_second"] for seen in rounds] for key, rounds in runs.items()}
    fast = {(name, count): ratios(rates[PEER, count], rates[name, count]) for name, count in runs}
    records = [
        {
            "connections": count,
            "server": name,
            "requests/s": median(rates[name, count]),
            "p50 ms": 1e3 * median(seen["p50"] for seen in rounds),
            "p99 ms": 1e3 * median(seen["p99"] for seen in rounds),
            "x the pipeline's requests/s": fast[name, count],
        }
        for (name, count), rounds in runs.items()
    ]
    headlines = {f"serve_{count}_times_as_fast": median(fast["mlmkit", count]) for count in CONNECTIONS}
    added = [(served - bare) * 1e3 for served, bare in zip(alone["served"], alone["bare"], strict=True)]
    headlines["serve_overhead_ms"] = median(added)
    return Report(
        [table("", records)],
        [
            f"On one connection the server adds {cell(added)} ms to the bare call's {median(alone['bare']) * 1e3:.2f} "
            f"ms, in alternating slices of a second. The engine alone scores {alone['rows per second'][0]:.1f} rows "
            "per second in calls of 64; no server can exceed that."
        ],
        headlines,
        figures={"overhead": alone, "runs": {f"{name}, {count}": rounds for (name, count), rounds in runs.items()}},
    )


def mixed(options: argparse.Namespace) -> Report:
    """The overloaded server, in parts of half a minute."""
    requests = mixed_requests()
    records: list[dict[str, Any]] = []
    target = artifact("bert-base", num_hidden_layers=options.layers)
    with running(mlmkit_command(target, "--max-requests", "48", "--deadline", "120")) as (port, process):
        until = time.monotonic() + options.mixed
        while time.monotonic() < until:
            part = isolated(run_alone, port, requests, 64, min(30.0, max(until - time.monotonic(), 1.0)))
            resident = memory_mib("VmRSS", process) / 1024
            records.append({"resident GiB": resident, "p99 seconds": part["p99"], "answers": part["statuses"]})
            say(f"{records[-1]}")
            assert part["statuses"].keys() <= {"200", "429"}, (part["statuses"], part["last_error"])
    statuses = sum((Counter(record["answers"]) for record in records), Counter[str]())
    figures = {"statuses": dict(statuses), "parts": records}
    return Report([table("Mixed load, a row per half minute", records)], figures=figures)


def measure(options: argparse.Namespace) -> Report:
    return mixed(options) if options.mixed else compare(options)


if __name__ == "__main__":
    if sys.argv[1:2] == [PEER]:
        serve_pipeline(sys.argv[2])
    else:
        main(__doc__, measure, rounds=(2, 1), seconds=(6.0, 1.0), layers=(0, 2), mixed=(0.0, 0.0))
