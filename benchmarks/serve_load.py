"""`mlmkit serve` under load, against the same weights behind FastAPI and transformers.pipeline.

A BERT-base shape with random weights in float32 answers fill-mask for real English sentences of `--tokens` tokens with
one mask, on cores that the clients share. The peer is what people write: a route of FastAPI that calls the pipeline,
one request at a time. Per number of connections: requests a second and the latency's median and 99th percentile, as
clients in a process of their own see them; rounds alternate, each with fresh servers. Before, on one connection, what
the server adds to the bare engine's call, in slices of a second that alternate.

`--mixed SECONDS` is another measurement: more clients than the server keeps up with, sending short texts, long ones,
several masks and texts to score, for that long, with the server's memory. Anything but 200 and 429 fails it.

MLMKIT_DATA names a folder with tokenizers/bert-base-uncased/vocab.txt, ud_en_ewt/test.txt and wiki_en/heldout.txt.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from engines import Contestant, isolated

CONNECTIONS = (1, 8, 64)
STARTING = 300.0  # seconds that a server may take to load
Requests = list[tuple[str, dict[str, Any]]]


# ---------------------------------------------------------------- texts


def short_requests(count: int, tokens: int) -> Requests:
    """Sentences cut to `tokens` wordpieces with the special ones, one of them masked."""
    tokenizer, lines = _text("ud_en_ewt/test.txt")
    rows = [ids for ids in tokenizer(lines, add_special_tokens=False)["input_ids"] if len(ids) >= tokens - 2]
    requests = []
    for number, ids in enumerate(rows[:count]):
        ids = ids[: tokens - 2]
        ids[number % len(ids)] = tokenizer.mask_token_id
        requests.append(("/fill-mask", {"inputs": tokenizer.decode(ids)}))
    return requests


def mixed_requests() -> Requests:
    """Short and long texts to fill, with one mask or several, in lists and with targets, and texts to score."""
    _, lines = _text("wiki_en/heldout.txt")
    words = [line.split() for line in lines if len(line.split()) > 300][:8]
    long = [("/fill-mask", {"inputs": " ".join([*text[:150], "[MASK]", *text[151:300]])}) for text in words]
    several = [("/fill-mask", {"inputs": " ".join([*text[:9], "[MASK]", "[MASK]", *text[9:14]])}) for text in words]
    score = [("/score", {"inputs": " ".join(text[:12]), "parameters": {"per_token": True}}) for text in words]
    short = short_requests(64, 16)
    listed = [("/fill-mask", {"inputs": [body["inputs"] for _, body in short[:8]]})]
    targets = [("/fill-mask", {**body, "parameters": {"targets": ["the", "a", "house"]}}) for _, body in short[:8]]
    return [request for group in zip(short[::8], long, several, score, targets, strict=False) for request in group] + [
        *short,
        *listed,
    ]


def _text(name: str) -> tuple[Any, list[str]]:
    from pll_sharing import bert_tokenizer, lines_of

    return bert_tokenizer(), lines_of(name)


# ---------------------------------------------------------------- servers


def mlmkit_command(folder: Path, *more: str) -> list[str]:
    """The server that this measures."""
    return [sys.executable, "-m", "mlmkit", "serve", str(folder / "artifact"), "--port", "0", *more]


def pipeline_command(folder: Path) -> list[str]:
    """The peer."""
    return [sys.executable, __file__, "--peer", "--folder", str(folder)]


def serve_pipeline(folder: Path) -> None:
    """FastAPI and the pipeline. The route runs on the event loop, so requests are answered one at a time."""
    import logging
    import socket

    import uvicorn
    from fastapi import Body, FastAPI
    from transformers import pipeline

    fill = pipeline("fill-mask", model=str(folder / "checkpoint"))
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
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stderr=said) as process:
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
            sys.exit(f"{' '.join(process.args)}\n{text}")  # pyright: ignore[reportArgumentType, reportCallIssue]
        time.sleep(0.1)
    sys.exit("a server did not start in time")


def load(port: int, requests: Path, connections: int, seconds: float) -> dict[str, Any]:
    """What the clients saw."""
    command = [sys.executable, str(Path(__file__).with_name("load.py")), str(port), str(requests)]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def open_engine(folder: Path, requests: Requests) -> tuple[Any, list[Any]]:
    """The engine alone, and the batches of the requests."""
    from mlmkit.backends import load as load_backend
    from mlmkit.fill import ask

    backend = load_backend(str(folder / "artifact"))
    return backend, [ask(backend.tokenizer, backend.info, body["inputs"]).batch for _, body in requests]


def bare_calls(made: tuple[Any, list[Any]], seconds: float) -> float:
    """Seconds of one of its calls, in the median."""
    backend, batches = made
    taken, until = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < until:
        backend.predict(batches[len(taken) % len(batches)])
        taken.append(time.perf_counter() - begun)
    return median(taken)


def overhead(folder: Path, requests: Requests, path: Path, slices: int) -> list[dict[str, float]]:
    """Short slices of the bare engine and of one connection to a server, alternating, in processes that stay."""
    engine = Contestant(open_engine, folder, requests)
    found = []
    with running(mlmkit_command(folder)) as (port, _):
        for _ in range(slices + 1):
            bare = engine.call(bare_calls, 1.0)
            found.append({"bare": bare, "served": load(port, path, 1, 1.0)["p50"]})
    engine.stop()
    return found[1:]  # the first was to warm up


# ---------------------------------------------------------------- the two measurements


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds of both servers at each number of connections."""
    requests = short_requests(256, options.tokens)
    path = folder / "requests.json"
    path.write_text(json.dumps(requests))
    commands = {"mlmkit": mlmkit_command(folder), "pipeline": pipeline_command(folder)}
    runs: dict[str, dict[int, list[Any]]] = {name: {count: [] for count in CONNECTIONS} for name in commands}
    alone = overhead(folder, requests, path, 6 * options.rounds)
    for _ in range(options.rounds):
        for name, command in commands.items():
            with running(command) as (port, _):
                load(port, path, 4, 2.0)  # to warm up
                for count in CONNECTIONS:
                    runs[name][count].append(load(port, path, count, options.seconds))
    for counts in runs.values():
        for found in (run for rounds in counts.values() for run in rounds):
            assert set(found["statuses"]) == {"200"}, found
    return {"overhead": alone, "runs": runs}


