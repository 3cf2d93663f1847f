"""A real server in a process of its own or in a fork, and a plain client for it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import parse_headers
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from interruptions import start_rank

STARTUP_SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """Status, headers with lower-case names, and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str]:
        """Status and `error_type` of an error, whose form is checked."""
        assert set(self.json) == {"error", "error_type"}, self
        assert self.headers["content-type"] == "application/json"
        assert self.json["error"] == " ".join(self.json["error"].split())
        return self.status, self.json["error_type"]


@dataclass(frozen=True)
class Server:
    """Its port, its process, and its standard error."""

    port: int
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def ask(self, path: str, body: Any = None, **headers: str) -> Answer:
        """GET without a body; else POST, of bytes as they are or of JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, _lower(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, _lower(error.headers), error.read())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 30)

    def exchange(self, *parts: bytes, count: int = 1, half_closes: bool = False) -> list[Answer]:
        """All answers to these bytes. The client closes its side after `count` answers, or before the first."""
        with self.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in parts:
                client.sendall(part)
                time.sleep(0.002 if len(parts) > 1 else 0)
            file, answers = client.makefile("rb"), []
            with contextlib.suppress(ConnectionError):  # the server may close first
                while True:
                    if half_closes or len(answers) == count:
                        with contextlib.suppress(OSError):
                            client.shutdown(socket.SHUT_WR)
                    answer = read_answer(file)
                    if answer is None:
                        break
                    answers.append(answer)
            return answers

    def metric(self, name: str) -> float:
        """A metric: the sum over its labels, or the value for `name{label="value"}`."""
        page = self.ask("/metrics").body.decode()
        return sum(map(float, re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", page, re.MULTILINE)))

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def tensors(*arrays: Any) -> list[dict[str, Any]]:
    """JSON tensors of the Open Inference Protocol: `input_ids`, `attention_mask`, `positions` and `targets`."""
    names = ("input_ids", "attention_mask", "positions", "targets")
    return [
        {"name": name, "shape": list(np.shape(array)), "datatype": "INT64", "data": np.ravel(array).tolist()}
        for name, array in zip(names, arrays, strict=True)
    ]


def read_answer(file: BinaryIO) -> Answer | None:
    """The next answer on a connection that is not an interim one; None where the server has closed it."""
    line = file.readline()
    if not line:
        return None
    headers = _lower(parse_headers(file))
    if line.split()[1] == b"100":
        return read_answer(file)
    length = headers.get("content-length")  # without one, the answer ends with the connection
    return Answer(int(line.split()[1]), headers, file.read(int(length)) if length else file.read())


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
    """`mlmkit serve` on a free port, ready. `before` is Python code that runs first, in its process."""
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "stderr"
        if before:
            program = ["-c", f"{before}; from mlmkit.cli import main; main()"]
        command = [python, *program, "serve", str(model), "--port", "0", *options]
        with (
            log_file.open("wb") as log,
            subprocess.Popen(command, stderr=log, cwd=cwd, env=os.environ | (environment or {})) as process,
        ):
            try:
                yield Server(port_of(log_file, lambda: process.poll() is None), process, log_file)
            finally:
                process.kill()


@contextlib.contextmanager
def forked(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """`mlmkit serve` in a fork that finds everything imported, for tests of its answers, not of its start and end.

    Its messages go to a file in `folder`.
    """
    log_file = folder / "log.err"
    log_file.touch()
    process: Any = start_rank(folder / "log", ["serve", str(model), "--port", "0", *options])
    try:
        yield Server(port_of(log_file, process.is_alive), process, log_file)
    finally:
        process.kill()
        process.join()


def port_of(log_file: Path, is_running: Callable[[], bool]) -> int:
    """The port on which a server that writes this log listens, once it does."""
    until = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < until and is_running():
        if match := re.search(r"on http://(?:127\.0\.0\.1|0\.0\.0\.0):(\d+)", log_file.read_text()):
            return int(match[1])
        time.sleep(0.02)
    raise AssertionError(f"the server did not start: {log_file.read_text()}")


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
