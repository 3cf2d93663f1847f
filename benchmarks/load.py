"""A load generator: connections that each ask, wait for the answer and ask again, for a bounded time.

A process of its own, on 127.0.0.1 only, with as little work a request as Python allows: the requests are made before,
and of an answer only the head is read. Prints a JSON object. A refused request is asked again after its Retry-After,
shortened to `--patience`, as a client would.
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles
from typing import Any

HOST = "127.0.0.1"


def encode(path: str, body: Any) -> bytes:
    """A POST as bytes."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes, bytes]:
    """Status, head and body of the answer. Raises `ConnectionError` or `IncompleteReadError` where there is none."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
    return int(head[9:12]), head, await reader.readexactly(length)


async def connection(port: int, requests: Iterator[bytes], until: float, patience: float, seen: "Seen") -> None:
    """One client, until the time is over or nobody listens any more."""
    reader = writer = None
    while time.perf_counter() < until:
        if writer is None or reader is None:
            try:
                reader, writer = await asyncio.open_connection(HOST, port)
            except OSError:
                seen.statuses["no connection"] += 1
                await asyncio.sleep(0.05)
                continue
        begun = time.perf_counter()
        try:
            status, head, body = await ask(reader, writer, next(requests))
        except (ConnectionError, asyncio.IncompleteReadError):
            seen.statuses["no answer"] += 1
            writer.close()
            writer = None
            continue
        seen.statuses[str(status)] += 1
        if status == 200:
            seen.seconds.append(time.perf_counter() - begun)
        elif status in (429, 503):
            await asyncio.sleep(patience)
        else:
            seen.last_error = body[:500].decode("utf-8", "replace")
        if b"connection: close" in head.lower():
            writer.close()
            writer = None
    if writer is not None:
        writer.close()


class Seen:
    """What the clients saw."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.last_error = ""


async def run(port: int, requests: list[bytes], connections: int, seconds: float, patience: float) -> dict[str, Any]:
    """The figures of one load; latencies are of answered requests, in seconds."""
    seen, endless = Seen(), itertools.cycle(requests)
    begun = time.perf_counter()
    await asyncio.gather(*(connection(port, endless, begun + seconds, patience, seen) for _ in range(connections)))
    passed = time.perf_counter() - begun
    cuts = quantiles(seen.seconds, n=100) if len(seen.seconds) > 1 else [seen.seconds[0] if seen.seconds else 0.0] * 99
    return {
        "connections": connections,
        "seconds": passed,
        "statuses": dict(seen.statuses),
        "requests_per_second": len(seen.seconds) / passed,
        "p50": cuts[49],
        "p99": cuts[98],
        "last_error": seen.last_error,
    }


def main() -> None:
    """Ask as told, for at most an hour."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("requests", type=Path, help="JSON: a list of [path, body], asked in turn")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--patience", type=float, default=0.2)
    options = parser.parse_args()
    requests = [encode(path, body) for path, body in json.loads(options.requests.read_text(encoding="utf-8"))]
    seconds = min(options.seconds, 3600.0)
    found = asyncio.run(run(options.port, requests, options.connections, seconds, options.patience))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
