"""A load generator: each connection sends a request, waits for the answer and sends the next, for a bounded time.

It runs in a process of its own, against 127.0.0.1 only, with as little work per request as Python allows. A client that
is refused asks again a little later; one whose connection is closed reconnects.
"""

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

HOST = "127.0.0.1"


def encode(path: str, body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


@dataclass
class Load:
    """What all clients share, and what they saw: status codes, latencies in seconds and the last error."""

    requests: Iterator[bytes]
    until: float
    patience: float
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    last_error: str = ""


class Client(asyncio.Protocol):
    """One connection. A protocol, as asyncio's streams would use more of the cores that the server needs."""

    def __init__(self, load: Load) -> None:
        self._load, self._answer, self._begun, self._is_waiting = load, b"", 0.0, False
        self._loop = asyncio.get_running_loop()
        self.closed = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._ask()

    def _ask(self) -> None:
        if not self._transport.is_closing():
            self._answer, self._is_waiting = b"", True
            self._begun = time.perf_counter()
            self._transport.write(next(self._load.requests))

    def data_received(self, data: bytes) -> None:
        """Send the next request once the answer is complete."""
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.partition(b"content-length: ")[2].split(b"\r\n", 1)[0]):
            return
        seconds, self._is_waiting, status = time.perf_counter() - self._begun, False, head[9:12].decode()
        self._load.statuses[status] += 1
        if status == "200":
            self._load.seconds.append(seconds)
        else:
            self._load.last_error = body[:500].decode("utf-8", "replace")
        if b"connection: close" in head or time.perf_counter() > self._load.until:
            self._transport.close()
        elif status == "200":
            self._ask()
        else:
            self._loop.call_later(self._load.patience, self._ask)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count an answer that has not come as lost."""
        if self._is_waiting:
            self._load.statuses["no answer"] += 1
        self.closed.set_result(None)


async def connect(port: int, load: Load) -> None:
    """One client, which reconnects when the server closes, until the time is over."""
    while time.perf_counter() < load.until:
        try:
            _, client = await asyncio.get_running_loop().create_connection(lambda: Client(load), HOST, port)
        except OSError:
            load.statuses["no connection"] += 1
            await asyncio.sleep(0.05)
        else:
            await client.closed


async def run(
    port: int, requests: list[bytes], connections: int, seconds: float, patience: float = 0.2
) -> dict[str, Any]:
    """Load a server. Returns counts by status, requests per second, and latencies of answered requests in seconds.

    A client that is refused asks again after `patience` seconds.
    """
    begun = time.perf_counter()
    load = Load(itertools.cycle(requests), begun + seconds, patience)
    await asyncio.gather(*(connect(port, load) for _ in range(connections)))
    passed = time.perf_counter() - begun
    cuts = quantiles(load.seconds, n=100) if len(load.seconds) > 1 else [*load.seconds, 0.0][:1] * 99
    return {
        "connections": connections,
        "seconds": passed,
        "statuses": dict(load.statuses),
        "requests_per_second": len(load.seconds) / passed,
        "p50": cuts[49],
        "p99": cuts[98],
        "last_error": load.last_error,
    }


def run_alone(port: int, requests: list[tuple[str, Any]], connections: int, seconds: float) -> dict[str, Any]:
    """`run` with paths and bodies, for a process that does nothing else."""
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return asyncio.run(run(port, [encode(*request) for request in requests], connections, seconds))
