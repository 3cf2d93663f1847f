"""A load generator: each connection sends a request, waits for the answer and sends the next, for a bounded time.

It runs in a process of its own, against 127.0.0.1 only, with as little work per request as Python allows, and prints a
JSON object. A client that is refused asks again a little later; one whose connection is closed reconnects.
"""

import argparse
import asyncio
import contextlib
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
    """The bytes of a POST request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


class Client(asyncio.Protocol):
    """One connection. A protocol, as asyncio's streams would use more of the cores that the server needs."""

    def __init__(self, requests: Iterator[bytes], patience: float, seen: "Seen") -> None:
        self._requests, self._patience, self._seen = requests, patience, seen
        self._answer, self._begun, self._is_waiting = b"", 0.0, False
        self.loop = asyncio.get_running_loop()
        self.closed = self.loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self.transport: Any = transport
        self._ask()

    def _ask(self) -> None:
        if not self.transport.is_closing():
            self._answer, self._is_waiting = b"", True
            self._begun = time.perf_counter()
            self.transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        """Send the next request once the answer is complete."""
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.partition(b"content-length: ")[2].split(b"\r\n", 1)[0]):
            return
        seconds, self._is_waiting, status = time.perf_counter() - self._begun, False, head[9:12].decode()
        self._seen.statuses[status] += 1
        if status == "200":
            self._seen.seconds.append(seconds)
        else:
            self._seen.last_error = body[:500].decode("utf-8", "replace")
        if b"connection: close" in head or time.perf_counter() > self._seen.until:
            self.transport.close()
        elif status == "200":
            self._ask()
        else:
            self.loop.call_later(self._patience, self._ask)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count an answer that has not come as lost."""
        if self._is_waiting:
            self._seen.statuses["no answer"] += 1
        self.closed.set_result(None)


async def connect(port: int, requests: Iterator[bytes], patience: float, seen: "Seen") -> None:
    """One client, which reconnects when the server closes, until the time is over."""
    while time.perf_counter() < seen.until:
        try:
            _, client = await asyncio.get_running_loop().create_connection(
                lambda: Client(requests, patience, seen), HOST, port
            )
        except OSError:
            seen.statuses["no connection"] += 1
            await asyncio.sleep(0.05)
        else:
            await client.closed


class Seen:
    """Status codes, latencies in seconds and the last error of all clients."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.last_error = ""


async def run(
    port: int, requests: list[bytes], connections: int, seconds: float, patience: float = 0.2
) -> dict[str, Any]:
    """Load a server. Returns counts by status, requests per second, and latencies of answered requests in seconds.

    A client that is refused asks again after `patience` seconds.
    """
    begun, endless = time.perf_counter(), itertools.cycle(requests)
    seen = Seen(begun + seconds)
    await asyncio.gather(*(connect(port, endless, patience, seen) for _ in range(connections)))
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
    """Run the command line, for at most an hour."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("requests", type=Path, help="JSON: a list of [path, body], sent in turn")
    parser.add_argument("connections", type=int)
    parser.add_argument("seconds", type=float)
    options = parser.parse_args()
    requests = [encode(path, body) for path, body in json.loads(options.requests.read_text(encoding="utf-8"))]
    seconds = min(options.seconds, 3600.0)
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    json.dump(asyncio.run(run(options.port, requests, options.connections, seconds)), sys.stdout)


if __name__ == "__main__":
    main()
