"""A real server in a process of its own, and a plain client for it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTING = 120.0  # seconds


@dataclass(frozen=True)
class Answer:
    """Status, headers with names in lower case, and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """Where it listens, its process, and what it has said on standard error."""

    port: int
    process: subprocess.Popen[bytes]
    said_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def said(self) -> str:
        return self.said_file.read_text()

    def ask(self, path: str, body: Any = None, **headers: str) -> Answer:
        """GET without a body; else POST, of bytes as they are or of JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, _lower(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, _lower(error.headers), error.read())

    def metric(self, name: str) -> float:
        """The sum over a metric's labels."""
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", self.ask("/metrics").body.decode(), re.MULTILINE)
        return sum(map(float, found))

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def running(
    model: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    before: str = "",
    python: str = sys.executable,
    program: Sequence[str] = ("-m", "mlmkit"),
    cwd: Path | None = None,
) -> Iterator[Server]:
    """`mlmkit serve` on a free port, ready. `before` is Python that runs first, in its process."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        if before:
            program = ["-c", f"{before}; from mlmkit.cli import main; main()"]
        command = [python, *program, "serve", str(model), "--port", "0", *options]
        with (
            said.open("wb") as file,
            subprocess.Popen(command, stderr=file, cwd=cwd, env=os.environ | (environment or {})) as process,
        ):
            try:
                yield Server(_port(process, said), process, said)
            finally:
                process.kill()


def _port(process: subprocess.Popen[bytes], said: Path) -> int:
    until = time.monotonic() + STARTING
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"on http://(?:127\.0\.0\.1|0\.0\.0\.0):(\d+)", said.read_text()):
            return int(found[1])
        time.sleep(0.02)
    raise AssertionError(f"the server did not start: {said.read_text()}")


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
