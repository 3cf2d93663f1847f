"""Running the application: the socket, the signals, one process or several."""

import asyncio
import contextlib
import ctypes
import ipaddress
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import uvicorn

from mlmkit.backends import Backend, load
from mlmkit.distributed import cores
from mlmkit.errors import CheckError, EndedElsewhereError, UserError
from mlmkit.serve.app import build_app
from mlmkit.serve.gate import Gate, Hosts
from mlmkit.serve.limits import BATCH_TOKENS, QUEUE_TOKENS, Limits
from mlmkit.serve.metrics import SHARED, Metrics
from mlmkit.serve.protocol import Protocol
from mlmkit.serve.service import Service

log = logging.getLogger(__name__)

BACKLOG = 2048
SPREADS = sys.platform == "linux"  # whether the kernel spreads connections over sockets of one port (SO_REUSEPORT)
KEEP_ALIVE = 75  # seconds: longer than load balancers keep a connection, so that they close it, not we
FAREWELL = 0.5  # seconds from the signal to the closed socket, so that clients with open connections hear of it
M_MMAP_THRESHOLD, LARGE = -3, 1 << 20  # bytes: what is larger goes back at once; glibc by itself kept 300 MiB
SWITCH = 0.0005  # seconds, a tenth of Python's: so long may a text thread keep the event loop waiting, at each write
AGAIN = 1.0  # seconds before a worker that died is started again


@dataclass(frozen=True)
class Serving:
    """What is served, where and how. `limits` holds the fields of `Limits` that the user named."""

    model: str
    backend: str
    device: str
    host: str
    port: int
    token: str | None
    names: tuple[str, ...]  # that it answers to, beside those of this machine
    workers: int
    log_texts: bool
    limits: dict[str, Any]


def serve(serving: Serving) -> None:
    """Serve until SIGTERM or SIGINT, then answer what has been accepted and return.

    Raises `UserError` for an address that cannot be had, a model that cannot be loaded, or bounds that do not fit it.
    """
    _raise_file_limit()
    with _listen(serving) as listener:
        if serving.token is None and not _is_loopback(listener):
            log.warning("anyone who reaches this port may use it: set a token (MLMKIT_TOKEN)")
        if serving.workers == 1:
            _run(serving, listener, lambda: _say_ready(serving, listener))
        else:
            _run_workers(serving, listener)


def limits_for(backend: Backend, named: dict[str, Any]) -> Limits:
    """The bounds for this model on this device. Raises `UserError` for those that the model cannot keep."""
    longest = backend.info.max_length
    limits = Limits(
        **{
            "text_tokens": longest,
            "batch_tokens": BATCH_TOKENS[backend.device],
            "queue_tokens": QUEUE_TOKENS[backend.device],
        }
        | named
    )
    if limits.text_tokens > longest:
        raise UserError(f"--max-tokens {limits.text_tokens}: the model takes {longest}")
    if limits.queue_tokens < limits.text_tokens:
        raise UserError(f"--max-queue-tokens {limits.queue_tokens} does not hold a text of {limits.text_tokens} tokens")
    return limits


# ---------------------------------------------------------------- one process


class _Server(uvicorn.Server):
    """uvicorn's server, which says that it is going, goes on for a moment, and then answers all that it has."""

    def __init__(self, config: uvicorn.Config, service: Service, gate: Gate, on_ready: Any) -> None:
        super().__init__(config)
        self._service, self._gate, self._on_ready = service, gate, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @property
    def has_failed(self) -> bool:
        """Whether the batcher has died: then the process ends, and whoever watches over it starts another."""
        return self._service.has_failed

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop, asked ten times a second."""
        return await super().on_tick(counter) or self.has_failed

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As uvicorn's, but the signal has done its work when the server has gone, and is not raised again."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Not ready from now on; answers ask their clients to close the connection."""
        if not self.should_exit:
            log.info("shutting down: answering what has been accepted")
        self._service.is_accepting = False
        self._gate.is_draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        begun, drain = time.monotonic(), self._service.limits.drain_seconds
        await asyncio.sleep(min(FAREWELL, drain / 2))
        for listener in sockets or []:
            await self._stop_listening(listener)
        until = time.monotonic() + min(2 * FAREWELL, drain / 2)
        while time.monotonic() < until and any(
            isinstance(connection, Protocol) and connection.cycle is None
            for connection in self.server_state.connections
        ):
            await asyncio.sleep(0.01)  # connections that have been accepted and not yet read
        refusing = asyncio.create_task(self._refuse_after(begun + drain - time.monotonic()))
        await super().shutdown(sockets)
        refusing.cancel()

    async def _stop_listening(self, listener: socket.socket) -> None:
        """Close the socket, and first accept what the kernel has taken on our behalf, which it would reset."""
        copy, connections = listener.dup(), []
        copy.setblocking(False)
        for server in self.servers:
            server.close()
        # Without a pause, in which clients that are answered would come again, and until both sockets are closed: as
        # long as one is open, the kernel goes on taking.
        with contextlib.suppress(BlockingIOError):
            while True:
                connections.append(copy.accept()[0])
        copy.close()
        listener.close()
        for connection in connections:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> Protocol:
        return Protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def _refuse_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        log.warning("the time to shut down is over: what still waits is refused")
        if self._service.is_alive:
            await self._service.batcher.close(answer=False)