def mixed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The server under more than it can do."""
    path = folder / "mixed.json"
    path.write_text(json.dumps(mixed_requests()))
    memory: list[float] = []
    with running(mlmkit_command(folder, "--max-requests", "48", "--deadline", "120")) as (port, process):
        until = time.monotonic() + options.mixed
        parts = []
        while time.monotonic() < until:
            parts.append(load(port, path, 64, min(30.0, max(until - time.monotonic(), 1.0))))
            memory.append(_resident(process))
            print(f"{memory[-1]:.3f} GiB, {parts[-1]['statuses']}", file=sys.stderr)  # noqa: T201
    statuses: dict[str, int] = {}
    for part in parts:
        for status, count in part["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    assert set(statuses) <= {"200", "429"}, (statuses, [part["last_error"] for part in parts])
    return {
        "seconds": options.mixed,
        "statuses": statuses,
        "resident_gib": memory,
        "p99": [part["p99"] for part in parts],
    }


def _resident(process: int) -> float:
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / (1 << 20)


def table(found: dict[str, Any]) -> str:
    """Medians over the rounds, and the range of the ratios within a round."""
    lines = [
        "| connections | server | requests/s | p50 ms | p99 ms | x the pipeline's requests/s |",
        "|---|---|---|---|---|---|",
    ]
    for count in CONNECTIONS:
        peers = found["runs"]["pipeline"][count]
        for name, counts in found["runs"].items():
            rounds = counts[count]
            ratios = [a["requests_per_second"] / b["requests_per_second"] for a, b in zip(rounds, peers, strict=True)]
            rate, p50, p99 = (median(run[key] for run in rounds) for key in ("requests_per_second", "p50", "p99"))
            lines.append(
                f"| {count} | {name} | {rate:.1f} | {p50 * 1e3:.1f} | {p99 * 1e3:.1f} "
                f"| {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
    bare = median(pair["bare"] for pair in found["overhead"])
    added = [pair["served"] - pair["bare"] for pair in found["overhead"]]
    said = f"On one connection the server adds {median(added) * 1e3:.2f} ms ({min(added) * 1e3:.2f} to "
    said += f"{max(added) * 1e3:.2f}) to the bare call's {bare * 1e3:.2f} ms, medians of alternating slices."
    return "\n".join([*lines, "", said])


def main() -> None:
    """Either measurement; `--output` keeps all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="a number of connections, a round")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--layers", type=int, default=0, help="fewer than BERT-base has, to try it out")
    parser.add_argument("--mixed", type=float, help="measure that instead, for so many seconds")
    parser.add_argument("--folder", type=Path, help="keep checkpoint and artifact there, or take them from there")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        serve_pipeline(options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "artifact").exists():
            isolated(_prepare, folder, options.layers)
        found = mixed(options, folder) if options.mixed else compare(options, folder)
    if options.output:
        names = ("torch", "transformers", "onnxruntime-gpu", "fastapi", "uvicorn")
        found |= {
            "date": str(datetime.date.today()),
            "command": " ".join(["python", *sys.argv]),
            "cores": len(os.sched_getaffinity(0)),
            "versions": {name: version(name) for name in names},
        }
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if options.mixed else table(found))  # noqa: T201


def _prepare(folder: Path, layers: int) -> None:
    from engines import export_artifact, write_checkpoint

    write_checkpoint(folder / "checkpoint", "bert-base", layers)
    export_artifact(folder / "checkpoint", folder / "artifact")


if __name__ == "__main__":
    main()