def _run(serving: Serving, listener: socket.socket, on_ready: Any) -> None:
    backend = load(serving.model, serving.backend, serving.device)
    if serving.workers > 1 and SPREADS:
        address, family = listener.getsockname()[:2], listener.family
        listener = socket.create_server(address, family=family, backlog=BACKLOG, reuse_port=True)
    service = Service(backend, limits_for(backend, serving.limits), Metrics(), serving.log_texts)
    gate = build_app(service, serving.token, Hosts(serving.names, _is_loopback(listener)))
    config = uvicorn.Config(
        gate,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # the gate's own has no texts, and says how long it took
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(service.limits.drain_seconds) + 1,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    sys.setswitchinterval(SWITCH)
    with contextlib.suppress(AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    server = _Server(config, service, gate, on_ready)
    server.run([listener])
    if not server.started or server.has_failed:
        raise CheckError("the server did not start, or its batcher died: its messages are above")


def _say_ready(serving: Serving, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    workers = f", {serving.workers} workers" if serving.workers > 1 else ""
    log.info("serving %s on http://%s:%d%s", serving.model, f"[{host}]" if ":" in host else host, port, workers)


# ---------------------------------------------------------------- several processes


@dataclass
class _Worker:
    process: Any
    ready: Any  # the end of a pipe
    is_ready: bool = False


def _run_workers(serving: Serving, listener: socket.socket) -> None:
    """Workers share the port, each with its own model and its part of the cores; one that dies is replaced.

    The first starts alone, so that what keeps them all from starting is said once.
    """
    is_stopping = threading.Event()
    before = {number: signal.signal(number, lambda *_: is_stopping.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    with tempfile.TemporaryDirectory(prefix="mlmkit-metrics-") as folder:
        os.environ[SHARED] = folder
        os.environ["LOCAL_WORLD_SIZE"] = str(serving.workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(cores() // serving.workers, 1)))
        workers = [_start_worker(serving, listener)]
        try:
            _watch(workers, serving, listener, is_stopping)
        finally:
            listener.close()  # or it would go on taking connections that no worker accepts
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join()
            for number, handler in before.items():
                signal.signal(number, handler)


def _watch(workers: list[_Worker], serving: Serving, listener: socket.socket, is_stopping: threading.Event) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    is_said = False
    while not is_stopping.is_set():
        watched = [worker.process.sentinel for worker in workers] + [
            worker.ready for worker in workers if not worker.is_ready
        ]
        found = wait(watched, timeout=0.5)
        for place, worker in enumerate(workers):
            if worker.ready in found and not worker.is_ready:
                with contextlib.suppress(EOFError):  # it ended before it was ready
                    worker.is_ready = worker.ready.recv()
            if worker.process.is_alive() or is_stopping.is_set():
                continue
            mark_process_dead(worker.process.pid)
            if not worker.is_ready and not is_said:  # the others go on without it
                raise EndedElsewhereError("a worker could not start")
            log.warning("worker %d died (exit code %s): starting another", worker.process.pid, worker.process.exitcode)
            time.sleep(AGAIN)
            workers[place] = _start_worker(serving, listener)
        if not is_said and all(worker.is_ready for worker in workers):
            is_said = len(workers) == serving.workers
            if is_said:
                _say_ready(serving, listener)
            else:
                workers += [_start_worker(serving, listener) for _ in range(serving.workers - 1)]


def _start_worker(serving: Serving, listener: socket.socket) -> _Worker:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    level = logging.getLogger("mlmkit").level
    process = spawn.Process(target=_worker, args=(serving, listener, theirs, level))
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _worker(serving: Serving, listener: socket.socket, ready: Any, level: int) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mlmkit").setLevel(level)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()  # killed without a chance to tell us
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    try:
        _run(serving, listener, lambda: ready.send(True))
    except (UserError, CheckError) as error:
        log.error("mlmkit: %s", error)
        sys.exit(error.exit_code)


# ---------------------------------------------------------------- the socket


def _listen(serving: Serving) -> socket.socket:
    """The socket, or one that holds the port for those of the workers: the first to wake took all from a shared one."""
    host, port = serving.host, serving.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        if serving.workers == 1 or not SPREADS:
            listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        else:
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)  # fails where another server listens, which it would not after the next line
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"cannot listen on {host}, port {port}: {reason}") from None
    listener.set_inheritable(True)
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _raise_file_limit() -> None:
    """A connection is a file, and 1,024 are often all that a process may open unless it asks."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # no such module on Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
